"""The compact 2:4 store: two kept values per block and their positions, 9/16 of a dense 16-bit weight, bit for bit.

A folder in this form has config.json, the tokenizer, compact.json (which weights are compact, and their shapes) and
compact*.safetensors: for every pruned weight ``NAME.values`` (O, I / 2) and ``NAME.positions`` (O, ceil(I / 8)) uint8,
four 2-bit positions per byte, lowest first; every other tensor as it was. NAME is the one in the files of the base.
Rows have the input dimension last. Stacked experts are (E, O, ...).

With int8 values it takes 5/16 of a dense 16-bit weight. ``NAME.values`` are int8 codes then, and ``NAME.scales`` (O,)
float32: a weight is its code times the scale of its row, rounded to the dtype that compact.json names. The largest
weight of a row has the code 127 or -127. So a weight that was read and is quantised again gets the same codes.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from proxsparse.errors import RunError, UsageError
from proxsparse.operator.pattern import TWO_OF_FOUR
from proxsparse.operator.prox import top2_mask
from proxsparse.record import read_json, versions, write_json

KINDS = ("int8",)  # of quantised values
FORMATS = {None: "proxsparse-compact-1", "int8": "proxsparse-compact-int8-1"}
INDEX = "compact.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST = 127  # code: -128 is not used, so that codes are symmetric around zero


class Compact(NamedTuple):
    """What compact.json says of one weight.

    Attributes:
        rows: its shape with inputs last.
        in_dim: the dimension that is the input in its own layout.
        dtype: of the weight where its values are quantised, else None.
    """

    rows: tuple[int, ...]
    in_dim: int
    dtype: torch.dtype | None = None


def compress(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Kept values and positions of a 2:4 weight.

    Args:
        rows: (..., I) with at most two non-zeros in every block of four.

    Returns:
        (..., I / 2) values in the weight's dtype, and (..., I / 2) uint8 positions, ascending within each block.

    Raises:
        ValueError: a block has more than two non-zeros.
    """
    blocks = rows.unflatten(-1, (-1, 4))
    if TWO_OF_FOUR.violations(rows).any():
        raise ValueError("a block has more than two non-zeros")
    positions = top2_mask(rows.float()).unflatten(-1, (-1, 4)).nonzero()[:, -1].view(*blocks.shape[:-1], 2)
    return blocks.gather(-1, positions).flatten(-2), positions.to(torch.uint8).flatten(-2)


def decompress(values: Tensor, positions: Tensor) -> Tensor:
    """The dense weight: (..., I / 2) values and positions -> (..., I), zeros are +0.0."""
    pairs, places = values.unflatten(-1, (-1, 2)), positions.long().unflatten(-1, (-1, 2))
    return values.new_zeros(*pairs.shape[:-1], 4).scatter_(-1, places, pairs).flatten(-2)


def pack_positions(positions: Tensor) -> Tensor:
    """(..., n) uint8 in 0..3 -> (..., ceil(n / 4)) uint8."""
    padded = torch.nn.functional.pad(positions, (0, -positions.shape[-1] % 4)).unflatten(-1, (-1, 4))
    return padded[..., 0] | padded[..., 1] << 2 | padded[..., 2] << 4 | padded[..., 3] << 6


def unpack_positions(packed: Tensor, count: int) -> Tensor:
    """Inverse of ``pack_positions``: the first ``count`` positions of each row."""
    return torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)[..., :count]


def check_kind(quantize: str | None) -> None:
    """Refuse other kinds of quantised values.

    Raises:
        UsageError: names those that there are.
    """
    if quantize not in (None, *KINDS):
        raise UsageError(
            f"`quantize` of compact weights must be {' or '.join(KINDS)}; got {quantize!r}.",
            "quantize",
        )


