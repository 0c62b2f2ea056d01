"""What every baseline has: one call that prunes a model, whether the method is one-shot or learns.

A one-shot method adds two members: ``statistic(target)`` makes what it collects of a weight's inputs (or None), and
``prune(rows, statistic, pattern)`` returns (mask, new weights or None).
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from proxsparse.baselines.allocation import allocate
from proxsparse.baselines.layerwise import prune_layerwise
from proxsparse.errors import UsageError
from proxsparse.mask import Mask, apply_mask
from proxsparse.model.loading import cast_weights
from proxsparse.model.prunable import Prunable
from proxsparse.operator.pattern import TWO_OF_FOUR, Pattern

if TYPE_CHECKING:
    from proxsparse.baselines.sampling import SampledTrainer


INPUTS = ("pruned", "dense")


@dataclass
class Wanted:
    """What a method is asked for, next to a model and a text; each method reads what concerns it.

    Attributes:
        pattern: pattern of the mask; where the allocation is not uniform, on average over the layers.
        allocation: see ``allocation.allocate``.
        inputs: whose inputs weights are scored by: 'pruned' (the layers before are pruned already, as in the methods'
            papers) or 'dense' (they are not yet).
        update: keep the new weights of a method that changes them; False keeps its mask on the original weights.
        prior: one-shot method whose mask a learned one starts from, or None.
        cooling: how a learned method's temperature falls, 'linear' or 'exponential'; None: as its paper has it.
        hidden_device: where the hidden states of the calibration walk are kept between layers.
        bf16: compute in bfloat16 autocast; None: what suits the method and the device.
        seed: seed of a learned method's noise.
        folder: where a learned method keeps its checkpoints, from which it goes on after a stop.
        include, exclude: of ``find_prunable``.
    """

    pattern: Pattern = TWO_OF_FOUR
    allocation: str = "uniform"
    inputs: str = "pruned"
    update: bool = True
    prior: "OneShot | None" = None
    cooling: str | None = None
    hidden_device: str = "cpu"
    bf16: bool | None = None
    seed: int = 0
    folder: Path | None = None
    include: str | None = None
    exclude: str | None = None

    def __post_init__(self) -> None:
        if self.inputs not in INPUTS:
            raise UsageError(f"`inputs` must be one of {', '.join(INPUTS)}; got {self.inputs!r}.", "inputs")

    @property
    def choice(self) -> dict[str, Any]:
        """Which weights, as keywords."""
        return {"include": self.include, "exclude": self.exclude}

    def refuse_inputs(self) -> None:
        """For methods that score no weight by its inputs.

        Raises:
            UsageError: other inputs than usual are asked for.
        """
        if self.inputs != INPUTS[0]:
            raise UsageError("`inputs` belongs to the one-shot methods that read text: leave it out.", "inputs")


class Method(Protocol):
    """A baseline.

    Attributes:
        updates_weights: whether it changes the weights that it keeps.
        reads_text: whether it needs calibration windows.
    """

    updates_weights: ClassVar[bool]
    reads_text: ClassVar[bool]

    def check(self, wanted: Wanted) -> None:
        """Refuse what the method can't do; called before a model is loaded.

        Raises:
            UsageError: says what is not possible.
        """

    def prune_model(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Tensor, wanted: Wanted
    ) -> Mask:
        """Prune a model in place.

        Args:
            windows: (N, T) calibration token ids.
        """

    def forget(self, wanted: Wanted) -> None:
        """Remove what was kept for going on after a stop; called when the result has been written."""


class OneShot:
    """A method that prunes every weight once, on the calibration walk (``layerwise``)."""

    updates_weights: ClassVar[bool] = False
    reads_text: ClassVar[bool] = True

    def statistic(self, target: Prunable) -> Any:
        raise NotImplementedError

    def prune(self, rows: Tensor, statistic: Any, pattern: Pattern) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def check(self, wanted: Wanted) -> None:
        """Every pattern is fine."""
        if wanted.cooling is not None:
            raise UsageError("`cooling` belongs to the methods that learn a mask: leave it out.", "cooling")
        if not self.reads_text:
            wanted.refuse_inputs()

    def prune_model(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Tensor, wanted: Wanted
    ) -> Mask:
        return prune_layerwise(
            model,
            windows,
            self,
            allocate(model, wanted.pattern, wanted.allocation, windows, **wanted.choice),
            update=wanted.update,
            hidden_device=wanted.hidden_device,
            bf16=bool(wanted.bf16),
            dense_inputs=wanted.inputs == "dense",
            progress=f"{type(self).__name__.lower()} {wanted.pattern}",
            **wanted.choice,
        )

    def forget(self, wanted: Wanted) -> None:
        """Nothing is kept."""


class Learned:
    """A method that learns its mask by sampling (``sampling``)."""

    updates_weights: ClassVar[bool] = False
    reads_text: ClassVar[bool] = True

    def check(self, wanted: Wanted) -> None:
        """Every layer keeps the same share."""
        if wanted.allocation != "uniform":
            name = type(self).__name__.lower()
            raise UsageError(f"`prune_method={name}` keeps the same share in every layer: leave `allocation` out.")
        wanted.refuse_inputs()

    def trainer(self) -> "type[SampledTrainer]":
        """TRL takes seconds to import, so it is imported only when the method learns."""
        raise NotImplementedError

    def prune_model(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Tensor, wanted: Wanted
    ) -> Mask:
        from proxsparse.baselines.sampling import one_shot_prior

        assert wanted.folder is not None
        options: dict[str, Any] = {"hidden_device": wanted.hidden_device, "bf16": bool(wanted.bf16)}
        prior = None
        if wanted.prior is not None:
            prior = one_shot_prior(model, windows, wanted.prior, wanted.pattern, **wanted.choice, **options)
        if model.dtype == torch.float16:
            cast_weights(model, torch.bfloat16)  # as in learning: gradients underflow in float16
        settings: dict[str, Any] = {"seed": wanted.seed}
        settings |= {name: value for name in ("bf16", "cooling") if (value := getattr(wanted, name)) is not None}
        settings |= {"prior": prior, "pattern": wanted.pattern} | wanted.choice
        mask = self.trainer().learn_mask(model, tokenizer, windows, wanted.folder, **settings)
        apply_mask(model, mask)
        return mask

    def forget(self, wanted: Wanted) -> None:
        if wanted.folder is not None:
            shutil.rmtree(wanted.folder, ignore_errors=True)


class MaskLLM(Learned):
    """Learns which of the six 2:4 masks each block takes, see ``maskllm``."""

    def check(self, wanted: Wanted) -> None:
        if wanted.pattern != TWO_OF_FOUR:
            raise UsageError(f"`prune_method=maskllm` learns 2:4 masks only; got `sparsity_type={wanted.pattern}`.")
        super().check(wanted)

    def trainer(self) -> "type[SampledTrainer]":
        from proxsparse.baselines.maskllm import MaskLLMTrainer

        return MaskLLMTrainer


class RoI(Learned):
    """Learns which N of every M weights are kept, with one logit per weight, see ``roi``."""

    def check(self, wanted: Wanted) -> None:
        if not (wanted.pattern.structured and wanted.pattern.n):
            raise UsageError(f"`prune_method=roi` learns N:M masks only; got `sparsity_type={wanted.pattern}`.")
        super().check(wanted)

    def trainer(self) -> "type[SampledTrainer]":
        from proxsparse.baselines.roi import RoITrainer

        return RoITrainer
