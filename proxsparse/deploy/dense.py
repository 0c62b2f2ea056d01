"""Write a pruned model: an ordinary checkpoint that every runtime loads, whole or shard by shard; and check one."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from proxsparse.errors import UsageError
from proxsparse.mask import Mask
from proxsparse.model.checkpoint import local_checkpoint, shards, tensor_readers
from proxsparse.model.hub_errors import quiet_bars
from proxsparse.model.loading import load_config
from proxsparse.model.prunable import Prunable, find_prunable
from proxsparse.operator.pattern import TWO_OF_FOUR
from proxsparse.record import atomic_path

NOT_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".msgpack", ".h5")
MOST_OFFENDERS = 5


def save_pruned(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> None:
    """Save model and tokenizer in the dense layout, with exact zeros and no sparsity or quantisation config.

    The folder appears complete or not at all.
    """
    with quiet_bars(), atomic_path(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


def targets_of(name: str, trust_remote_code: bool = False, revision: str | None = None) -> dict[str, Prunable]:
    """Prunable weights of a checkpoint by name, from its configuration alone: no weights are read."""
    with torch.device("meta"):
        config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return {target.name: target for target in find_prunable(model, multiple=1)}


def stream_pruned(name: str, mask: Mask, folder: Path | str, trust_remote_code: bool = False) -> bool:
    """Write original weights x mask shard by shard: one shard is in memory at a time. Everything else is copied.

    Args:
        name: a checkpoint folder (or the embedded model).

    Returns:
        False, and nothing written, where this can't be done: no local folder, or the checkpoint names its tensors
        otherwise than the model does (stacked experts), so that the model has to be loaded.

    Raises:
        UsageError: the mask has other shapes than the weights.
    """
    source = local_checkpoint(name)
    if source is None or not set(mask.tensors) <= set(tensor_readers(source)):
        return False
    targets = targets_of(name, trust_remote_code)
    with atomic_path(folder) as scratch:
        scratch.mkdir()
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.name.endswith(NOT_WEIGHTS) and not path.name.startswith("."):
                shutil.copy2(path, scratch / path.name)
        for shard in shards(source):
            with safe_open(shard, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                metadata = file.metadata()
            for key in set(tensors) & set(mask.tensors):
                rows = targets[key].rows(tensors[key])
                kept = mask.tensors[key]
                if rows.shape != kept.shape:
                    raise UsageError(
                        f"The mask of {key} has shape {tuple(kept.shape)}, its weight {tuple(rows.shape)}."
                    )
                rows.masked_fill_(~kept, 0.0)
            save_file(tensors, scratch / shard.name, metadata=metadata)
            del tensors
    return True


def check_sparsity(name: str, base: str | None = None) -> tuple[dict[str, int], list[str]]:
    """Whether a checkpoint is 2:4 and, beside its base, nothing but pruned.

    Every block of every prunable weight has at most two non-zeros. With a base: kept weights are its bits, and all
    other tensors are unchanged. One tensor of each is in memory at a time.

    Args:
        name: checkpoint folder.
        base: checkpoint folder of the original model, or None.

    Returns:
        (counts of weights, blocks and offending blocks, one sentence for each of the first offenders).

    Raises:
        UsageError: a folder without safetensors, or whose tensors the model does not know.
    """
    folder = _folder(name, "model")
    read = tensor_readers(folder)
    original = tensor_readers(_folder(base, "base")) if base else None
    targets = targets_of(name)
    counts = {"weights": 0, "blocks": 0, "wrong_blocks": 0, "changed_tensors": 0}
    offenders: list[str] = []
    names = set(read)
    if not set(targets) <= names:
        raise UsageError(
            f"{name} stores its weights under other names than its model has, as {min(set(targets) - names)}; "
            "such checkpoints (stacked experts) can't be checked.",
            "model",
        )
    for key in sorted(names):
        tensor = read[key]()
        target = targets.get(key)
        if target is not None and target.rows(tensor).shape[-1] % 4 == 0:
            rows = target.rows(tensor)
            counts["weights"] += 1
            wrong = TWO_OF_FOUR.violations(rows)
            counts["blocks"] += wrong.numel()
            counts["wrong_blocks"] += int(wrong.sum())
            if wrong.any():
                row, block = (int(i) for i in wrong.nonzero()[0][-2:])
                offenders.append(f"{key}: {int(wrong.sum())} blocks are not 2:4, the first is row {row}, block {block}")
        if original is not None:
            sentence = _difference(key, tensor, original, pruned=target is not None)
            counts["changed_tensors"] += sentence is not None
            offenders += [sentence] if sentence else []
    if original is not None:
        offenders += [f"{key}: is in the base and not in the model" for key in sorted(set(original) - names)]
    return counts, offenders


def _difference(key: str, tensor: Tensor, original: dict[str, Callable[[], Tensor]], pruned: bool) -> str | None:
    if key not in original:
        return f"{key}: is not in the base"
    before = original[key]()
    if before.shape != tensor.shape or before.dtype != tensor.dtype:
        ours, theirs = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, before))
        return f"{key}: {ours} in the model, {theirs} in the base"
    changed = _bits(tensor) != _bits(before)
    if pruned:
        changed &= _bits(tensor) != 0  # a pruned weight is +0.0, bit for bit
    if not changed.any():
        return None
    place = tuple(int(i) for i in changed.nonzero()[0])
    kind = "kept weights differ from the base" if pruned else "entries differ from the base"
    return f"{key}: {int(changed.sum())} {kind}, the first at {place}"


def _bits(tensor: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(integers[tensor.element_size()])


def _folder(name: str, argument: str) -> Path:
    folder = local_checkpoint(name)
    if folder is None:
        raise UsageError(f"`{argument}` must be a checkpoint folder with safetensors files; got {name}.", argument)
    return folder
