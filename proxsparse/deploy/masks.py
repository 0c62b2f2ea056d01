"""The mask alone, to publish next to a base model: our file with a hash of every weight's mask, or MaskLLM's npz.

npz is the form in which MaskLLM publishes masks (https://github.com/NVlabs/MaskLLM, tool_compress_mask.py).
"""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from proxsparse.errors import UsageError, doing
from proxsparse.mask import MASK_FILE, Mask, save_mask
from proxsparse.model.prunable import Prunable
from proxsparse.record import atomic_path, versions, write_json

RECORD_FILE, NPZ_FILE = "mask.json", "mask_compressed.npz"


def save_hashed(mask: Mask, folder: Path | str, card: str) -> None:
    """Write the mask file, and a JSON file with its pattern, its settings and a SHA-256 of every weight's mask.

    The folder appears complete or not at all.

    Args:
        card: text of README.md.
    """
    hashes = {name: hashlib.sha256(kept.numpy().tobytes()).hexdigest() for name, kept in mask.tensors.items()}
    record = {"pattern": str(mask.pattern), "base_model": mask.base_model, "info": mask.info, "sha256": hashes}
    with _new_folder(folder, card) as scratch:
        save_mask(mask, scratch / MASK_FILE)
        write_json(scratch / RECORD_FILE, record | {"versions": versions()})


def save_npz(mask: Mask, targets: dict[str, Prunable], folder: Path | str, card: str) -> None:
    """Write a mask as MaskLLM's programs read it: ``NAME.mask`` -> bits of the whole weight, highest bit first.

    The folder appears complete or not at all.

    Args:
        targets: the weights of the mask by name, see ``proxsparse.mask.fit_mask``; the bits follow the parameter's own
            layout, not inputs last.
        card: text of README.md.

    Raises:
        UsageError: the mask is for another order of the channels, which this form has no place for.
    """
    if mask.order:
        raise UsageError(
            "The mask is for another order of the model's channels, which the form npz can't hold: use `form=mask`, or "
            "make the mask with `permute=none`.",
            "form",
        )
    packed: dict[str, Any] = {}
    for name, kept in mask.tensors.items():
        own_layout = kept.movedim(-1, targets[name].in_dim)
        packed[f"{name}.mask"] = np.packbits(own_layout.contiguous().numpy().reshape(-1))
    with _new_folder(folder, card) as scratch:
        np.savez_compressed(scratch / NPZ_FILE, **packed)


@contextlib.contextmanager
def _new_folder(folder: Path | str, card: str) -> Iterator[Path]:
    with doing(f"writing {folder}"), atomic_path(folder) as scratch:
        scratch.mkdir()
        yield scratch
        (scratch / "README.md").write_text(card, encoding="utf-8")
