"""Check a checkpoint of any form: 2:4 or another N:M, and compared with its base nothing but pruned."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from proxsparse.errors import UsageError
from proxsparse.model.channels import ORDER_FILE, ChannelOrder, order_in
from proxsparse.model.checkpoint import Checkpoint
from proxsparse.model.coded import coded_tensors, is_coded
from proxsparse.model.hub import add_small_files, noted_of
from proxsparse.model.layout import Group, Layout
from proxsparse.model.loading import empty_model, load_model
from proxsparse.model.prunable import Prunable, find_prunable
from proxsparse.operator.pattern import TWO_OF_FOUR, Pattern

MOST_OFFENDERS = 5


def check_sparsity(
    name: str,
    base: str | None = None,
    *,
    pattern: Pattern = TWO_OF_FOUR,
    include: str | None = None,
    exclude: str | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[dict[str, int], list[str]]:
    """Whether a checkpoint is N:M sparse and, compared with its base, nothing but pruned.

    Every block of M of every weight of ``weights_to_check`` must have at most N non-zeros. With a base, kept weights
    must be equal to its own bit for bit, and all other tensors unchanged, but for the order of channels that the
    checkpoint names. One tensor of each model is in memory at a time (of stacked experts, one layer's).

    Args:
        name: checkpoint folder of any form, or a Hub id that is in the cache.
        base: the original model: a folder, a Hub id in the cache, or a GGUF file; None: only the blocks are checked.
            Not for a quantised checkpoint, whose weights are rounded.
        pattern: N:M of the blocks.
        include, exclude: of ``find_prunable``: which weights are pruned.
        revision, base_revision: of a model and a base on the Hub.
        trust_remote_code: run code that comes with the model.

    Returns:
        (counts of weights, blocks and offending blocks, a sentence for each of the first offenders).

    Raises:
        UsageError: no checkpoint, one that lacks weights of its model, or no weight has blocks of this pattern.
    """
    model = checked_model(name, revision, trust_remote_code)
    targets = {target.name: target for target in weights_to_check(name, model, revision, include, exclude)}
    pruned = {target.name for target in weights_to_check(name, model, revision)}
    found = _checkpoint(name, revision, "model")
    layout = _layout(found, model, targets, compared=base is not None)
    order = order_in(found.folder, found.config)
    original = _original(base, base_revision, trust_remote_code, order) if base else None
    counts = {"weights": 0, "blocks": 0, "wrong_blocks": 0, "changed_tensors": 0}
    offenders, seen = list[str](), set[str]()
    parameters = dict(model.named_parameters()).keys()
    tied = {name for pair in (model.all_tied_weights_keys or {}).items() for name in pair}
    for tensors in _parts(layout):
        for key, tensor in tensors.items():
            seen.add(key)
            target = targets.get(key)
            if target is not None and target.rows(tensor).shape[-1] % pattern.m == 0:
                offenders += _wrong_blocks(key, target, tensor, pattern, counts)
            if key in parameters and tensor.is_floating_point() and not tensor.float().isfinite().all():
                offenders.append(f"{key}: has values that are not finite")
            if original is not None and (sentence := _difference(key, tensor, original, key in pruned)):
                counts["changed_tensors"] += 1
                offenders.append(sentence)
    if not counts["weights"]:
        raise UsageError(f"No weight of {name} has a width that is a multiple of {pattern.m}.", "pattern")
    offenders += [f"{key}: is not in the files" for key in sorted(parameters - seen - tied)]
    if original is not None:
        offenders += [f"{key}: is in the base and not in the model" for key in sorted(set(original) - seen - tied)]
    return counts, offenders


def weights_to_check(
    name: str,
    model: PreTrainedModel,
    revision: str | None = None,
    include: str | None = None,
    exclude: str | None = None,
) -> list[Prunable]:
    """The weights of a checkpoint that must be pruned: all but those that ``save_pruned`` noted as dense.

    Raises:
        UsageError: there is none.
    """
    dense = set(noted_of(name, revision).get("dense", ()))
    found = [t for t in find_prunable(model, include, exclude, multiple=1) if t.name not in dense]
    if not found:
        raise UsageError(f"The export left all weights of {name} dense that are to be checked: name others.", "include")
    return found


def _layout(found: Checkpoint, model: PreTrainedModel, targets: Iterable[str], compared: bool) -> Layout:
    coded = is_coded(found.config)
    if compared and (coded or found.is_rounded):
        raise UsageError(
            f"`base` compares bit for bit, and the weights of {found.name} are quantised: check the checkpoint that it "
            "was made from, or leave `base` out.",
            "base",
        )
    layout = Layout(coded_tensors(found) if coded else found.tensors, model)
    missing = sorted(set(targets) - set(layout.of_parameter))
    if missing:
        raise UsageError(f"{found.name} lacks {len(missing)} weights of its model, as {missing[0]}.", "model")
    return layout


def checked_model(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a checkpoint, without values; also where ``export`` has quantised its weights."""
    found = Checkpoint.find(name, revision)
    if found is not None:
        add_small_files(found)  # with notes that others do not download
    coded = found is not None and is_coded(found.config)
    return empty_model(name, revision=revision, trust_remote_code=trust_remote_code, evaluating=coded)


def _checkpoint(name: str, revision: str | None, argument: str) -> Checkpoint:
    try:
        found = Checkpoint.find(name, revision)
    except UsageError as error:
        raise UsageError(str(error), argument) from error
    if found is None:
        raise UsageError(
            f"`{argument}` must be a checkpoint folder with safetensors files, or a Hub id in the cache; got {name}.",
            argument,
        )
    return found


def _parts(layout: Layout) -> Iterator[dict[str, Tensor]]:
    """All tensors, a few at a time: by the names of parameters, and by their own where no parameter has them."""
    for group in layout.groups:
        yield layout.read(group)
    for name, stored in layout.tensors.items():
        if name not in layout.of_stored:
            yield {name: stored.read()}


class _Original(Mapping[str, Tensor]):
    """The base's tensors by the names of ``_parts``; those of the last group stay, as several are asked for.

    Args:
        back: undoes the order of channels that the base was written in.
        order: the one that its tensors are given in.
    """

    def __init__(self, layout: Layout, back: ChannelOrder, order: ChannelOrder):
        self.layout, self.back, self.order = layout, back, order
        rest = [name for name in layout.tensors if name not in layout.of_stored]
        self.groups: dict[str, Group | None] = {**layout.of_parameter, **dict.fromkeys(rest)}
        self.last: tuple[Group | None, dict[str, Tensor]] = (None, {})

    def __getitem__(self, name: str) -> Tensor:
        group = self.groups[name]
        if group is None:
            return self.layout.tensors[name].read()
        if self.last[0] is not group:
            self.last = (group, self.layout.read(group))
        return self.order.of(name, self.back.of(name, self.last[1][name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)


def _original(base: str, revision: str | None, trust_remote_code: bool, order: ChannelOrder) -> Mapping[str, Tensor]:
    """The base's tensors in an order, by the names of parameters; those that the model's class lacks by their own."""
    stored = None if base.lower().endswith(".gguf") else _checkpoint(base, revision, "base")
    own = ChannelOrder() if stored is None else order_in(stored.folder, stored.config)
    if own == order:
        own = order = ChannelOrder()
    for found in (own, order):
        if found and not found.moves:
            raise UsageError(
                f"The channels stand in an order that {ORDER_FILE} should hold: copy that file from the checkpoint "
                "that export wrote, or leave `base` out.",
                "base",
            )
    if stored is None:  # a GGUF, whose tensors have other names and forms
        return {name: order.of(name, tensor) for name, tensor in load_model(base).state_dict().items()}
    model = empty_model(base, revision=revision, trust_remote_code=trust_remote_code)
    return _Original(Layout(stored.tensors, model), own.inverse(), order)


def _wrong_blocks(key: str, target: Prunable, tensor: Tensor, pattern: Pattern, counts: dict[str, int]) -> list[str]:
    """Count the blocks of a weight, and say where the first one is that has too many non-zeros."""
    wrong = pattern.violations(target.rows(tensor))
    counts["weights"] += 1
    counts["blocks"] += wrong.numel()
    counts["wrong_blocks"] += int(wrong.sum())
    if not wrong.any():
        return []
    *expert, row, block = (int(i) for i in wrong.nonzero()[0])
    place = f"expert {expert[0]}, " if expert else ""
    return [f"{key}: {int(wrong.sum())} blocks are not {pattern}, the first is {place}row {row}, block {block}"]


def _difference(key: str, tensor: Tensor, original: Mapping[str, Tensor], pruned: bool) -> str | None:
    if key not in original:
        return f"{key}: is not in the base"
    before = original[key]
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
