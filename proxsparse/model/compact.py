"""The compact store of N:M weights: N kept values per block of M and their positions, bit for bit.

A folder in this form has config.json, the tokenizer, compact.json (which weights are compact, and their shapes) and
compact*.safetensors: for every pruned weight ``NAME.values`` (O, I N / M) and ``NAME.positions`` (O, ceil(I / 8))
uint8; every other tensor as it was. NAME is the one in the files of the base. Rows have the input dimension last.
Stacked experts are (E, O, ...). The positions of 2:4 weights have 2 bits, four to a byte, lowest first. Those of other
patterns are the mask, one bit per weight, lowest first. M is 2, 4, 8 or 16. 2:4, 4:8 and 8:16 take 9/16 of a dense
16-bit weight.

With int8 values they take 5/16 of it. ``NAME.values`` are int8 codes then, and ``NAME.scales`` (O,) float32: a weight
is its code times the scale of its row, rounded to the dtype that compact.json names. The largest weight of a row has
the code 127 or -127. So a weight that was read and is quantised again gets the same codes.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from proxsparse.errors import RunError, UsageError
from proxsparse.operator.pattern import TWO_OF_FOUR, Pattern
from proxsparse.operator.prox import top2_mask
from proxsparse.record import read_json, versions, write_json

KINDS = ("int8",)  # of quantised values
FORMATS = {None: "proxsparse-compact-1", "int8": "proxsparse-compact-int8-1"}  # of 2:4
ANY_FORMATS = {None: "proxsparse-compact-nm-1", "int8": "proxsparse-compact-nm-int8-1"}  # which name their pattern
LENGTHS = (2, 4, 8, 16)  # of a block
MOST = 0.75  # of a block that is kept: with more, this form hardly gets smaller
INDEX = "compact.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALLEST = 2.0**-149  # positive number of float32
NUMBERS = {1: "one", 2: "two"}
LARGEST = 127  # code: -128 is not used, so that codes are symmetric around zero


class Compact(NamedTuple):
    """What compact.json says of one weight.

    Attributes:
        rows: its shape with inputs last.
        in_dim: the dimension that is the input in its own layout.
        dtype: of the weight where its values are quantised, else None.
        pattern: N:M.
    """

    rows: tuple[int, ...]
    in_dim: int
    dtype: torch.dtype | None = None
    pattern: Pattern = TWO_OF_FOUR


def check_pattern(pattern: Pattern, most: float = MOST) -> None:
    """Refuse patterns that have no compact form.

    Args:
        most: share of a block that may be kept.

    Raises:
        UsageError: says which ones there are.
    """
    if not pattern.n or pattern.m not in LENGTHS or pattern.n > most * pattern.m:
        raise UsageError(
            f"The compact form holds N:M weights with an M of 2, 4, 8 or 16, and an N of at most three quarters of it; "
            f"not {pattern}.",
            "form",
        )


def pattern_of(rows: Tensor) -> Pattern | None:
    """The sparsest pattern that the zeros of a weight (..., I) have; of equal ones, the shortest.

    None: the weight has no non-zeros, or keeps more than three quarters of any block, so that the compact form would
    hardly be smaller.
    """
    found = []
    for m in LENGTHS:
        if rows.numel() and rows.shape[-1] % m == 0:
            most = int((rows.unflatten(-1, (-1, m)) != 0).sum(-1).max())
            found += [Pattern(most, m, 1 - most / m)] if 0 < most <= MOST * m else []
    return max(found, key=lambda pattern: pattern.ratio, default=None)


def compress(rows: Tensor, pattern: Pattern = TWO_OF_FOUR) -> tuple[Tensor, Tensor]:
    """Kept values and positions of an N:M weight.

    Args:
        rows: (..., I) with at most N non-zeros in every block of M.
        pattern: N:M.

    Returns:
        (..., I N / M) values in the weight's dtype, and as many uint8 positions, ascending within each block.

    Raises:
        ValueError: a block has more than N non-zeros.
    """
    kept = rows != 0
    counts = kept.unflatten(-1, (-1, pattern.m)).sum(-1)
    if (counts > pattern.n).any():
        raise ValueError(f"a block has more than {NUMBERS.get(pattern.n, pattern.n)} non-zeros")
    if (counts < pattern.n).any():
        # Pruned weights are +0.0, so a -0.0 was kept: it goes before them, and after every other weight.
        signed = ((rows != 0) | rows.signbit()).unflatten(-1, (-1, pattern.m))
        signed &= signed.sum(-1, keepdim=True) <= pattern.n
        scores = rows.float().abs().masked_fill(signed.flatten(-2) & ~kept, SMALLEST)
        kept = top2_mask(scores) if pattern == TWO_OF_FOUR else pattern.mask(scores)
    shape = (*rows.shape[:-1], rows.shape[-1] // pattern.m * pattern.n)
    positions = kept.flatten().nonzero().view(-1) % pattern.m
    return rows[kept].view(shape), positions.to(torch.uint8).view(shape)


def decompress(values: Tensor, positions: Tensor, pattern: Pattern = TWO_OF_FOUR) -> Tensor:
    """The dense weight: (..., I N / M) values and positions -> (..., I), zeros are +0.0."""
    kept, places = values.unflatten(-1, (-1, pattern.n)), positions.long().unflatten(-1, (-1, pattern.n))
    return values.new_zeros(*kept.shape[:-1], pattern.m).scatter_(-1, places, kept).flatten(-2)


def pack_positions(positions: Tensor, pattern: Pattern = TWO_OF_FOUR) -> Tensor:
    """Positions as a file holds them: (..., I N / M) uint8 -> (..., ceil(I / 8)) uint8."""
    if pattern == TWO_OF_FOUR:
        padded = torch.nn.functional.pad(positions, (0, -positions.shape[-1] % 4)).unflatten(-1, (-1, 4))
        return padded[..., 0] | padded[..., 1] << 2 | padded[..., 2] << 4 | padded[..., 3] << 6
    kept = decompress(torch.ones_like(positions), positions, pattern).numpy()
    return torch.from_numpy(np.packbits(kept, axis=-1, bitorder="little"))


def unpack_positions(packed: Tensor, width: int, pattern: Pattern = TWO_OF_FOUR) -> Tensor:
    """Inverse of ``pack_positions``, for a weight of so many inputs.

    Raises:
        ValueError: a block does not keep N of M, or its positions are not ascending.
    """
    if pattern == TWO_OF_FOUR:
        found = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(-2)[..., : width // 2]
        pairs = found.unflatten(-1, (-1, 2))
        if not (pairs[..., 0] < pairs[..., 1]).all():
            raise ValueError("positions of a block are not ascending")
        return found
    bits = np.unpackbits(packed.contiguous().numpy(), axis=-1, count=width, bitorder="little")
    blocks = torch.from_numpy(bits).unflatten(-1, (-1, pattern.m))
    if not (blocks.sum(-1) == pattern.n).all():
        raise ValueError(f"a block does not keep {pattern.n} of {pattern.m}")
    return blocks.nonzero()[:, -1].to(torch.uint8).view(*packed.shape[:-1], width // pattern.m * pattern.n)


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


def packed(name: str, rows: Tensor, quantize: str | None = None, pattern: Pattern = TWO_OF_FOUR) -> dict[str, Tensor]:
    """The tensors that stand for an N:M weight in a file.

    Args:
        name: name of the weight.
        rows: (..., I) inputs last.
        quantize: None or int8.
        pattern: N:M.

    Raises:
        ValueError: a block has more than N non-zeros.
        RunError: a value is not finite and can't be quantised; names the weight.
    """
    values, positions = compress(rows, pattern)
    parts = {f"{name}.positions": pack_positions(positions, pattern).contiguous()}
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


def write_index(
    folder: Path, weights: dict[str, dict[str, Any]], quantize: str | None = None, pattern: Pattern = TWO_OF_FOUR
) -> None:
    """Write compact.json.

    Args:
        weights: name of every compact weight -> ``index_entry``.
        quantize: None or int8.
        pattern: N:M.
    """
    if pattern == TWO_OF_FOUR:
        head = {"format": FORMATS[quantize]}
    else:
        head = {"format": ANY_FORMATS[quantize], "pattern": str(pattern)}
    write_json(folder / INDEX, head | {"weights": weights, "versions": versions()})


def is_compact(folder: Path | str) -> bool:
    return (Path(folder) / INDEX).is_file()


def compact_index(folder: Path) -> dict[str, Compact]:
    """Name of every compact weight -> what compact.json says of it.

    Raises:
        UsageError: the folder is of another version.
        RunError: the index is damaged.
    """
    formats = [*FORMATS.values(), *ANY_FORMATS.values()]
    try:
        index = read_json(folder / INDEX)
        known = index["format"] in formats
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{folder / INDEX} is damaged ({error}); export the model again.") from error
    if not known:
        names = ", ".join(map(repr, formats))
        raise UsageError(f"{folder / INDEX} has format {index['format']!r}; this version reads {names}.")
    try:
        quantised = index["format"] in (FORMATS["int8"], ANY_FORMATS["int8"])
        pattern = TWO_OF_FOUR if index["format"] in FORMATS.values() else Pattern.of_blocks(index["pattern"])
        check_pattern(pattern, most=1)  # older versions wrote those as well
        return {name: _described(weight, quantised, pattern) for name, weight in index["weights"].items()}
    except (UsageError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{folder / INDEX} is damaged ({error}); export the model again.") from error


def _described(entry: dict[str, Any], quantised: bool, pattern: Pattern) -> Compact:
    """What compact.json says of one weight; ValueError where that can't be."""
    rows, dim = tuple(entry["rows"]), entry["in_dim"]
    if not rows or not all(isinstance(size, int) and size > 0 for size in rows) or rows[-1] % pattern.m:
        raise ValueError(f"a weight of shape {list(rows)} is not {pattern}")
    if not isinstance(dim, int) or not 0 <= dim < len(rows):
        raise ValueError(f"a weight of shape {list(rows)} has no dimension {dim}")
    return Compact(rows, dim, DTYPES[entry["dtype"]] if quantised else None, pattern)


