"""Download the pruned models that the authors of ProxSparse released (Hub repository aladinggit/proxsparse_models).

    python proxsparse_pruned_model_download.py --list
    python proxsparse_pruned_model_download.py --only llama2-7b qwen2.5-14b
    python proxsparse_pruned_model_download.py         (all, about 120 GB)

If it stops, the same command goes on where it stopped. bash script/eval_pruned_prox_model.sh measures their perplexity.
"""

import argparse
import os
from pathlib import Path

from huggingface_hub import snapshot_download
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
from proxsparse.recipes import RELEASED, REPOSITORY

COMPLETE = ".downloaded"  # written last, in a folder that has all of its files


def arguments() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="show the names and stop; needs no network")
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
        RunError: the Hub refuses or can't be reached.
    """
    patterns = [f"{RELEASED[name][0]}/*" for name in names]
    try:
        print(f"downloading {', '.join(names)} into {to}", flush=True)
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
