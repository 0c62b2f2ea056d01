"""What transformers and the Hub's client print and raise while a model is loaded, in one sentence or not at all."""

import contextlib
import errno
import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import transformers
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from transformers.utils import logging as hf_logging

from proxsparse.errors import RunError, UsageError
from proxsparse.model.embedded import EMBEDDED

try:  # the Hub's client brings the one or the other, by its version
    import httpx2 as httpx
except ImportError:
    import httpx  # type: ignore[no-redef]

REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC)
SILENT = (httpx.TransportError, ConnectionError)  # what it raises where it gets no answer at all
UNREACHABLE = (httpx.HTTPError,)  # that, and refusals; these are no OSErrors

ADAPTER = "adapter_config.json"
AGAIN = (
    "Its config.json, or another of its files, says something that transformers "
    f"{transformers.__version__} does not know: get the model again, or install another version."
)
SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # package -> module


class quiet_bars:
    """Hide transformers' loading bars, which flood logs; loading takes seconds."""

    def __enter__(self) -> None:
        self.shown = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()

    def __exit__(self, *_) -> None:
        if self.shown:
            hf_logging.enable_progress_bar()


@contextlib.contextmanager
def quiet_log(name: str, level: int = logging.ERROR) -> Iterator[None]:
    """Hide what a library logs below a level, where one sentence follows anyway."""
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)


def causes(error: BaseException) -> list[BaseException]:
    """An error, and what it was raised from or while handling, back to the first."""
    found: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found


class clear_errors:
    """Turn whatever the Hub and transformers raise on a wrong or unreachable model into one sentence.

    Args:
        name: name of the model.
        part: what is loaded: model, tokenizer or adapter.
        given: names of the caller's arguments that are passed on.
        revision: of a model on the Hub.
    """

    def __init__(self, name: str, part: str = "model", given: Iterable[str] = (), revision: str | None = None):
        self.name, self.part, self.given, self.revision = name, part, set(given), revision

    def __enter__(self) -> None:
        self.quiet = quiet_log("huggingface_hub")  # which would tell of every attempt to connect
        self.quiet.__enter__()

    def __exit__(self, kind, error, trace) -> None:
        self.quiet.__exit__(None, None, None)
        if not isinstance(error, Exception) or isinstance(error, (UsageError, RunError, MemoryError)):
            return
        chain = causes(error)
        if "OutOfMemory" in type(error).__name__:
            return  # the command line says what helps
        for cause in chain:
            if isinstance(cause, OSError) and cause.errno in REFUSED and cause.filename:
                raise cause  # it says so here too: which folder, and the variable of a cache
            unknown = re.search(r"got an unexpected keyword argument '(\w+)'", str(cause))
            if unknown and unknown[1] in self.given:
                raise UsageError(f"`{unknown[1]}` is no argument of loading a model: correct or drop it.") from error
        raise (
            _of_the_hub(self.name, self.part, self.revision, chain) or _of_the_model(self.name, self.part, chain)
        ) from error


def _of_the_hub(name: str, part: str, revision: str | None, chain: list[BaseException]) -> Exception | None:
    """What a refusal of the Hub, or a missing connection, means."""
    kinds = tuple(type(e) for e in chain)
    text = " ".join(str(e) for e in chain)
    adapter = part == "adapter"
    what, argument = ("adapter", "adapter") if adapter else ("model", "model")
    if not adapter and is_cached(name, ADAPTER) and not is_cached(name):
        return UsageError(
            f"The model {name} is a LoRA adapter ({ADAPTER}), not a whole model: merge it into its base model first "
            "(merge_and_unload of peft), and give the merged folder.",
            "model",
        )
    if RevisionNotFoundError in kinds or "is not a valid git identifier" in text:
        return RunError(f"{name} has no such revision: correct `revision`.")
    missing = RepositoryNotFoundError in kinds and GatedRepoError not in kinds  # whose text speaks of gated ones too
    if GatedRepoError in kinds or ("gated repo" in text and not missing):
        return RunError(
            f"The {what} {name} is gated: accept its licence on https://huggingface.co/{name}, "
            "and log in with 'hf auth login'."
        )
    if missing or "is not a valid model identifier" in text:
        return RunError(
            f"There is no {what} {name}: it is neither a local folder nor a public Hub id "
            "(private ones need 'hf auth login')."
        )
    if HFValidationError in kinds:
        how = " (a revision is given with `revision`)" if re.search("[@:]", name) and not adapter else ""
        return UsageError(
            f"{name!r} is neither a folder here nor a Hub id of the form organisation/name{how}.", argument
        )
    if pointer := lfs_pointer(Path(name)):
        return RunError(f"{pointer} is a pointer of Git LFS, not the file itself: fetch it with git lfs pull.")
    if "safetensors" in text and ("no file named" in text or "does not appear to have" in text):
        return _without_weights(name, revision)
    if not Path(name).is_dir() and any(
        word in text.lower() for word in ("connect", "offline", "name or service", "resolve", "localentrynotfound")
    ):
        why = "HF_HUB_OFFLINE is set" if offline() else "the Hub can't be reached"
        if in_cache(name):  # of another revision, or without what was asked for
            return RunError(
                f"Of the model {name}, not all files that are asked for are in the cache, or they are of another "
                f"`revision`, and {why}."
            )
        return RunError(
            f"The {what} {name} is neither a local folder nor in the cache, and {why}. Give a folder"
            + ("." if adapter else f", or `model={EMBEDDED}`, which comes with script/setup.sh.")
        )
    return None


