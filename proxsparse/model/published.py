"""Masks that others publish as npz files: MaskLLM's and PATCH's layouts.

    MaskLLM   ``NAME.mask`` -> uint8, the bits of the whole weight, highest bit first; shapes are the model's
              (https://github.com/NVlabs/MaskLLM, tool_compress_mask.py)
    PATCH     ``NAME`` -> the same bits, ``NAME.__shape__`` -> the weight's shape, ``__meta__`` -> JSON
              (https://github.com/Paramathic/patch, scripts/release)

Files are read without pickle. Shapes: O = out_features, I = in_features; masks are bool, True = keep.
"""

import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from proxsparse.errors import RunError, UsageError
from proxsparse.model.prunable import find_prunable
from proxsparse.operator.pattern import Pattern

FILES = ("mask_compressed.npz", "mask.npz")  # as MaskLLM and PATCH name them
LAYOUT = "MaskLLM, or another method with its layout of files"
MASKED, SHAPE, META = ".mask", ".__shape__", "__meta__"
LENGTHS = (4, 8, 16, 2)  # of blocks that are looked for, in this order
KNOWN = ("repo", "base_model", "method", "variant", "sparsity", "pattern")  # of PATCH's JSON


@dataclass
class Published:
    """A mask from an npz file.

    Attributes:
        tensors: name of the weight -> bool tensor with the input dimension last.
        info: where it comes from: layout, method and what else the file says.
        base_model: the model that it was made for, where the file says so.
    """

    tensors: dict[str, Tensor]
    info: dict[str, Any] = field(default_factory=dict)
    base_model: str = ""

    @property
    def pattern(self) -> Pattern:
        """N:M where every block keeps the same number; else unstructured, as PATCH's mixed tiles are."""
        for m in LENGTHS:
            kept = {
                int(n)
                for mask in self.tensors.values()
                for n in ((mask.unflatten(-1, (-1, m)).sum(-1)).unique() if mask.shape[-1] % m == 0 else (-1,))
            }
            if len(kept) == 1 and 0 < (n := kept.pop()) < m:
                return Pattern.parse(f"{n}:{m}")
        entries = sum(mask.numel() for mask in self.tensors.values())
        removed = 1 - sum(int(mask.sum()) for mask in self.tensors.values()) / entries
        if not 0 < removed < 1:
            raise UsageError(
                f"The mask keeps {'everything' if removed == 0 else 'nothing'}: it prunes no model.", "mask"
            )
        return Pattern.parse("unstructured", removed)


def read_npz(path: Path, model: PreTrainedModel) -> Published:
    """Read a published mask.

    Args:
        path: the npz file.
        model: the model that it is for, which says shapes and where inputs lie; it may have no values.

    Raises:
        UsageError: the layout is another one, or the mask is for another model.
        RunError: the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            bits, shapes, info = _taken_apart(path, {key: file[key] for key in file.files})
    except UsageError:
        raise
    except (zipfile.BadZipFile, zlib.error, ValueError, KeyError, EOFError, TypeError) as error:
        raise RunError(f"The mask file {path} is damaged, or holds more than arrays ({error}).") from error
    targets = {target.name: target for target in find_prunable(model, multiple=1)}
    made_for, given = info.pop("base_model", ""), model.config._name_or_path or "the model"
    refusal = f"The mask {path} does not fit {given}: "
    tensors = {}
    for name, packed in bits.items():
        target = targets.get(name)
        if target is None:
            raise UsageError(f"{refusal}it has the weight {name}, which is not among those that are pruned.", "mask")
        shape = tuple(target.weight.shape)
        said = shapes.get(name, shape)
        if said != shape or packed.size != -(-prod(shape) // 8):
            what = f"shape {said}" if said != shape else f"{8 * packed.size} bits"
            raise UsageError(f"{refusal}{name} has {what} in the mask and shape {shape} in the model.", "mask")
        flat = np.unpackbits(packed, count=prod(shape)).astype(bool)
        tensors[name] = target.rows(torch.from_numpy(flat).view(shape)).contiguous()
    return Published(tensors, info, made_for)


def _taken_apart(
    path: Path, arrays: Mapping[str, NDArray[Any]]
) -> tuple[dict[str, NDArray[Any]], dict[str, tuple[int, ...]], dict[str, Any]]:
    """Weight -> packed bits, weight -> shape where the file says it, and what it says of itself."""
    bits = {key: array for key, array in arrays.items() if key != META and not key.endswith(SHAPE)}
    shapes = {
        key.removesuffix(SHAPE): tuple(int(size) for size in array)
        for key, array in arrays.items()
        if key.endswith(SHAPE)
    }
    packed = all(array.dtype == np.uint8 and array.ndim == 1 for array in bits.values())
    if bits and packed and all(MASKED in key for key in bits) and not shapes:
        return {key.replace(MASKED, ""): array for key, array in bits.items()}, {}, {"method": LAYOUT}
    if bits and packed and shapes.keys() == bits.keys():
        meta = json.loads(str(arrays[META])) if META in arrays else {}
        found = {key: meta[key] for key in KNOWN if key in meta}
        return bits, shapes, {"method": "PATCH"} | found
    first = ", ".join(sorted(arrays)[:3]) or "none"
    raise UsageError(
        f"{path} is an npz file in an unknown layout (its first entries are {first}): "
        "MaskLLM's has NAME.mask for every weight, and PATCH's has NAME and NAME.__shape__.",
        "mask",
    )
