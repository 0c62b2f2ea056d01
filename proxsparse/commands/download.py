"""Download the pruned models that the authors of ProxSparse released (Hub repository aladinggit/proxsparse_models).

    python proxsparse_pruned_model_download.py --list
    python proxsparse_pruned_model_download.py --only llama2-7b qwen2.5-14b --to pruned_models
    python proxsparse_pruned_model_download.py                        (all seven, about 120 GB)

Started again, it goes on where it stopped. bash script/eval_pruned_prox_model.sh measures their perplexity.
"""

import argparse
import os
import shutil
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from rich.console import Console
from rich.table import Table

from proxsparse.commands.cli import Parser, command, print_json
from proxsparse.errors import RunError, UsageError
from proxsparse.model.hub_errors import UNREACHABLE

COMPLETE = ".downloaded"  # written last, in a folder that has all of its files
REPOSITORY = "aladinggit/proxsparse_models"
# short name -> (folder in the repository, context length it was learned with)
RELEASED = {
    "llama2-7b": ("Llama-2-7b-hf-en_sft_final_400_len4096_batch1_lambda0.25", 4096),
    "llama2-13b": ("Llama-2-13b-hf-en_sft_final_reg0.5_400_len4096_batch1_lambdaone0.5_lambdatwo0.25", 4096),
    "llama3.1-8b": ("Meta-Llama-3.1-8B-en_sft_final_400_lr5e-05_len4096_batch1_lambda0.85", 4096),
    "mistral-v0.1-7b": ("Mistral-7B-v0.1-en_sft_final_400_lr5e-05_len4096_batch1_lambda20.0", 4096),
    "mistral-v0.3-7b": ("Mistral-7B-v0.3-en_sft_final_400_lr5e-05_len4096_batch1_lambda25.0", 4096),
    "openllama-v2-7b": ("open_llama_7b_v2-en_sft_final_400_lr0.0001_len2048_batch1_lambda1.0", 2048),
    "qwen2.5-14b": ("Qwen2.5-14B-en_sft_final_400_lr0.0001_len4096_batch1_lambda0.2", 4096),
}


def arguments() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="show the names and leave; needs no network")
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME", help="short names; default: all")
    parser.add_argument("--to", default="pruned_models", metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--revision", default=None, help="revision of the repository")
    return parser


@command(arguments)
def main(args: argparse.Namespace) -> None:
    names = args.only or list(RELEASED)
    for name in names:
        if name not in RELEASED:
            raise UsageError(f"--only takes {', '.join(RELEASED)}; got {name!r}.")
    to = Path(args.to)
    if to.exists() and not to.is_dir():
        raise UsageError(f"--to must be a folder; {to} is a file.")
    if args.list:
        show(names, to)
        return
    folders = download(names, to, args.revision)
    print_json({name: str(folder) for name, folder in folders.items()})


def show(names: list[str], to: Path) -> None:
    table = Table(title=f"released pruned models, {REPOSITORY}")
    for head in ("name", "ctx_len", "folder", "here"):
        table.add_column(head, overflow="fold")
    for name in names:
        folder, ctx_len = RELEASED[name]
        table.add_row(name, str(ctx_len), folder, "yes" if (to / folder / COMPLETE).is_file() else "no")
    Console().print(table)


def download(names: list[str], to: Path, revision: str | None = None) -> dict[str, Path]:
    """Fetch released models; files that are here already in full are not fetched again.

    Returns:
        short name -> folder of the checkpoint.

    Raises:
        RunError: the Hub refuses or can't be reached, or the disk is too small.
    """
    patterns = [f"{RELEASED[name][0]}/*" for name in names]
    try:
        missing = bytes_missing([RELEASED[name][0] for name in names], to, revision)
        free = shutil.disk_usage(_existing(to)).free
        if missing > free:
            raise RunError(
                f"{missing / 1e9:.1f} GB are to be downloaded, and the disk of {to} has {free / 1e9:.1f} GB free: "
                f"choose another --to, or fewer models with --only."
            )
        print(f"downloading {', '.join(names)} ({missing / 1e9:.1f} GB) into {to}", flush=True)
        snapshot_download(REPOSITORY, revision=revision, allow_patterns=patterns, local_dir=to)
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise RunError(
            f"The Hub does not show {REPOSITORY} to you: log in with 'hf auth login', and accept its terms if it has "
            f"any."
        ) from error
    except RevisionNotFoundError as error:
        raise UsageError(f"--revision: {REPOSITORY} has no revision {revision!r}.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, ConnectionError, TimeoutError, *UNREACHABLE) as error:
        why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") == "1" else "it can't be reached"
        raise RunError(f"Nothing can be downloaded from the Hub: {why}. What is here already stays.") from error
    folders = {name: to / RELEASED[name][0] for name in names}
    for name, folder in folders.items():
        if not (folder / "config.json").is_file():
            raise RunError(f"{REPOSITORY} has no folder {folder.name} ({name}) at revision {revision or 'main'}.")
        (folder / COMPLETE).touch()
    return folders


def bytes_missing(folders: list[str], to: Path, revision: str | None) -> int:
    """Bytes of the files that are not here in full."""
    info = HfApi().model_info(REPOSITORY, revision=revision, files_metadata=True)
    missing = 0
    for file in info.siblings or []:
        here = to / file.rfilename
        wanted = file.rfilename.split("/")[0] in folders
        if wanted and not (here.is_file() and here.stat().st_size == (file.size or 0)):
            missing += file.size or 0
    return missing


def _existing(path: Path) -> Path:
    """The nearest folder that is there already, to ask its disk."""
    path = path.absolute()
    return path if path.exists() else _existing(path.parent)