def _without_weights(name: str, revision: str | None) -> Exception:
    """What it means that transformers finds no weights that it reads."""
    if absent := _absent_shard(name, revision):
        why = "HF_HUB_OFFLINE is set" if offline() else "the download broke off"
        return RunError(f"The cache lacks {absent} of {name}, and {why}: download the model again.")
    if (single := Path(name, "model.safetensors")).is_dir() or single.is_symlink():
        what = "a folder" if single.is_dir() else "a link to a file that is not there"
        return RunError(f"{single} is {what}: get the model again.")
    if other := sorted(path.name for path in Path(name).glob("*.safetensors")):
        return RunError(
            f"The folder {name} has {other[0]}, which transformers does not open: name it model.safetensors, where "
            "its tensors have transformers' names."
        )
    return RunError(
        f"The model {name} has no safetensors weights, and pickle files can run code, so they are not loaded. "
        "Convert it with https://huggingface.co/spaces/safetensors/convert."
    )


def offline() -> bool:
    """Whether the user has switched the Hub off."""
    return os.environ.get("HF_HUB_OFFLINE") == "1"


def _absent_shard(name: str, revision: str | None) -> str | None:
    """The first file of weights that an index in the cache names, and the cache lacks."""
    try:
        index = try_to_load_from_cache(name, "model.safetensors.index.json", revision=revision)
    except HFValidationError:  # no Hub id
        return None
    if not isinstance(index, str):
        return None
    shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return next((shard for shard in shards if not Path(index).with_name(shard).is_file()), None)


def in_cache(name: str) -> bool:
    """Whether the Hub's cache has some revision of a model."""
    folder = Path(constants.HF_HUB_CACHE, f"models--{name.replace('/', '--')}", "snapshots")
    return folder.is_dir() and any(folder.glob("*/config.json"))


def is_cached(name: str, file: str = "config.json") -> bool:
    """Whether the Hub's cache has a file of a model."""
    try:
        return isinstance(try_to_load_from_cache(name, file), str)
    except HFValidationError:  # no Hub id
        return False


def _of_the_model(name: str, part: str, chain: list[BaseException]) -> Exception:
    """What transformers, or the model's own code, raised on its files."""
    text = " ".join(str(e) for e in chain)
    if re.search("`tiktoken` is required to read|requires the (SentencePiece|protobuf) library", text):
        absent = [package for package, module in SENTENCEPIECE.items() if not installed(module)]
        if absent:
            return RunError(
                f"The tokenizer of {name} is a SentencePiece file (tokenizer.model), which {' and '.join(absent)} "
                f"{'reads' if len(absent) == 1 else 'read'}: pip install {' '.join(absent)}."
            )
    if "a file named config.json" in text:
        return RunError(
            f"The repository {name} has no config.json, so it is no whole model for transformers: a LoRA adapter is to "
            "be merged first, and of a GGUF repository one file is to be downloaded and given."
        )
    if "instantiate the backend tokenizer" in text:
        return RunError(
            f"The tokenizer of {name} can't be loaded: there is no tokenizer.json, tokenizer.model or vocab.json that "
            "fits its tokenizer_config.json."
        )
    package = _missing_package(chain)
    if package:
        return RunError(f"The model {name} needs the package {package}, which is not installed: pip install {package}.")
    if "trust_remote_code" in text:
        return RunError(f"The model {name} needs its own code: read it, then pass `trust_remote_code=True`.")
    subject = f"The model {name}" if part == "model" else f"The {part} of {name}"
    if "ignore_mismatched_sizes" in text:
        return RunError(
            f"{subject} can't be loaded: its weights have other shapes than its config.json says, so these do not "
            "belong together. Get the model again."
        )
    if "Validation error for" in text or "validation error for" in text:  # the reason follows in other lines
        return RunError(f"{subject} can't be loaded: {' '.join(str(chain[0]).split())[:300].rstrip('.')}. {AGAIN}")
    first = (str(chain[0]).strip().splitlines() or [""])[0]
    plain = isinstance(chain[0], (OSError, ValueError, RuntimeError)) or "Safetensor" in type(chain[0]).__name__
    if plain and first:
        return RunError(f"{subject} can't be loaded: {first}")
    reason = f"{type(chain[0]).__name__}: {first}".removesuffix(": ").rstrip(".")
    return RunError(f"{subject} can't be loaded: {reason}. {AGAIN}")


def lfs_pointer(folder: Path) -> Path | None:
    """A file of a folder that a clone without Git LFS left as a pointer; None: there is none."""
    if not folder.is_dir():
        return None
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and path.stat().st_size < 1024)
    return next((path for path in files if path.read_bytes().startswith(b"version https://git-lfs")), None)


def _missing_package(chain: list[BaseException]) -> str | None:
    """The package that an import misses, by name; transformers' check of model code names it in its message only."""
    for error in chain:
        if not isinstance(error, ImportError):
            continue
        named = re.search(r"not found in your environment: ([\w.-]*\w)|pip install ([\w.-]*\w)", str(error))
        if named:
            return named[1] or named[2]
        if isinstance(error, ModuleNotFoundError) and error.name:
            return error.name.partition(".")[0]
    return None


def installed(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
