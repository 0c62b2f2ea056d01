"""A checkpoint's tensors, read one at a time from its safetensors files."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from torch import Tensor

from proxsparse.errors import RunError
from proxsparse.model.loading import model_source
from proxsparse.record import read_json


def checkpoint_folder(name: str, revision: str | None = None) -> Path | None:
    """Folder on this machine with a model's safetensors files: its own, or the Hub cache's; None: there is none."""
    found = local_checkpoint(name)
    if found is not None or Path(model_source(name)[0]).is_dir():
        return found
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # no Hub id
        return None
    return _with_shards(Path(cached).parent) if isinstance(cached, str) else None


def local_checkpoint(name: str) -> Path | None:
    """The checkpoint folder that a model's name is, with safetensors files; None: it is another kind of name."""
    source, extra = model_source(name)
    return None if extra else _with_shards(Path(source))  # a GGUF file lies in a folder too


def _with_shards(folder: Path) -> Path | None:
    files = shards(folder) if folder.is_dir() else []
    return folder if files and all(file.is_file() for file in files) else None


def shards(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads of a checkpoint, in order: others may lie beside them."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted(folder / name for name in set(read_json(index)["weight_map"].values()))
    return [p for p in (folder / "model.safetensors",) if p.is_file()]


def tensor_readers(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Tensor name -> a function that reads it. What was read is the operating system's to keep or to drop.

    Raises:
        RunError: a file is damaged.
    """

    def reading(file, key: str) -> Callable[[], Tensor]:
        return lambda: file.get_tensor(key)

    try:
        files = [safe_open(shard, framework="pt") for shard in shards(folder)]
        return {key: reading(file, key) for file in files for key in file.keys()}  # noqa: SIM118 (not a dict)
    except Exception as error:
        raise RunError(f"A shard of {folder} is damaged: {error}") from error
