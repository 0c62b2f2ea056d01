"""Layer-wise steps: before the first steps of a run, layers learn by themselves to compute what the dense ones do.

The loss has one number per token, and the weights of all layers learn from it together. The dense model says more: it
also has the outputs of all its layers. So a few neighbouring layers under their masks (``layer_span``) get the inputs
that they have in the dense model, and learn to return the dense layers' outputs. The same text teaches more this way,
because every entry of an output is a target. A layer-wise step takes one forward and one backward pass through the
layers. It does not see the errors of the layers before; the run's own loss does. So layer-wise steps teach fast, and
later they stand in the way of the loss. Only the first steps of a run have them (``layer_steps``).

Which layers are neighbours shifts from step to step. A step follows Adafactor's update of its own gradient (arXiv
1804.04235). Nothing is kept from step to step, and only one span of layers has gradients at a time.

Shapes: B = batch, T = ctx_len, H = hidden size.
"""

import contextlib
import copy
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from proxsparse.learning.copies import TakingTurns
from proxsparse.learning.rounded import Adafactor
from proxsparse.model.prunable import Prunable, decoder_blocks
from proxsparse.model.restoring import evaluation_mode
from proxsparse.model.walk import run_block
from proxsparse.operator.rounding import noise_seed

logger = logging.getLogger(__name__)
TINY = torch.finfo(torch.float32).tiny  # of a layer that adds nothing


class Pace(NamedTuple):
    """Of a layer-wise step.

    Attributes:
        rates: id of a parameter -> learning rate.
        step: number of optimizer steps so far.
    """

    rates: Mapping[int, float]
    step: int


class Seen(NamedTuple):
    """A call of a layer in the dense model: hidden states (B, T, H), the other arguments, and the outputs (B, T, H)."""

    states: Tensor
    call: tuple[tuple, dict[str, Any]]
    outputs: Tensor


