"""A model on disk, as its files are: a folder or the Hub cache's snapshot, plain, quantised or compact.

Everything that reads weights without the model goes through ``Checkpoint``: which files transformers reads, in its
order; what they hold; and every tensor as plain numbers, one at a time.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from torch import Tensor

from proxsparse.errors import RunError
from proxsparse.model.compact import Compact, compact_index, is_compact, unpacked
from proxsparse.model.hub_errors import lfs_pointer
from proxsparse.model.quantised import (
    FP8,
    SCALES,
    block_of,
    dequantise_fp8,
    dequantise_mxfp4,
    quantisation,
    refuse_quantised,
)
from proxsparse.model.source import model_source
from proxsparse.record import read_json

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FP8_CODES = ("F8_E4M3", "F8_E5M2")
CODES = (*FP8_CODES, "I8", "U8", "I32")  # dtypes of quantised weights in a file
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint, not yet read.

    Attributes:
        shape: shape of the plain tensor.
        file: the file that holds it, or its first part.
        read: gives the plain tensor.
    """

    shape: tuple[int, ...]
    file: Path
    read: Callable[[], Tensor]

    def __getitem__(self, index: Any) -> Tensor:
        """Where transformers loads the tensor: it asks for all of it."""
        return self.read()[index]


class Checkpoint:
    """A model's files on this machine.

    Args:
        folder: folder with config.json and safetensors files.
        name: name that messages give it; default: the folder.

    Raises:
        RunError: a file is damaged, or an index names files outside of its folder.
    """

    def __init__(self, folder: Path | str, name: str = ""):
        self.folder = Path(folder)
        self.name = name or str(folder)

    @classmethod
    def find(cls, name: str, revision: str | None = None) -> "Checkpoint | None":
        """The complete checkpoint that a model's name leads to on this machine; None: there is none, or a GGUF file.

        Args:
            name: folder, Hub id that is in the cache, or the embedded model.
            revision: revision of a Hub model.
        """
        source, extra = model_source(name)
        if extra:
            return None
        folder: Path | None = Path(source)
        if not Path(source).is_dir():
            try:
                cached = try_to_load_from_cache(source, "config.json", revision=revision)
            except HFValidationError:  # no Hub id
                return None
            folder = Path(cached).parent if isinstance(cached, str) else None
        found = None if folder is None else cls(folder, name)
        return found if found is not None and found.complete else None

    @cached_property
    def config(self) -> dict[str, Any]:
        """What config.json says."""
        try:
            return dict(read_json(self.folder / "config.json"))
        except ValueError as error:
            raise RunError(f"{self.folder / 'config.json'} is damaged ({error}); get the model again.") from error

    @property
    def is_compact(self) -> bool:
        return is_compact(self.folder)

    @property
    def is_rounded(self) -> bool:
        """Whether the values of compact weights are quantised."""
        return self.is_compact and any(weight.dtype is not None for weight in compact_index(self.folder).values())

    @property
    def is_plain(self) -> bool:
        """Whether the files hold the weights as they are, so that transformers reads them by itself."""
        return not self.is_compact and quantisation(self.config) is None

    @cached_property
    def files(self) -> list[Path]:
        """The safetensors files that hold the model, as transformers chooses them: others may lie next to them.

        Its order is: the file that config.json names, model.safetensors, the index.
        """
        if self.is_compact:
            found = sorted(self.folder.glob("compact*.safetensors"))
            parts = re.search(r"-of-(\d+)\.safetensors$", found[0].name) if found else None
            if parts:  # a download may have been interrupted
                names = (f"compact-{i:0{len(parts[1])}}-of-{parts[1]}.safetensors" for i in range(1, int(parts[1]) + 1))
                return [self.folder / name for name in names]
            return found or [self.folder / "compact.safetensors"]
        path = self.folder / self.first
        if not path.is_file():
            return []
        return index_files(path) if path.suffix == ".json" else [path]

    @property
    def first(self) -> str:
        """Name of the file that transformers opens first: the one file of weights, or the index of several."""
        named = self.config.get("transformers_weights")
        if isinstance(named, str) and Path(named).name == named:
            return named
        return SINGLE if (self.folder / SINGLE).is_file() else INDEX

    @property
    def complete(self) -> bool:
        """Whether all of its files are here."""
        return bool(self.files) and all(file.is_file() for file in self.files)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype that transformers takes where config.json names none: the first floating one of the first file."""
        file = self._open[self.files[0]]
        stored = (file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118 (not a dict)
        return next((DTYPES[name] for name in stored if name in DTYPES), torch.float32)

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """Name in the files -> tensor, as plain numbers: dequantised and decompressed, so some names are not there.

        A name that several files hold is read from the last, as transformers does.

        Raises:
            UsageError: quantised in a way that is not read here.
            RunError: a file is damaged.
        """
        if self.is_compact:
            return dict(self._decompressed(self.raw))
        if refuse_quantised(self.name, self.config):
            return dict(self._dequantised(self.raw))
        self.refuse_codes()
        return self.raw

    @cached_property
    def raw(self) -> dict[str, Stored]:
        """Name in the files -> tensor, as it is stored.

        Raises:
            RunError: a file is damaged.
        """
        with self._reading():
            return {key: self._raw(path, key) for path, file in self._open.items() for key in file.keys()}  # noqa: SIM118

    def refuse_codes(self) -> None:
        """Refuse files of quantised weights whose config.json does not say so: codes would be taken for weights.

        Raises:
            RunError: names the first of them.
        """
        for path, file in self._open.items():
            for key in file.keys():  # noqa: SIM118 (not a dict)
                refuse_code(self.name, path.name, key, file.get_slice(key).get_dtype())

    def of_file(self, path: Path) -> dict[str, Stored]:
        """The tensors of one file."""
        return {name: stored for name, stored in self.tensors.items() if stored.file == path}

    def metadata(self, path: Path) -> dict[str, str]:
        """Of one safetensors file; transformers before version 5 reads only files that say their format."""
        return {"format": "pt"} | (self._open[path].metadata() or {})

    def _raw(self, path: Path, key: str) -> Stored:
        def read() -> Tensor:
            with self._reading():
                return self._open[path].get_tensor(key)

        return Stored(tuple(self._open[path].get_slice(key).get_shape()), path, read)

    @cached_property
    def _open(self) -> dict[Path, Any]:
        found = {}
        for path in self.files:
            with _naming(path):
                found[path] = safe_open(path, framework="pt")
        return found

    def _reading(self) -> "_naming":
        return _naming(self.folder)

    def _decompressed(self, raw: dict[str, Stored]) -> Iterator[tuple[str, Stored]]:
        index = compact_index(self.folder)
        parts = {n: ("values", "positions", *(["scales"] if w.dtype else [])) for n, w in index.items()}
        missing = sorted(n for n, own in parts.items() if any(f"{n}.{part}" not in raw for part in own))
        if missing:
            raise RunError(f"{self.folder} lacks {len(missing)} weights, as {missing[0]}; export the model again.")

        def dense(name: str, weight: Compact) -> Stored:
            values, positions = raw[f"{name}.values"], raw[f"{name}.positions"]  # they may lie in different files
            scales = raw[f"{name}.scales"] if weight.dtype else None

            def read() -> Tensor:
                with _naming(values.file):
                    return unpacked(values.read(), positions.read(), scales.read() if scales else None, weight)

            shape = torch.empty(weight.rows, device="meta").movedim(-1, weight.in_dim).shape
            return Stored(tuple(shape), values.file, read)

        for name, stored in raw.items():
            base, _, part = name.rpartition(".")
            if base not in index:
                yield name, stored
            elif part == "values":
                yield base, dense(base, index[base])

    def _dequantised(self, raw: dict[str, Stored]) -> Iterator[tuple[str, Stored]]:
        block = block_of(quantisation(self.config) or {})

        def of_fp8(name: str, codes: Stored, scale: Stored) -> Stored:
            def read() -> Tensor:
                with _naming(codes.file):
                    found = codes.read()
                    try:
                        return dequantise_fp8(found, scale.read(), block) if found.dtype in FP8 else found
                    except RunError as error:
                        raise RunError(f"{codes.file} is damaged ({name}: {error}); get the model again.") from error

            return Stored(codes.shape, codes.file, read)

        def of_mxfp4(blocks: Stored, scales: Stored) -> Stored:
            experts, outputs, groups, _ = blocks.shape
            read = lambda: dequantise_mxfp4(blocks.read(), scales.read())  # noqa: E731
            return Stored((experts, 32 * groups, outputs), blocks.file, read)

        for name, stored in raw.items():
            if name.endswith("_blocks") and (scales := raw.get(name.removesuffix("_blocks") + "_scales")):
                yield name.removesuffix("_blocks"), of_mxfp4(stored, scales)
            elif (scale := next((raw[own] for own in _scales_of(name) if own in raw), None)) is not None:
                self._refuse_codes_but(FP8_CODES, name, stored)
                yield name, of_fp8(name, stored, scale)
            elif not name.endswith(SCALES) and not self._is_scale(name, raw):
                self._refuse_codes_but((), name, stored)
                yield name, stored

    def _refuse_codes_but(self, known: tuple[str, ...], name: str, stored: Stored) -> None:
        dtype = self._open[stored.file].get_slice(name).get_dtype()
        if dtype in CODES and dtype not in known:
            raise RunError(
                f"The model {self.name} is quantised: {name} holds codes in a form that is not read here ({dtype}). "
                "Give the original weights."
            )

    @staticmethod
    def _is_scale(name: str, raw: dict[str, Stored]) -> bool:
        if name.endswith("_scales"):
            return name.removesuffix("_scales") + "_blocks" in raw
        for ending, weight in ((".scale", ".weight"), ("_scale", "")):
            if name.endswith(ending) and name.removesuffix(ending) + weight in raw:
                return True
        return False


def refuse_code(model: str, file: str, key: str, dtype: str) -> None:
    """Refuse a tensor that holds codes, in a model whose config.json does not say that it is quantised.

    Args:
        dtype: as safetensors names it.

    Raises:
        RunError: names all four.
    """
    integers = dtype.startswith(("I", "U")) and key.endswith("weight")  # .weight of int8, .qweight of GPTQ
    if integers or dtype.startswith(("F8", "F4")):
        raise RunError(
            f"The model {model} is quantised, and its config.json does not say how: {key} in {file} holds {dtype} "
            "codes. Give the original weights."
        )


def _scales_of(name: str) -> tuple[str, ...]:
    """Names that the scales of a float8 weight may have."""
    return f"{name}_scale_inv", f"{name}_scale", f"{name.removesuffix('.weight')}.scale"


class _naming:
    """Whatever a damaged file raises, in one sentence with its name."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        wrong = isinstance(error, (KeyError, ValueError)) or "Safetensor" in type(error).__name__
        if wrong or (isinstance(error, OSError) and "safetensors" in str(error)):
            if pointer := lfs_pointer(self.path if self.path.is_dir() else self.path.parent):
                raise RunError(
                    f"{pointer} is a pointer of Git LFS, not the file itself: fetch it with git lfs pull."
                ) from error
            raise RunError(f"{self.path} is damaged ({error}); get the model again.") from error


def index_files(index: Path) -> list[Path]:
    """The files that an index names. It may name files in its own folder only: it must not make us read others."""
    try:
        files = set(read_json(index)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"The index {index} is damaged ({error}); download the model again.") from error
    for file in files:
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
            raise RunError(f"The index {index} names a file outside of its folder, {file!r}; do not trust it.")
        if Path(file).name != file:
            raise RunError(
                f"The index {index} names a file in a folder below, {file!r}: move its files next to the index, and "
                "take the folder out of the names in it."
            )
    return sorted(index.parent / file for file in files)
