"""Choose the order of channels in which blocks of four compete least, and put a model into it.

A block keeps two of four weights. Channels are dealt out so that important ones do not meet: sorted by their scores and
dealt in a snake, then, for each of the four places in turn, handed out to the blocks anew by a linear assignment that
keeps as much score as possible. Scores are |w_ij| * ||x_j||_2 as in Wanda (https://arxiv.org/abs/2306.11695).
Shapes: R = rows that are looked at; n = channels; B = n / 4 blocks.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import PreTrainedModel

from proxsparse.model.channels import ChannelOrder, Move, load_order, mark, put_into_order, save_order
from proxsparse.model.inputs import input_norms
from proxsparse.model.prunable import Prunable, find_prunable
from proxsparse.model.wiring import Group, Wiring
from proxsparse.operator.prox import expand_scale

logger = logging.getLogger(__name__)
CALLED = {"mlp": "MLP channels", "heads": "channels of the values", "residual": "channels of the residual stream"}
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02}  # of logits, by what they are computed in; float32: 1e-3
ROUNDS = 3  # of all four places; a fourth changes next to nothing
ROWS_OF_ALL = 20_000  # of all readers together where they share one order
WORK = 2e9  # comparisons per place and round; more rows than that are sampled
CHECKED = 256  # tokens on which the function is compared


@torch.no_grad()
def order_channels(model: PreTrainedModel, windows: Tensor | None, norm_samples: int = 64) -> ChannelOrder:
    """Put a model's channels into the order in which 2:4 blocks keep most, and say what was moved.

    Args:
        model: dense; its parameters are reordered in place.
        windows: (N, T) calibration token ids, by whose inputs weights are scored; None: by magnitude.
        norm_samples: windows that inputs are measured on.

    Returns:
        the order; empty where nothing of the architecture is understood.
    """
    targets = find_prunable(model)
    norms = None if windows is None else input_norms(model, targets, windows[:norm_samples], progress="channels")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    orders = {kind: _order(groups, shapes, norms) for kind, groups in Wiring(model).groups.items()}
    ids = model.dummy_inputs["input_ids"] if windows is None else windows[:1, :CHECKED]
    before = _logits(model, ids)
    chosen = ChannelOrder()
    for kind, order in orders.items():
        if not order:
            _say(f"the {CALLED[kind]} of {type(model).__name__} keep their order: how they are wired is not known")
            continue
        order.apply(model)
        if _differs(before, _logits(model, ids)):
            order.inverse().apply(model)
            _say(f"the {CALLED[kind]} of {type(model).__name__} keep their order: another would change the function")
        else:
            chosen = chosen.joined(order)
    mark(model, chosen)
    return chosen


def stored_order(path: Path, model: PreTrainedModel, windows: Tensor) -> ChannelOrder:
    """An order that is chosen once and kept in a file, so that a resumed run has the same; the model is put into it.

    Args:
        path: of the file; it is read where it exists.

    Raises:
        UsageError: the file was made for another model or text.
    """
    text = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    origin = {"model": str(model.config._name_or_path), "text": text}
    if path.is_file():
        order = load_order(path, origin)
        put_into_order(model, order)
        return order
    order = order_channels(model, windows)
    save_order(order, path, origin)
    return order


def _say(what: str) -> None:
    logger.warning("note: %s", what)


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    training = model.training
    model.eval()
    found = model(input_ids=ids.to(model.device), use_cache=False).logits
    model.train(training)
    return found


def _differs(before: Tensor, after: Tensor) -> bool:
    """Whether logits differ by more than the order of sums explains."""
    tolerance = TOLERANCE.get(before.dtype, 1e-3)
    before, after = before.float(), after.float()
    spread = (before - before.mean(-1, keepdim=True)).square().mean().sqrt()
    return not bool((before - after).square().mean().sqrt() <= tolerance * spread)


def _order(
    groups: list[Group], shapes: Mapping[str, tuple[int, ...]], norms: Mapping[str, Tensor] | None
) -> ChannelOrder:
    """The order of all groups of a kind: one index per dimension of a parameter."""
    places: dict[tuple[str, int], Tensor] = {}
    for group in groups:
        permutation = _permutation(group, norms)
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


def _permutation(group: Group, norms: Mapping[str, Tensor] | None) -> Tensor:
    """(n,) the order of a group's channels; (E, n) where experts have their own."""
    if group.experts:
        stacks = [_scores(target, norms) for target, _ in group.readers]
        return torch.stack([arrange(torch.cat([own[e] for own in stacks])) for e in range(group.experts)]).cpu()
    parts = []
    for target, places in group.readers:
        scores = _scores(target, norms).flatten(0, -2)
        for copy in places.to(scores.device):
            own = scores[:, copy]
            if len(group.readers) > 1:
                own = _sampled(own, ROWS_OF_ALL // len(group.readers))
                own = own / own.mean().clamp_min(torch.finfo(own.dtype).tiny)
            parts.append(own)
    return arrange(torch.cat([part.to(parts[0].device) for part in parts])).cpu()


def _scores(target: Prunable, norms: Mapping[str, Tensor] | None) -> Tensor:
    """(..., O, I) |w| times the norm of its input."""
    rows = target.rows(target.weight.detach()).float().abs()
    return rows if norms is None else rows * expand_scale(norms[target.name], rows)


def _sampled(rows: Tensor, count: int) -> Tensor:
    """At most so many rows, spread evenly."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, max(count, 1), device=rows.device).long()]


def arrange(scores: Tensor) -> Tensor:
    """The order of channels in which the two largest scores of every block of four sum to most.

    Args:
        scores: (R, n), at least 0; n is a multiple of 4.

    Returns:
        (n,) the old place of every new channel; unchanged where no better order is found.
    """
    scores = _sampled(scores, max(64, int(WORK / (scores.shape[1] // 4) ** 2)))
    blocks = _dealt(scores.sum(0))
    for _ in range(ROUNDS):
        before = blocks.clone()
        for place in range(4):
            blocks[:, place] = _assigned(scores, blocks, place)
        if torch.equal(before, blocks):
            break
    found, unchanged = blocks.flatten(), torch.arange(scores.shape[1], device=scores.device)
    return found if kept(scores[:, found]) > kept(scores) else unchanged


def kept(scores: Tensor) -> float:
    """Sum of the two largest scores of every block of four neighbours."""
    return float(scores.unflatten(-1, (-1, 4)).topk(2, -1).values.sum(dtype=torch.float64))


def _dealt(weights: Tensor) -> Tensor:
    """(B, 4) channels, dealt out by their weights: the first B in turn, the next B the other way round, ..."""
    hands = weights.argsort(descending=True, stable=True).view(4, -1)
    hands[1::2] = hands[1::2].flip(-1)
    return hands.T.contiguous()


def _assigned(scores: Tensor, blocks: Tensor, place: int) -> Tensor:
    """The channels of one place of every block, handed out anew so that most score is kept."""
    others = scores[:, blocks[:, [p for p in range(4) if p != place]]]  # (R, B, 3)
    second = others.topk(2, -1).values[..., 1]
    candidates = blocks[:, place]
    mine = scores[:, candidates]
    # A block keeps the first of its others, and the larger one of their second and the candidate.
    apart = torch.cdist(second.T.contiguous(), mine.T.contiguous(), p=1)  # |a - b|, summed over rows
    gain = (second.sum(0)[:, None] + mine.sum(0)[None, :] + apart) / 2  # max(a, b), summed over rows
    _, chosen = linear_sum_assignment(gain.cpu().double().numpy(), maximize=True)
    return candidates[torch.from_numpy(chosen).to(candidates.device)]
