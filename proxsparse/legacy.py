"""Forms that other programs read, for those who still run them.

sparse24: 'sparse-24-bitmask' of compressed-tensors, read up to its release 0.14 (vLLM up to 0.18); support was removed
afterwards (compressed-tensors pull request 610, vLLM 36799).
npz: the mask as MaskLLM publishes it (https://github.com/NVlabs/MaskLLM, tool_compress_mask.py).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from proxsparse.compact import save_tensors
from proxsparse.errors import UsageError
from proxsparse.mask import Mask, crowded
from proxsparse.prox_op import top2_mask
from proxsparse.prunable import Prunable, find_prunable
from proxsparse.record import atomic_path, read_json, write_json

NPZ_FILE = "mask_compressed.npz"


def save_sparse24(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> None:
    """Write a 2:4 model for compressed-tensors <= 0.14: ``.compressed``, ``.bitmask`` and ``.shape`` of every weight.

    Raises:
        UsageError: a weight is not 2:4, or is none of nn.Linear, which the format is limited to.
    """
    state, pruned = model.state_dict(), set()
    for target in find_prunable(model):
        rows = state.pop(target.name)
        if not isinstance(target.module, nn.Linear):
            raise UsageError(f"--form sparse24 holds weights of nn.Linear; {target.name} is none. Use --form dense.")
        if crowded(rows).any():
            raise UsageError(f"{target.name} is not 2:4, which --form sparse24 needs.")
        kept, prefix = top2_mask(rows.float()), target.name.removesuffix(".weight")
        bits = np.packbits(kept.numpy(), axis=-1, bitorder="little")
        state[f"{prefix}.compressed"] = rows[kept].view(len(rows), -1)
        state[f"{prefix}.bitmask"] = torch.from_numpy(bits)
        state[f"{prefix}.shape"] = torch.tensor(rows.shape).view(-1, 1)
        pruned.add(prefix)
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in pruned]
    sparsity = {
        "format": "sparse-24-bitmask",
        "sparsity_structure": "2:4",
        "global_sparsity": 0.5,
        "targets": ["Linear"],
        "ignore": others,
        "registry_requires_subclass": False,
    }
    with atomic_path(folder) as scratch:
        save_tensors(state, model, tokenizer, scratch)
        settings = read_json(scratch / "config.json")
        settings["quantization_config"] = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
        write_json(scratch / "config.json", settings)


def save_npz(mask: Mask, targets: dict[str, Prunable], folder: Path | str) -> None:
    """Write a mask as MaskLLM's programs read it: ``NAME.mask`` -> bits of the whole weight, highest bit first.

    Args:
        targets: prunable weights by name; the bits follow the parameter's own layout, not inputs last.

    Raises:
        UsageError: the mask names a weight that the model lacks.
    """
    packed: dict[str, Any] = {}
    for name, kept in mask.tensors.items():
        if name not in targets:
            raise UsageError(f"The mask has {name}, which the model lacks.")
        own_layout = kept.movedim(-1, targets[name].in_dim)
        packed[f"{name}.mask"] = np.packbits(own_layout.contiguous().numpy().reshape(-1))
    with atomic_path(folder) as scratch:
        scratch.mkdir()
        np.savez_compressed(scratch / NPZ_FILE, **packed)