def unpacked(values: Tensor, positions: Tensor, scales: Tensor | None, weight: Compact) -> Tensor:
    """The dense weight in its own layout: bit for bit, or of the quantised values.

    Raises:
        ValueError: the tensors do not make a weight of that shape.
    """
    rows, pattern = weight.rows, weight.pattern
    if tuple(values.shape) != (*rows[:-1], rows[-1] // pattern.m * pattern.n) or positions.dtype != torch.uint8:
        raise ValueError(f"values of shape {tuple(values.shape)} do not make a weight of {rows}")
    if tuple(positions.shape) != (*rows[:-1], -(-rows[-1] // 8)):
        raise ValueError(f"positions of shape {tuple(positions.shape)} do not belong to a weight of {rows}")
    places = unpack_positions(positions, rows[-1], pattern)
    if scales is not None and weight.dtype is not None:
        if tuple(scales.shape) != rows[:-1] or values.dtype != torch.int8:
            raise ValueError(
                f"scales of shape {tuple(scales.shape)} and values of {values.dtype} do not belong together"
            )
        values = dequantise(values, scales, weight.dtype)
    return decompress(values, places, pattern).movedim(-1, weight.in_dim).contiguous()


def as_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor for the CPU kernels: bfloat16 as its uint16 bits."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
