"""Choose the order of channels in which the weights of a block compete least, and put a model into it.

A block keeps n of m weights. Channels are dealt out so that important ones do not meet: sorted by their scores and
dealt in a snake, then, for each of the m places in turn, handed out to the blocks anew by a linear assignment that
keeps as much score as possible. Scores are |w_ij| * ||x_j||_2 as in Wanda (https://arxiv.org/abs/2306.11695).
Shapes: R = rows that are looked at; C = channels; B = C / m blocks.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import PreTrainedModel

from proxsparse.errors import UsageError
from proxsparse.model.channels import ChannelOrder, Move, load_order, mark, order_of, put_into_order, save_order
from proxsparse.model.inputs import input_norms, origin_of
from proxsparse.model.prunable import Prunable, find_prunable
from proxsparse.model.restoring import evaluation_mode
from proxsparse.model.wiring import Group, Wiring
from proxsparse.operator.pattern import TWO_OF_FOUR, Pattern
from proxsparse.operator.prox import expand_scale

logger = logging.getLogger(__name__)
CALLED = {"mlp": "MLP channels", "heads": "channels of the values", "residual": "channels of the residual stream"}
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02}  # of logits, by what they are computed in; float32: 1e-3
ROUNDS = 3  # of all places of a block
ROWS_OF_ALL = 20_000  # of all readers together where they share one order
WORK = 2e9  # comparisons per place and round; more rows than that are sampled
CHECKED = 256  # tokens on which the function is compared


@torch.no_grad()
def order_channels(
    model: PreTrainedModel, windows: Tensor | None, norm_samples: int = 64, pattern: Pattern = TWO_OF_FOUR
) -> ChannelOrder:
    """Put a model's channels into the order in which its blocks keep most, and say what was moved.

    Args:
        model: dense; its parameters are reordered in place.
        windows: (N, T) calibration token ids, by whose inputs weights are scored; None: by magnitude.
        norm_samples: windows that inputs are measured on.
        pattern: N:M, what a block keeps. Channels whose number is no multiple of M keep their order.

    Returns:
        The order; empty where nothing of the architecture is understood.

    Raises:
        UsageError: the channels have been put into another order before.
    """
    if order_of(model):
        raise UsageError(
            "The channels of the model stand in an order of their own already: use `permute=none`, or load the model "
            "that it was made from.",
            "model",
        )
    targets = find_prunable(model, multiple=1)
    norms = None if windows is None else input_norms(model, targets, windows[:norm_samples], progress="channels")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wired = Wiring(model).groups
    orders = {kind: _order(groups, shapes, norms, pattern) for kind, groups in wired.items()}
    ids = model.dummy_inputs["input_ids"] if windows is None else windows[:1, :CHECKED]
    before = _logits(model, ids)
    chosen = ChannelOrder()
    for kind, order in orders.items():
        keep = f"the {CALLED[kind]} of {type(model).__name__} keep their order: "
        if not order:
            sizes = ", ".join(str(size) for size in sorted({group.size for group in wired[kind]}))
            no_blocks = f"{sizes} of them can't be dealt into blocks of {pattern.m}"
            _say(keep + (no_blocks if sizes else "how they are wired is not known"))
            continue
        order.apply(model)
        if _differs(before, _logits(model, ids)):
            order.inverse().apply(model)
            _say(f"{keep}another one would change what the model computes")
        else:
            chosen = chosen.joined(order)
    mark(model, chosen)
    return chosen


def stored_order(path: Path, model: PreTrainedModel, windows: Tensor, pattern: Pattern = TWO_OF_FOUR) -> ChannelOrder:
    """An order that is chosen once and kept in a file, so that a resumed run has the same; the model is put into it.

    Args:
        path: of the file; it is read where it exists.
        pattern: see ``order_channels``.

    Raises:
        UsageError: the file was made for another model or text.
    """
    origin = origin_of(model, windows)
    if path.is_file():
        order = load_order(path, origin)
        put_into_order(model, order)
        return order
    order = order_channels(model, windows, pattern=pattern)
    save_order(order, path, origin)
    return order


def _say(what: str) -> None:
    logger.warning("note: %s", what)


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with evaluation_mode(model):
        return model(input_ids=ids.to(model.device), use_cache=False).logits


def _differs(before: Tensor, after: Tensor) -> bool:
    """Whether logits differ by more than the order of sums explains."""
    tolerance = TOLERANCE.get(before.dtype, 1e-3)
    before, after = before.float(), after.float()
    spread = (before - before.mean(-1, keepdim=True)).square().mean().sqrt()
    return not bool((before - after).square().mean().sqrt() <= tolerance * spread)


def _order(
    groups: list[Group], shapes: Mapping[str, tuple[int, ...]], norms: Mapping[str, Tensor] | None, pattern: Pattern
) -> ChannelOrder:
    """The order of all groups of a kind: one index per dimension of a parameter."""
    places: dict[tuple[str, int], Tensor] = {}
    for group in groups:
        if group.size % pattern.m:
            continue
        permutation = _permutation(group, norms, pattern)
        for member in group.members:
            shape = shapes[member.name]
            size = shape[member.dim]
            start = torch.arange(size).expand(group.experts, size) if group.experts else torch.arange(size)
            index = places.setdefault((member.name, member.dim), start.clone())
            for copy in member.places:
                index[..., copy] = copy[permutation]
    moves: list[Move] = []
    indices: dict[str, Tensor] = {}
    for (name, dim), index in places.items():
        key = next((key for key, other in indices.items() if other.shape == index.shape and other.equal(index)), name)
        key = key if key != name or name not in indices else f"{name}.{dim}"
        indices[key] = index
        moves.append(Move(name, dim, key))
    return ChannelOrder(moves, indices)


def _permutation(group: Group, norms: Mapping[str, Tensor] | None, pattern: Pattern) -> Tensor:
    """(C,) the order of a group's channels; (E, C) where experts have their own."""
    if group.experts:
        stacks = [_scores(target, norms) for target, _ in group.readers]
        experts = (torch.cat([own[e] for own in stacks]) for e in range(group.experts))
        return torch.stack([arrange(scores, pattern) for scores in experts]).cpu()
    parts = []
    for target, places in group.readers:
        scores = _scores(target, norms).flatten(0, -2)
        for copy in places.to(scores.device):
            own = scores[:, copy]
            if len(group.readers) > 1:
                own = _sampled(own, ROWS_OF_ALL // len(group.readers))
                own = own / own.mean().clamp_min(torch.finfo(own.dtype).tiny)
            parts.append(own)
    return arrange(torch.cat([part.to(parts[0].device) for part in parts]), pattern).cpu()


def _scores(target: Prunable, norms: Mapping[str, Tensor] | None) -> Tensor:
    """(..., O, I) |w| times the norm of its input."""
    rows = target.rows(target.weight.detach()).float().abs()
    return rows if norms is None else rows * expand_scale(norms[target.name], rows)


def _sampled(rows: Tensor, count: int) -> Tensor:
    """At most so many rows, spread evenly."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, max(count, 1), device=rows.device).long()]


def arrange(scores: Tensor, pattern: Pattern = TWO_OF_FOUR) -> Tensor:
    """The order of channels in which the n largest scores of every block of m sum to most.

    Args:
        scores: (R, C), at least 0; C is a multiple of m.

    Returns:
        (C,) the old place of every new channel; unchanged where no better order is found.
    """
    scores = _sampled(scores, max(64, int(WORK / (scores.shape[1] // pattern.m) ** 2)))
    blocks = _dealt(scores.sum(0), pattern.m)
    for _ in range(ROUNDS):
        before = blocks.clone()
        for place in range(pattern.m):
            blocks[:, place] = _assigned(scores, blocks, place, pattern.n)
        if torch.equal(before, blocks):
            break
    found, unchanged = blocks.flatten(), torch.arange(scores.shape[1], device=scores.device)
    return found if kept(scores[:, found], pattern) > kept(scores, pattern) else unchanged


def kept(scores: Tensor, pattern: Pattern = TWO_OF_FOUR) -> float:
    """Sum of the n largest scores of every block of m neighbours."""
    return float(scores.unflatten(-1, (-1, pattern.m)).topk(pattern.n, -1).values.sum(dtype=torch.float64))


def _dealt(weights: Tensor, m: int) -> Tensor:
    """(B, m) channels, dealt out by their weights: the first B in turn, the next B the other way round, ..."""
    hands = weights.argsort(descending=True, stable=True).view(m, -1)
    hands[1::2] = hands[1::2].flip(-1)
    return hands.T.contiguous()


def _assigned(scores: Tensor, blocks: Tensor, place: int, n: int) -> Tensor:
    """The channels of one place of every block, handed out anew so that most score is kept."""
    others = scores[:, blocks[:, [p for p in range(blocks.shape[1]) if p != place]]]  # (R, B, m - 1)
    last = others.topk(n, -1).values[..., n - 1]
    candidates = blocks[:, place]
    mine = scores[:, candidates]
    # A block keeps the first n - 1 of its others, and the larger one of their n-th and the candidate.
    apart = torch.cdist(last.T.contiguous(), mine.T.contiguous(), p=1)  # |a - b|, summed over rows
    gain = (last.sum(0)[:, None] + mine.sum(0)[None, :] + apart) / 2  # max(a, b), summed over rows
    _, chosen = linear_sum_assignment(gain.cpu().double().numpy(), maximize=True)
    return candidates[torch.from_numpy(chosen).to(candidates.device)]
