"""Checkpoints of compressed-tensors in the dense layout: codes of 8 or 4 bits, with scales.

``NAME`` holds int8 or float8 codes (O, I) and ``NAME_scale`` one number per row (O, 1) or one for all. Codes of 4 bits
lie eight to an int32 in ``NAME_packed``; ``NAME_shape`` is (O, I), and there is a scale per group of neighbouring
inputs (O, G). A weight is its code times its scale, so a zero is exactly zero. Such weights are rounded, so they are
checked here but never pruned.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from proxsparse.errors import RunError
from proxsparse.model.checkpoint import Checkpoint, Stored
from proxsparse.model.quantised import quantisation, scheme_of

PACKED_FORMAT = "pack-quantized"
FORMATS = ("int-quantized", "float-quantized", "naive-quantized", PACKED_FORMAT)
SCALE, ZERO_POINT, PACKED, SHAPE = "_scale", "_zero_point", "_packed", "_shape"  # after the name of a weight
CODES = (torch.int8, torch.float8_e4m3fn)
BITS = 4  # of packed codes


def is_coded(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that the weights are codes in this layout."""
    entry = quantisation(config)
    if entry is None or scheme_of(entry) != "compressed-tensors" or entry.get("format") not in FORMATS:
        return False
    groups = entry.get("config_groups", {}).values()
    return entry["format"] != PACKED_FORMAT or all(group["weights"]["num_bits"] == BITS for group in groups)


def coded_tensors(checkpoint: Checkpoint) -> dict[str, Stored]:
    """The tensors of such a checkpoint as plain numbers, by their names in the files.

    Raises:
        RunError: codes are without scales, or not symmetric around zero.
    """
    raw = checkpoint.raw
    shifted = next((name for name in raw if name.endswith(ZERO_POINT)), None)
    if shifted is not None:
        raise RunError(f"{checkpoint.name} is quantised around another point than zero ({shifted}): not read here.")

    def plain(name: str, codes: Stored) -> Stored:
        def read() -> Tensor:
            found = codes.read()
            if found.dtype not in CODES:
                return found
            if name + SCALE not in raw:
                raise RunError(f"{checkpoint.name} lacks the scales of {name}; export it again.")
            scale = raw[name + SCALE].read()
            return (found.float() * scale.float()).to(scale.dtype)

        return Stored(codes.shape, codes.file, read)

    def unpacked(name: str) -> Stored:
        packed, scale = raw[name + PACKED], raw.get(name + SCALE)
        columns = packed.shape[1] * 32 // BITS
        if scale is None or len(scale.shape) != 2 or columns % scale.shape[1]:
            raise RunError(f"{checkpoint.name} lacks the scales of {name}; export it again.")

        def read() -> Tensor:
            from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

            scales = scale.read()
            codes = unpack_from_int32(packed.read(), BITS, torch.Size((packed.shape[0], columns)))
            return (codes.float() * scales.float().repeat_interleave(columns // scales.shape[1], 1)).to(scales.dtype)

        return Stored((packed.shape[0], columns), packed.file, read)

    scales = {name + SCALE for name in raw}
    codes = [name.removesuffix(PACKED) for name in raw if name.endswith(f"weight{PACKED}")]
    beside = {name + ending for name in codes for ending in (PACKED, SCALE, SHAPE)} | scales
    whole = {name: plain(name, stored) for name, stored in raw.items() if name not in beside}
    return whole | {name: unpacked(name) for name in codes}
