"""What is minimised: which weights the model holds while it computes, and the terms of the loss.

    held while computing    masked_forward: W0 under the current mask; else the learned weights
    main term               the language-model loss, or distillation from the dense model, or a mixture
    added term              the frozen-weight penalty (lambda2)
    before the loss         at first layer-wise steps, see layer_steps.py

Each part says what it can't be combined with (``REFUSALS``) and what it costs in memory.
Shapes: B = batch, T = ctx_len, V = vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from proxsparse.learning.copies import OriginalWeights, TakingTurns
from proxsparse.learning.layer_steps import LayerSteps
from proxsparse.learning.losses import distillation_loss, frozen_weight_penalty, lm_loss, loss_through_head
from proxsparse.learning.refusals import Refusal
from proxsparse.model.hub import commit_of
from proxsparse.model.prunable import Prunable
from proxsparse.model.sharding import local, total

REFUSALS = (
    Refusal(
        lambda c: c.distill and not c.train_only_pruned,
        "`distill` needs the dense model, and embeddings and norms that move are no longer its own: give "
        "`train_only_pruned=True` too.",
    ),
    Refusal(
        lambda c: c.distill and (c.label_smoothing_factor or c.loss_type != "nll"),
        "`label_smoothing_factor` and `loss_type` change the language-model loss, and distillation takes its place: "
        "leave them out, or use `method=paper`.",
    ),
    Refusal(
        lambda c: c.lambda2_value and not c.project_lambda2,
        "`lambda2_value` has no effect without `project_lambda2=1`; give both or neither.",
    ),
    Refusal(
        lambda c: c.project_lambda2 and c.masked_forward,
        "`project_lambda2=1` pulls learned weights to the original ones, but with masked_forward the loss does "
        "not see learned weights. Use `method=paper`, or leave lambda2 out.",
    ),
)


class Share(NamedTuple):
    """Which part of an optimizer step a micro-batch is.

    Attributes:
        tokens: number in all its micro-batches and processes, or None where the mean of this one counts.
        steps: number by which a loss divides what is not counted in tokens.
        processes: number of processes whose gradients are averaged, by which a sum is multiplied; else 1.
    """

    tokens: Tensor | int | None = None
    steps: int = 1
    processes: int = 1


class Objective:
    """What the model holds while it computes, and the loss.

    Args:
        args: ProxSparseConfig.
        targets: the prunable weights.
        record: takes the name and the value of each part of the loss, to be logged.
    """

    def __init__(self, args: Any, targets: list[Prunable], record: Callable[[str, Tensor], None]):
        self.args, self.targets, self.record = args, targets, record
        self.original: OriginalWeights | None = None
        self.turns: TakingTurns | None = None
        self.layers: LayerSteps | None = None
        self.layer_error: Tensor | None = None  # of this step's layer-wise step
        self.units: dict[str, float] = {}  # of weights, where lambda2 and epsilon are relative
        # Logits of the dense model, or last hidden states, from its forward pass to the loss
        self.teacher: Tensor | None = None
        self.head: nn.Linear | None = None  # makes logits of last hidden states, where that is all there is to them

    @staticmethod
    def swaps(args: Any) -> bool:
        """Whether the parameters hold other weights than the learned ones at times."""
        return bool(args.masked_forward or args.distill)

    @classmethod
    def copies_on_device(cls, args: Any, on_cpu: bool) -> int:
        """Copies of the pruned weights in the device's memory; ``on_cpu``: the device is the CPU."""
        swaps = cls.swaps(args)
        learned = swaps and TakingTurns.on_device(args.offload_learned, on_cpu)
        return learned + ((swaps or bool(args.project_lambda2)) and OriginalWeights.on_device(args.keep_base, on_cpu))

    @classmethod
    def masks_on_device(cls, args: Any, on_cpu: bool) -> bool:
        """Whether the mask stays on the device, a bit per pruned weight, while the learned weights wait elsewhere."""
        return bool(args.masked_forward) and not TakingTurns.on_device(args.offload_learned, on_cpu)

    @staticmethod
    def logits_copies(args: Any, batch_size: int) -> int:
        """Buffers of the size of the logits that the loss makes at its worst moment, next to the logits."""
        if not args.distill:
            return 0
        # The teacher's and the gradient; the shifted copy of a batch; what the language-model loss keeps.
        return 2 + (batch_size > 1) + (args.distill < 1)

    def begin(
        self,
        model: PreTrainedModel,
        norms: dict[str, Tensor] | None,
        rms: Mapping[str, tuple[float, float]],
        layers: LayerSteps | None = None,
    ) -> None:
        """Keep what is needed of the weights; called while they are the original ones, where they will be trained.

        Args:
            norms: name -> (I,) input norms, or None.
            rms: name -> root mean square of the weight, and of its scores, where settings are relative; else empty.
            layers: takes a step of every layer before the loss is computed; None: there is none.
        """
        self.units = {name: plain for name, (plain, _) in rms.items()}
        swaps = self.swaps(self.args)
        if swaps or self.args.project_lambda2:
            source = (model.config._name_or_path, commit_of(model))
            self.original = OriginalWeights(self.targets, self.args.keep_base, *source)
        if swaps:
            assert self.original is not None
            self.turns = TakingTurns(
                model,
                self.targets,
                self.original,
                norms,
                self.args.offload_learned,
                self.args.masked_forward,
                self.args.wanted,
                exchange=not self.args.torch_compile,
            )
        self.layers = layers

    @contextlib.contextmanager
    def computing(self, states: Callable[[], Tensor]) -> Iterator[None]:
        """Inside, the model holds what the loss is taken of; the learned weights are back afterwards.

        Args:
            states: of the batch, (B, T, V) logits or (B, T, H) last hidden states where there is a ``head``, by the
                weights that the model holds when it is called.
        """
        if not self.turns:
            yield
            return
        self._step_layers(states)
        with self.turns.away():
            if self.args.distill and self.teacher is None:
                self.turns.put_original()
                self.teacher = states()
            (self.turns.put_masked if self.args.masked_forward else self.turns.put_learned)()
            yield
        self.teacher = None

    def _step_layers(self, states: Callable[[], Tensor]) -> None:
        """One step of every layer; the dense model's states stay as the teacher's, if there is one."""
        self.layer_error = None
        pace = self.layers.pace() if self.layers and self.layers.own else None
        if not (self.turns and self.layers and pace):
            return
        with self.turns.away():
            self.turns.put_original()
            with self.layers.watching():
                self.teacher = states()
            if not self.args.distill:
                self.teacher = None
            if self.layers.own:  # which the first look decides
                self.turns.put_masked()
                self.layer_error = self.layers.step(self.turns, pace)
                self.record("layer_error", self.layer_error)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model holds what will be deployed: W0 under the current mask, where it is at hand."""
        if not (self.turns and self.args.masked_forward):
            yield
            return
        with self.turns.away():
            self.turns.put_masked()
            yield

    def learned(self, parameter: nn.Parameter) -> contextlib.AbstractContextManager:
        """Inside, a parameter holds what it learns, not what the forward pass saw."""
        return self.turns.learned(parameter) if self.turns else contextlib.nullcontext()

    def loss(self, states: Tensor, labels: Tensor, share: Share) -> Tensor:
        """Distillation or the language-model loss of a micro-batch, without the penalty.

        Args:
            states: (B, T, V) logits, or (B, T, H) last hidden states where the teacher's are given and ``head`` is set.
            labels: (B, T) token ids; -100 is left out.
        """
        states, labels = states[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        teacher = None if self.teacher is None else self.teacher[:, :-1].flatten(0, 1)
        self.teacher = None  # not kept through the backward pass
        kept = labels != -100
        tokens = kept.sum()
        if tokens < len(labels):  # else selecting them would only copy the logits, which are large
            states, labels = states[kept], labels[kept]
            teacher = None if teacher is None else teacher[kept]
        distilled: Tensor | None
        if teacher is not None and self.head is not None:
            mixture = (self.args.distill, self.args.temperature)
            loss, distilled, lm = loss_through_head(states, teacher, self.head, labels, *mixture)
        else:
            loss, distilled, lm = self._of_logits(states, labels, teacher)
        if distilled is not None:
            self.record("kl", distilled / tokens)
        self.record("lm_loss", lm / tokens)
        # As in SFTTrainer: num_items_in_batch counts the tokens of all micro-batches and ranks.
        return loss / (tokens if share.tokens is None else share.tokens) * share.processes

    def _of_logits(
        self, logits: Tensor, labels: Tensor, teacher: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The loss, the distillation in it, and the language-model loss; sums over the positions."""
        weight = 0.0 if teacher is None else self.args.distill
        lm_counts = weight < 1  # else it is logged only
        lm = cross_entropy(logits.float(), labels, reduction="sum") if lm_counts else lm_loss(logits, labels)
        loss: Any = (1 - weight) * lm if lm_counts else 0.0
        if teacher is None:
            return loss, None, lm
        distilled = distillation_loss(logits, teacher, self.args.temperature)
        return weight * distilled + loss, distilled, lm

    def penalty(self, share: Share, device: torch.device | str) -> Tensor | float:
        """The frozen-weight term, 0 without it."""
        if not self.args.project_lambda2:
            return 0.0
        assert self.original is not None
        penalty = torch.zeros((), device=device)
        for target in self.targets:
            # Of a shard, its rows: gradients of rows elsewhere are made where they are.
            base = self.original.of(target)
            unit = self.units.get(target.name, 1.0)
            epsilon = self.args.epsilon * unit
            penalty = penalty + frozen_weight_penalty(local(target.weight), base, epsilon) / unit**2
        term = self.args.lambda2_value * penalty
        self.record("lambda2_loss", total(term.detach(), self.targets[0].weight))
        return term / share.steps
