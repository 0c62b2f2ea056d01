"""Masks: taken from learned weights, stored with one bit per weight, checked, and applied to original weights.

A mask file is a safetensors file with one uint8 tensor per weight matrix. Bits are packed along the input dimension
(``numpy.packbits``, little-endian), so a matrix of (O, I), inputs last, takes (O, ceil(I / 8)) bytes. The metadata says
which model the mask belongs to. Names are those of ``model.named_parameters()``. A mask that was made for another order
of the channels holds that order too (``proxsparse.model.channels``), as int32 tensors.

Shapes: O = out_features, I = in_features; experts are (E, O, I). Masks are bool, True = keep.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from transformers import PreTrainedModel

from proxsparse.errors import RunError, UsageError
from proxsparse.model.channels import ChannelOrder, mark, order_of, put_into_order, recall_order
from proxsparse.model.compact import pattern_of
from proxsparse.model.hub import commit_of, noted_of
from proxsparse.model.prunable import Prunable, check_model, find_prunable
from proxsparse.model.published import FILES, read_npz
from proxsparse.model.sharding import gather, local
from proxsparse.model.source import name_of
from proxsparse.operator.masked import learned_mask
from proxsparse.operator.pattern import TWO_OF_FOUR, Pattern
from proxsparse.record import atomic_path, versions

FORMAT, ORDERED = "proxsparse-mask-1", "proxsparse-mask-2"  # the second one where channels have another order
ORDER = "channel_order."  # before the names of its tensors
MASK_FILE = "mask.safetensors"


@dataclass
class Mask:
    """A mask of a whole model.

    Attributes:
        tensors: name of the weight -> bool tensor with the input dimension last, True = keep.
        pattern: the pattern of every weight's mask; text such as '2:4' is parsed.
        base_model: the original model, for which the mask was made.
        info: where the mask comes from: method, settings and the like.
        order: of the model's channels that the mask was made for; empty: as they are.
    """

    tensors: dict[str, Tensor]
    pattern: Pattern = TWO_OF_FOUR
    base_model: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    order: ChannelOrder = field(default_factory=ChannelOrder)

    def __post_init__(self) -> None:
        if isinstance(self.pattern, str):
            self.pattern = Pattern.parse(self.pattern)
        for name, tensor in self.tensors.items():
            if not torch.is_tensor(tensor) or tensor.dtype != torch.bool:
                found = tensor.dtype if torch.is_tensor(tensor) else type(tensor).__name__
                raise UsageError(f"A mask is made of bool tensors; got {found} for {name}.", "mask")

    def density(self) -> float:
        """Share of weights kept."""
        kept = sum(int(m.sum()) for m in self.tensors.values())
        return kept / max(1, sum(m.numel() for m in self.tensors.values()))


def extract_mask(
    weights: Mapping[str, Tensor],
    targets: list[Prunable],
    scales: Mapping[str, Tensor] | None = None,
    pattern: Pattern = TWO_OF_FOUR,
) -> Mask:
    """Take the mask from learned weights: it keeps the n largest scores of every block of m.

    Args:
        weights: name -> learned weight, in the parameter's own layout.
        targets: the prunable weights.
        scales: name -> (I,) norms of the inputs that the weights were learned with, or None to compare magnitudes.
        pattern: N:M.

    Returns:
        The mask. Under FSDP2 every process must call this; each passes the scales of its own stacked experts. The first
        process gets the mask, the others an empty one.

    Raises:
        RunError: a learned weight has NaN or infinite entries.
    """
    tensors = {}
    for target in targets:
        weight = weights[target.name]
        rows = target.rows(local(weight)).float()
        if not rows.isfinite().all():
            raise RunError(f"The learned weight {target.name} has NaN or infinite entries; the run diverged.")
        kept = learned_mask(rows, pattern, None if scales is None else scales[target.name])
        whole = gather(kept, weight)
        if whole is not None:
            tensors[target.name] = whole.cpu()
    return Mask(tensors, pattern)


def noted_pattern(noted: Mapping[str, Any]) -> Pattern | None:
    """The pattern among what ``save_pruned`` noted of a checkpoint; None: it noted none."""
    return Pattern.parse(noted["pattern"]) if "pattern" in noted else None


def pattern_of_zeros(targets: Iterable[Prunable]) -> Pattern:
    """The N:M that the weights of a model have, where all that are sparse have the same; else 2:4."""
    found = {pattern_of(target.rows(target.weight.detach())) for target in targets} - {None}
    return (len(found) == 1 and found.pop()) or TWO_OF_FOUR


def mask_of_pruned(model: PreTrainedModel, pattern: Pattern | str | None = None) -> Mask:
    """The mask of a model that is pruned already, taken from its zeros.

    A weight that has dense blocks everywhere counts as left out. A block with fewer than N non-zeros keeps its
    non-zeros, and the first of its zeros. Of a model that ``save_pruned`` wrote, the mask knows base and method too.

    Args:
        pattern: N:M. None: what ``save_pruned`` noted, or else what all sparse weights have, or else 2:4.

    Raises:
        UsageError: no weight has the pattern, or one has it in most of its blocks only; or the model is sharded.
    """
    check_model(model)
    base, tensors = model.config._name_or_path, {}
    name, noted = base or "the model", noted_of(base, commit_of(model))  # a model made in memory has no folder
    if any(local(p) is not p for p in model.parameters()):
        raise UsageError("The model is sharded: take the mask from its zeros before that.", "model")
    recall_order(model)
    targets = find_prunable(model, multiple=1)
    given = None if pattern is None else Pattern.of_blocks(pattern)
    wanted = given or noted_pattern(noted) or pattern_of_zeros(targets)
    if not wanted.is_nm:
        raise UsageError(f"{name} was pruned to {wanted}, which its zeros do not tell: give its mask.", "mask")
    for target in targets:
        rows = target.rows(target.weight.detach())
        if rows.shape[-1] % wanted.m:
            continue
        wrong = wanted.violations(rows)
        if not wrong.any():
            tensors[target.name] = learned_mask(rows, wanted).cpu()
        elif wrong.sum() < 0.5 * wrong.numel():
            raise UsageError(
                f"{name} is not {wanted}: {int(wrong.sum())} of {wrong.numel()} blocks of {target.name} have more than "
                f"{wanted.n} non-zeros. Give its mask.",
                "mask",
            )
    if not tensors:
        raise UsageError(f"No weight of {name} is {wanted}: give a pruned model, or a mask.", "mask")
    return Mask(tensors, wanted, noted.get("base_model") or base, noted.get("info") or {}, order_of(model))


def save_mask(mask: Mask, path: Path | str) -> None:
    """Write a mask file. It appears whole or not at all.

    Args:
        mask: the mask.
        path: the file to write, for example mask.safetensors.

    Raises:
        UsageError: the mask is no ``Mask``.
        RunError: the mask does not have the pattern it claims.
    """
    _check_mask(mask)
    packed, shapes = {}, {}
    for name, tensor in mask.tensors.items():
        mask.pattern.check(tensor, name)
        # Contiguous, because safetensors writes memory in its own order, and masks of Conv1D weights are transposed.
        packed[name] = np.ascontiguousarray(np.packbits(tensor.numpy(), axis=-1, bitorder="little"))
        shapes[name] = list(tensor.shape)
    packed |= {f"{ORDER}{key}": index.numpy() for key, index in mask.order.packed().items()}
    # One entry only: safetensors writes several in random order, and the same mask should give the same bytes.
    metadata = {
        "format": ORDERED if mask.order else FORMAT,
        "pattern": str(mask.pattern),
        "base_model": mask.base_model,
        "shapes": shapes,
        "info": mask.info,
        "versions": versions(),
    } | ({"channel_order": mask.order.described(), "channel_order_note": mask.order.note} if mask.order else {})
    with atomic_path(path) as scratch:
        save_file(packed, str(scratch), metadata={"proxsparse": json.dumps(metadata, default=str)})


def load_mask(path: Path | str, model: PreTrainedModel | None = None) -> Mask:
    """Read a mask file, and check that it is complete, packed as its shapes say, and of the pattern it claims.

    Args:
        path: the file, or the folder that it lies in. Also an npz file in MaskLLM's or PATCH's layout, see
            ``proxsparse.model.published``.
        model: the model that the mask is for, with or without values; needed for an npz file only.

    Raises:
        UsageError: there is no such file, it is not a mask file, or an npz file does not fit the model.
        RunError: the file is damaged.
    """
    path = mask_file(path)
    if path.suffix.lower() == ".npz":
        if model is None:
            raise UsageError(
                f"{path} does not say how its weights lie: pass the model, load_mask(path, model).", "mask"
            )
        found = read_npz(path, model)
        return Mask(found.tensors, found.pattern, found.base_model, found.info)
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = json.loads((file.metadata() or {}).get("proxsparse", "{}"))
            if not isinstance(metadata, dict) or metadata.get("format") not in (FORMAT, ORDERED):
                raise UsageError(f"{path} is a safetensors file, but not a mask written by proxsparse.", "mask")
            shapes, info = dict(metadata["shapes"]), dict(metadata["info"])
            pattern, base_model = Pattern.parse(str(metadata["pattern"])), str(metadata["base_model"])
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            indices = {n[len(ORDER) :]: torch.from_numpy(packed.pop(n)) for n in list(packed) if n.startswith(ORDER)}
            order = ChannelOrder.unpacked(metadata.get("channel_order", []), indices)
            order.note = str(metadata.get("channel_order_note", ""))
    except UsageError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"The mask file {path} is damaged ({error}); copy or extract it again.") from error
    if set(shapes) != set(packed) or not packed:
        raise RunError(f"The mask file {path} is damaged: its tensors and its list of shapes differ.")
    tensors = {}
    for name, bits in packed.items():
        shape = shapes[name]
        sound = (
            isinstance(shape, list)
            and shape
            and all(isinstance(size, int) and size > 0 for size in shape)
            and bits.dtype == np.uint8
            and list(bits.shape) == [*shape[:-1], -(-shape[-1] // 8)]
        )
        if not sound:
            raise RunError(f"The mask file {path} is damaged: {name} is not packed as its shape {shape} says.")
        unpacked = np.unpackbits(bits, axis=-1, count=shape[-1], bitorder="little").astype(bool)
        tensors[name] = torch.from_numpy(unpacked)
        pattern.check(tensors[name], name)
    return Mask(tensors, pattern, base_model, info, order)


def mask_file(path: Path | str) -> Path:
    """The file of a mask: itself, or the one in a folder.

    Raises:
        UsageError: there is none.
    """
    path = Path(name_of(path, "mask"))
    if path.is_dir():
        published = [path / name for name in FILES if (path / name).is_file()]
        path = published[0] if published and not (path / MASK_FILE).is_file() else path / MASK_FILE
    if not path.is_file():
        raise UsageError(f"There is no file {path}; give a mask file, or the folder of a run.", "mask")
    return path


def _check_mask(mask: Any) -> None:
    if not isinstance(mask, Mask):
        raise UsageError(f"`mask` must be a Mask, as load_mask returns; got {type(mask).__name__}.", "mask")


def fit_mask(model: PreTrainedModel, mask: Mask) -> dict[str, Prunable]:
    """The weights of a model that a mask prunes, by name.

    Raises:
        UsageError: the mask is no ``Mask``, or belongs to a model with other weights; the message names what differs.
    """
    _check_mask(mask)
    targets = {t.name: t for t in find_prunable(model, multiple=1) if t.name in mask.tensors}
    made_for, given = mask.base_model or "an unnamed model", model.config._name_or_path or "the model"
    refusal = f"The mask was made for {made_for} and does not fit {given}: "
    unknown = [name for name in mask.tensors if name not in targets]
    if unknown:
        raise UsageError(f"{refusal}it has {len(unknown)} weights the model lacks, the first is {unknown[0]}.")
    for name, target in targets.items():
        shape, expected = tuple(mask.tensors[name].shape), tuple(target.rows(target.weight).shape)
        if shape != expected:
            raise UsageError(f"{refusal}{name} has shape {shape} in the mask and {expected} in the model.")
    return targets


def apply_mask(model: PreTrainedModel, mask: Mask) -> list[Prunable]:
    """Set the pruned weights of a model to exactly +0.0, in place; kept weights keep their bits.

    Where the mask was made for another order of the channels, the model is put into it first. It computes the same.

    Args:
        model: the model that the mask was made for.
        mask: which weights to keep.

    Returns:
        The weights that were pruned.

    Raises:
        UsageError: the mask belongs to a model with other weights; names what differs.
    """
    targets = fit_mask(model, mask)
    take_order(model, mask, targets)
    with torch.no_grad():
        for name, target in targets.items():
            rows = target.rows(target.weight)
            rows.masked_fill_(~mask.tensors[name].to(rows.device), 0.0)
    return list(targets.values())


def take_order(model: PreTrainedModel, mask: Mask, targets: Mapping[str, Prunable]) -> None:
    """Put a model's channels into the order of a mask, where they do not stand in it already.

    A model that is pruned by the mask was written in its order, whatever its files remember of that.

    Args:
        targets: of ``fit_mask``.

    Raises:
        UsageError: they stand in another order; or they are to be moved, and the model is sharded.
    """
    recall_order(model, named=mask.order)
    if order_of(model) == mask.order:
        return
    if any(local(p) is not p for p in model.parameters()):
        raise UsageError(
            "The mask is for another order of the model's channels: call apply_mask(model, mask) before the model is "
            "sharded.",
            "mask",
        )
    if not order_of(model) and is_pruned_by(mask, targets):
        mark(model, mask.order)
    put_into_order(model, mask.order)


@torch.no_grad()
def is_pruned_by(
    mask: Mask,
    targets: Mapping[str, Prunable],
    read: Callable[[Prunable], Tensor] = lambda target: target.weight.detach(),
) -> bool:
    """Whether the mask prunes some of ``fit_mask``'s targets, and all that it prunes is zero; ``read`` gives values."""
    for name, target in targets.items():
        rows = target.rows(read(target))
        if rows[~mask.tensors[name].to(rows.device)].any():
            return False
    return not all(kept.all() for kept in mask.tensors.values())
