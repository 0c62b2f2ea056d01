"""A checkpoint's tensors, read one at a time from its safetensors files."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor

from proxsparse.errors import RunError
from proxsparse.model import model_source
from proxsparse.record import read_json


def checkpoint_folder(name: str, revision: str | None = None) -> Path | None:
    """Folder on this machine with a model's safetensors files: its own, or the Hub cache's; None: there is none."""
    source, extra = model_source(name)
    folder = Path(source)
    if not folder.is_dir():
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        folder = Path(cached).parent if isinstance(cached, str) else folder
    return folder if not extra and folder.is_dir() and shards(folder) else None  # a GGUF file lies in a folder too


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