class LayerSteps:
    """The steps of all layers.

        with steps.watching():
            ...  # the dense model computes a batch
        ...  # the model holds masked weights
        error = steps.step(turns, steps.pace())

    Args:
        model: the model that learns.
        targets: the weights that learn.
        args: ProxSparseConfig.
        pace: asked before every step of the run; None: it has no layer-wise step.
        autocast: makes the context in which the model computes.

    Attributes:
        own: index of a layer -> its weights, without the layers that can't be run by themselves.
        following: layers whose inputs are the outputs of the layer before, with nothing in between.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        targets: list[Prunable],
        args: Any,
        pace: Callable[[], Pace | None],
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self.args, self.pace, self.autocast = args, pace, autocast
        self.blocks = decoder_blocks(model)
        self.own = {index: [t for t in targets if t.block == index] for index in sorted({t.block for t in targets})}
        self.following: set[int] = set()
        self.sharded = isinstance(targets[0].weight, DTensor)
        self._seen: dict[int, list[Seen]] = {}
        self._checked = False
        self._at = (-1, 0)  # step and micro-batch

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the dense model computes the batch of the next step."""
        handles: list[Any] = []
        entered: dict[int, tuple[tuple, dict[str, Any]]] = {}

        def enter(index: int, arguments: tuple, keywords: dict[str, Any]) -> None:
            # What layers write into for each other is taken as it is now.
            kept = {n: copy.copy(v) if isinstance(v, (MutableMapping, list)) else v for n, v in keywords.items()}
            entered[index] = (arguments, kept)

        def leave(index: int, out: Any) -> None:
            arguments, keywords = entered.pop(index)
            states = arguments[0] if arguments else keywords.pop("hidden_states", None)
            outputs = out[0] if isinstance(out, (tuple, list)) else out
            if torch.is_tensor(states) and torch.is_tensor(outputs) and states.shape == outputs.shape:
                self._seen.setdefault(index, []).append(Seen(states, (arguments[1:], keywords), outputs))

        for index in self.own:
            block = self.blocks[index]
            handles.append(block.register_forward_pre_hook(lambda _, a, k, i=index: enter(i, a, k), with_kwargs=True))
            handles.append(block.register_forward_hook(lambda _, a, out, i=index: leave(i, out)))
        self._seen.clear()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if not self._checked:
            self._leave_out()

    def step(self, turns: TakingTurns, pace: Pace) -> Tensor:
        """Move the learned weights of every layer once, while the parameters hold masked ones; they hold learned after.

        Returns:
            The squared error of a window's outputs, relative to the square of what the dense layer adds to its inputs;
            the mean over windows and layers.
        """
        rates, step = pace
        self._at = (step, self._at[1] + 1 if step == self._at[0] else 0)
        seed = noise_seed(self.args.seed + 2, *self._at)
        errors = []
        for span in list(self._spans(step)):
            seen = [self._seen.pop(index)[0] for index in span]  # which are large
            errors.append(self._step_span(span, seen, turns, rates, noise_seed(seed, span[0], 0)))
        return torch.cat(errors).mean()

    def _spans(self, step: int) -> Iterator[list[int]]:
        """Neighbouring layers that learn together; where they begin shifts from step to step."""
        span: list[int] = []
        for index in sorted(self._seen):
            follows = span[-1:] == [index - 1] and index in self.following
            if span and not (follows and (index + step) % self.args.layer_span):
                yield span
                span = []
            span.append(index)
        yield span

    def _step_span(
        self, span: list[int], seen: list[Seen], turns: TakingTurns, rates: Mapping[int, float], seed: int
    ) -> Tensor:
        own, made, errors = [target for index in span for target in self.own[index]], seen[0].states, []
        compute: Callable[..., Tensor] = self._compute
        if len(span) > 1 and recomputed(self.args, self.sharded):
            compute = functools.partial(checkpoint, self._compute, use_reentrant=False, preserve_rng_state=False)
        with _gradients_aside([self.blocks[index] for index in span]):
            for index, call in zip(span, seen, strict=True):
                given = call._replace(states=made.to(call.states.device))
                made, wanted = compute(self.blocks[index], given), call.outputs.float()
                off, added = ((wanted - given.float()).square().flatten(1).sum(1) for given in (made, call.states))
                errors.append((off / added.clamp_min(TINY)).mean())
            error = torch.stack(errors)
            # Adafactor takes gradients of any scale, and float16 can hold those of this one.
            self._differentiate(error.sum() * made.numel() ** 0.5, own)
            for target in own:
                turns.put_learned_of(target)
            groups = [{"params": [target.weight], "lr": rates[id(target.weight)]} for target in own]
            Adafactor(groups, seed=seed, stochastic=self.args.rounding == "stochastic").step()
        return error.detach()

    def _compute(self, block: nn.Module, seen: Seen) -> Tensor:
        """Outputs of a layer for inputs of the dense model; dropout would hide what it computes."""
        with evaluation_mode(block), self.autocast():
            return run_block(block, seen.states, seen.call, seen.states.device)

    def _differentiate(self, error: Tensor, own: list[Prunable]) -> None:
        """Give weights their gradients, and call none of the hooks by which others wait for these."""
        weights = [target.weight for target in own]
        if self.sharded:
            error.backward()  # shards get theirs from FSDP2's hooks
            return
        for weight, gradient in zip(weights, torch.autograd.grad(error, weights, allow_unused=True), strict=True):
            if self.args.world_size > 1:  # of experts that no token went to, too: the processes talk about all
                gradient = torch.zeros_like(weight) if gradient is None else gradient.contiguous()
                gradient = reduce(gradient, "mean")
            weight.grad = gradient

    @torch.no_grad()
    def _leave_out(self) -> None:
        """Go on with the layers that can be run by themselves, and say which can't."""
        self._checked = True
        holders = Counter(id(parameter) for block in self.blocks for parameter in block.parameters())
        reasons = {}
        for index in self.own:
            reasons[index] = self._unfit(index, holders)
            for seen in self._seen.get(index, []):  # leaves something else behind than the dense model did
                with contextlib.suppress(Exception):
                    self._compute(self.blocks[index], seen._replace(states=-seen.states))
        fit = [not reason for reason in reasons.values()]
        if self.args.world_size > 1:
            votes = reduce(torch.tensor(fit, dtype=torch.float32, device=self.args.device), "sum")
            fit = (votes == self.args.world_size).tolist()
        out = [index for index, fits in zip(reasons, fit, strict=True) if not fits]
        if out and self.args.process_index == 0:
            logger.warning(
                "note: %d of %d layers learn from the model's loss only, without steps of their own; layer %d %s",
                len(out), len(self.own), out[0], reasons[out[0]] or "can't be run by itself",
            )  # fmt: skip
        for index in out:
            self._seen.pop(index, None)
            del self.own[index]
        for index, [seen] in self._seen.items():
            before = self._seen.get(index - 1)
            left = None if before is None else before[0].outputs.to(seen.states.device)
            if left is not None and left.shape == seen.states.shape and torch.equal(left, seen.states):
                self.following.add(index)

    def _unfit(self, index: int, holders: Mapping[int, int]) -> str:
        """Why a layer can't be run by itself, or nothing."""
        block, calls = self.blocks[index], self._seen.get(index, [])
        if not calls:
            return "is not run, or does not turn hidden states into others of the same shape"
        if len(calls) > 1:
            return "runs more than once"
        if any(holders[id(parameter)] > 1 for parameter in block.parameters()):
            return "shares weights with another one"
        seen = calls[0]
        try:
            again = self._compute(block, seen)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's own code does without what another layer left
            logger.debug("layer %d", index, exc_info=error)
            return f"fails by itself ({type(error).__name__})"
        # Equal but for sums in another order, as GPUs make them.
        most = 1e-2 * (seen.outputs - seen.states).norm() + 0.1 * torch.finfo(again.dtype).eps * seen.outputs.norm()
        same = again.shape == seen.outputs.shape and bool((again - seen.outputs).norm() <= most)
        return "" if same else "reads what another one leaves behind"


def recomputed(args: Any, sharded: bool) -> bool:
    """Whether the layers of a span are computed again in the backward pass, so that one's activations are kept."""
    return args.activation_checkpointing and args.layer_span > 1 and not sharded


@contextlib.contextmanager
def _gradients_aside(blocks: list[nn.Module]) -> Iterator[None]:
    """Inside, layers have no gradients yet; those that they had are back afterwards."""
    kept = [(parameter, parameter.grad) for block in blocks for parameter in block.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