def quantise_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values as int8 codes with a scale per row; a zero has the code 0.

    Args:
        values: (..., n).

    Returns:
        (..., n) int8 codes, and (...,) float32 scales; of a row of zeros the scale is 1.

    Raises:
        ValueError: a value is not finite.
    """
    exact = values.float()
    if not exact.isfinite().all():
        raise ValueError("a weight is not finite")
    scales = exact.abs().amax(-1) / LARGEST
    scales = scales.where(scales > 0, 1.0)
    codes = (exact / scales[..., None]).round().clamp(-LARGEST, LARGEST)
    return codes.to(torch.int8), scales


def dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of ``quantise_rows``, but for what it rounds."""
    return (codes.float() * scales[..., None]).to(dtype)


def packed(name: str, rows: Tensor, quantize: str | None = None) -> dict[str, Tensor]:
    """The tensors that stand for a 2:4 weight in a file.

    Args:
        name: name of the weight.
        rows: (..., I) inputs last.
        quantize: None or int8.

    Raises:
        ValueError: a block has more than two non-zeros.
        RunError: a value is not finite and can't be quantised; names the weight.
    """
    values, positions = compress(rows)
    parts = {f"{name}.positions": pack_positions(positions).contiguous()}
    if quantize is not None:
        if not values.isfinite().all():
            raise RunError(f"{name} has NaN or infinite entries, which {quantize} has no values for.")
        values, scales = quantise_rows(values)
        parts[f"{name}.scales"] = scales.contiguous()
    return {f"{name}.values": values.contiguous(), **parts}


def index_entry(rows: Tensor, in_dim: int, quantize: str | None = None) -> dict[str, Any]:
    """What compact.json says of one weight, see ``Compact``."""
    dtype = {} if quantize is None else {"dtype": str(rows.dtype).removeprefix("torch.")}
    return {"rows": list(rows.shape), "in_dim": in_dim, **dtype}


def write_index(folder: Path, weights: dict[str, dict[str, Any]], quantize: str | None = None) -> None:
    """Write compact.json.

    Args:
        weights: name of every compact weight -> ``index_entry``.
        quantize: None or int8.
    """
    write_json(folder / INDEX, {"format": FORMATS[quantize], "weights": weights, "versions": versions()})


def is_compact(folder: Path | str) -> bool:
    return (Path(folder) / INDEX).is_file()


def compact_index(folder: Path) -> dict[str, Compact]:
    """Name of every compact weight -> what compact.json says of it.

    Raises:
        UsageError: the folder is of another version.
        RunError: the index is damaged.
    """
    try:
        index = read_json(folder / INDEX)
        if index["format"] not in FORMATS.values():
            known = " and ".join(map(repr, FORMATS.values()))
            raise UsageError(f"{folder / INDEX} has format {index['format']!r}; this version reads {known}.")
        quantised = index["format"] != FORMATS[None]
        return {
            name: Compact(tuple(w["rows"]), int(w["in_dim"]), DTYPES[w["dtype"]] if quantised else None)
            for name, w in index["weights"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise RunError(f"{folder / INDEX} is damaged ({error}); export the model again.") from error


def unpacked(values: Tensor, positions: Tensor, scales: Tensor | None, weight: Compact) -> Tensor:
    """The dense weight in its own layout: bit for bit, or of the quantised values.

    Raises:
        ValueError: the tensors do not make a weight of that shape.
    """
    rows = weight.rows
    if tuple(values.shape) != (*rows[:-1], rows[-1] // 2) or positions.dtype != torch.uint8:
        raise ValueError(f"values of shape {tuple(values.shape)} do not make a weight of {rows}")
    places = unpack_positions(positions, rows[-1] // 2)
    pairs = places.unflatten(-1, (-1, 2))
    if not (pairs[..., 0] < pairs[..., 1]).all():
        raise ValueError("positions of a block are not ascending")
    if scales is not None and weight.dtype is not None:
        if tuple(scales.shape) != rows[:-1] or values.dtype != torch.int8:
            raise ValueError(
                f"scales of shape {tuple(scales.shape)} and values of {values.dtype} do not belong together"
            )
        values = dequantise(values, scales, weight.dtype)
    return decompress(values, places).movedim(-1, weight.in_dim).contiguous()


def as_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor for the CPU kernels: bfloat16 as its uint16 bits."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
