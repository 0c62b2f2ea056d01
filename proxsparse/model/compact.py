"""The compact 2:4 store: two kept values per block and their positions, 9/16 of a dense 16-bit weight, bit for bit.

A folder in this form has config.json, the tokenizer, compact.json (which weights are compact, and their shapes) and
compact*.safetensors: for every pruned weight ``NAME.values`` (O, I / 2) and ``NAME.positions`` (O, ceil(I / 8)) uint8,
four 2-bit positions per byte, lowest first; every other tensor as it was. NAME is the one in the files of the base.
Rows have the input dimension last. Stacked experts are (E, O, ...).
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from proxsparse.errors import RunError, UsageError
from proxsparse.operator.pattern import TWO_OF_FOUR
from proxsparse.operator.prox import top2_mask
from proxsparse.record import read_json

FORMAT = "proxsparse-compact-1"
INDEX = "compact.json"


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


def packed(name: str, rows: Tensor) -> dict[str, Tensor]:
    """The two tensors that stand for a 2:4 weight in a file.

    Args:
        name: name of the weight.
        rows: (..., I) inputs last.

    Raises:
        ValueError: a block has more than two non-zeros.
    """
    values, positions = compress(rows)
    return {f"{name}.values": values.contiguous(), f"{name}.positions": pack_positions(positions).contiguous()}


def is_compact(folder: Path | str) -> bool:
    return (Path(folder) / INDEX).is_file()


def compact_index(folder: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Name of every compact weight -> (its shape with inputs last, the dimension that is the input).

    Raises:
        UsageError: the folder is of another version.
        RunError: the index is damaged.
    """
    try:
        index = read_json(folder / INDEX)
        if index["format"] != FORMAT:
            raise UsageError(f"{folder / INDEX} has format {index['format']!r}; this version reads {FORMAT!r}.")
        return {name: (tuple(w["rows"]), int(w["in_dim"])) for name, w in index["weights"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise RunError(f"{folder / INDEX} is damaged ({error}); export the model again.") from error


def unpacked(values: Tensor, positions: Tensor, rows: tuple[int, ...], in_dim: int) -> Tensor:
    """The dense weight in its own layout, bit for bit.

    Raises:
        ValueError: the two tensors do not make a weight of that shape.
    """
    if tuple(values.shape) != (*rows[:-1], rows[-1] // 2) or positions.dtype != torch.uint8:
        raise ValueError(f"values of shape {tuple(values.shape)} do not make a weight of {rows}")
    places = unpack_positions(positions, rows[-1] // 2)
    pairs = places.unflatten(-1, (-1, 2))
    if not (pairs[..., 0] < pairs[..., 1]).all():
        raise ValueError("positions of a block are not ascending")
    return decompress(values, places).movedim(-1, in_dim).contiguous()


def as_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor for the CPU kernels: bfloat16 as its uint16 bits."""
    tensor = tensor.contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
