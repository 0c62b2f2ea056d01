"""Checkpoints of compressed-tensors in the dense layout: 8-bit codes, of which every row has a scale.

``NAME`` holds int8 or float8 codes (O, I) and ``NAME_scale`` one number per row (O, 1) or one for all. A weight is its
code times its scale, so a zero is exactly zero. Such weights are rounded, so they are checked here but never pruned.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from proxsparse.errors import RunError
from proxsparse.model.checkpoint import Checkpoint, Stored
from proxsparse.model.quantised import quantisation, scheme_of

FORMATS = ("int-quantized", "float-quantized", "naive-quantized")
SCALE, ZERO_POINT = "_scale", "_zero_point"  # after the name of a weight
CODES = (torch.int8, torch.float8_e4m3fn)


def is_coded(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that the weights are codes in this layout."""
    entry = quantisation(config)
    return entry is not None and scheme_of(entry) == "compressed-tensors" and entry.get("format") in FORMATS


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

    scales = {name + SCALE for name in raw}
    return {name: plain(name, stored) for name, stored in raw.items() if name not in scales}
