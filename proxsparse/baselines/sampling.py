"""Learning a mask by sampling: what MaskLLM (``maskllm``) and RoI (``roi``) share. Weights are frozen, logits move.

Every block of M has K logits p. The forward pass sees W0 times a soft mask, which a method makes of
(kappa p + g) / tau with Gumbel noise g; over the run tau falls and kappa rises, so that the choice hardens.

Shapes: O = out_features, I = in_features. The K logits come first, (K, O, I / M), so that what is done to them runs
along long rows.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from proxsparse.baselines.layerwise import prune_layerwise
from proxsparse.errors import RunError, UsageError, doing, settings_at_fault
from proxsparse.mask import Mask
from proxsparse.model.channels import order_of
from proxsparse.model.inputs import weight_sum
from proxsparse.model.loading import native_bf16
from proxsparse.model.prunable import Prunable, check_model, find_prunable
from proxsparse.model.restoring import restored
from proxsparse.model.trainable import clean_generation_config, window_collator
from proxsparse.model.windows import check_tokenizer, check_windows
from proxsparse.operator.pattern import TWO_OF_FOUR, Pattern
from proxsparse.operator.rounding import noise_seed
from proxsparse.resume import claim, complete_checkpoints, last_complete_checkpoint

INITIAL_STD = 0.01
COOLINGS = ("linear", "exponential")
LOGITS_FILE = "mask_logits.safetensors"
DECISIVE = (
    "tau", "kappa", "cooling", "cooled_by", "prior_strength", "keep_large", "learning_rate", "lr_scheduler_kwargs",
    "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "warmup_steps", "max_steps",
    "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed", "include",
    "exclude",
)  # fmt: skip


@dataclass
class SampledConfig(SFTConfig):
    """SFTConfig with MaskLLM's settings; the step count is the number of samples, where its paper takes 2,000.

    Attributes:
        tau: temperature at the first step and at the end.
        kappa: scale of the logits at the first step and at the end.
        cooling: how both move from the one to the other: 'linear' as in MaskLLM's paper, or 'exponential', by the same
            factor per step, as in RoI (https://arxiv.org/abs/2608.23048).
        cooled_by: share of the steps after which both stay at their ends.
        prior_strength: how far the prior moves the logits, in standard deviations of the first ones.
        keep_large: strength of the term that keeps large weights.
        include, exclude: of ``find_prunable``.
    """

    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 1
    learning_rate: float = 5e-4
    lr_scheduler_type: str = "cosine_with_min_lr"
    lr_scheduler_kwargs: dict | str | None = field(default_factory=lambda: {"min_lr_rate": 0.1})
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-5
    weight_decay: float = 0.1
    logging_steps: float = 0.1
    save_steps: float = 0.2
    save_total_limit: int | None = 1
    tau: tuple[float, float] = (4.0, 0.05)
    kappa: tuple[float, float] = (100.0, 500.0)
    cooling: str = "linear"
    cooled_by: float = 1.0
    prior_strength: float = 3.0
    keep_large: float = 1e-5
    include: str | None = None
    exclude: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.cooling not in COOLINGS:
            raise UsageError(f"`cooling` must be one of {', '.join(COOLINGS)}; got {self.cooling!r}.", "cooling")
        for name in ("tau", "kappa"):
            if min(getattr(self, name)) <= 0:
                raise UsageError(f"`{name}` must be above 0 at both ends; got {getattr(self, name)}.", name)
        if not 0 < self.cooled_by <= 1:
            raise UsageError(f"`cooled_by` must be above 0 and at most 1; got {self.cooled_by}.", "cooled_by")

    def heat(self, progress: float) -> tuple[float, float]:
        """tau and kappa after this share of the steps."""
        cooled = min(1.0, progress / self.cooled_by)
        between = _line if self.cooling == "linear" else _power
        return between(self.tau, cooled), between(self.kappa, cooled)


class SampledTrainer(SFTTrainer):
    """SFTTrainer that learns mask logits instead of weights. A method says what K logits of a block mean.

    Args:
        model: its weights at this moment are the ones to prune.
        prior: name -> bool mask with the input dimension last, which the logits start from; None for no prior.
        pattern: N:M of the mask.
    """

    method: ClassVar[str]
    config_class: ClassVar[type[SampledConfig]] = SampledConfig
    only: ClassVar[Pattern | None] = None  # the one pattern that the method learns
    args: SampledConfig
    model: PreTrainedModel

    def initial_logits(self, shape: tuple[int, ...], prior: Tensor | None, generator: torch.Generator) -> Tensor:
        """(K, ..., I / M) float32 logits that a weight of shape (..., I) begins with."""
        raise NotImplementedError

    def soft_mask(self, perturbed: Tensor) -> tuple[Tensor, Tensor]:
        """Soft mask of a sample, and what its gradient needs.

        Args:
            perturbed: (K, ..., I / M), (kappa p + Gumbel noise) / tau.

        Returns:
            (..., I), and any tensor.
        """
        raise NotImplementedError

    def of_perturbed(self, of_mask: Tensor, kept: Tensor) -> Tensor:
        """From the gradient of the soft mask, (..., I), to that of ``perturbed``; ``kept`` is of ``soft_mask``."""
        raise NotImplementedError

    def hard_mask(self, logits: Tensor) -> Tensor:
        """The most likely mask of every block: (K, ..., I / M) -> (..., I) bool."""
        raise NotImplementedError

    def __init__(
        self,
        model: PreTrainedModel,
        args: SampledConfig,
        *,
        prior: dict[str, Tensor] | None = None,
        pattern: Pattern = TWO_OF_FOUR,
        **kwargs,
    ):
        if self.only is not None and pattern != self.only:
            raise UsageError(f"{self.method} learns {self.only} masks only; got `pattern={pattern}`.", "pattern")
        if not pattern.is_nm:
            raise UsageError(f"{self.method} learns N:M masks only; got `pattern={pattern}`.", "pattern")
        self.pattern, self.args = pattern, args
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.targets: list[Prunable] = find_prunable(model, args.include, args.exclude, pattern.m)
        lacking = [] if prior is None else sorted({target.name for target in self.targets} - prior.keys())
        if lacking:
            raise UsageError(f"`prior` has no mask for {lacking[0]}: give one for every prunable weight.", "prior")
        generator = torch.Generator().manual_seed(args.seed)
        for target in self.targets:
            rows = target.rows(target.weight)
            given = None if prior is None else prior[target.name]
            logits = self.initial_logits(tuple(rows.shape), given, generator)
            target.module.register_parameter(_attribute(target), nn.Parameter(logits.to(rows.device)))
        super().__init__(model, args, **kwargs)
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise UsageError(
                f"{self.method} learns on one device: choose it with CUDA_VISIBLE_DEVICES, without accelerate launch."
            )
        for target in self.targets:
            target.weight.requires_grad_(True)  # for its gradient, from which the logits' is made; no optimizer sees it
        self.base = {t.name: t.weight.detach().clone() for t in self.targets}
        self._kept: dict[str, Tensor] = {}  # of this step, from the forward to the backward pass
        complete_checkpoints(self, self._save_logits)

    @classmethod
    def learn_mask(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        windows: Tensor,
        output_dir: Path | str,
        *,
        prior: dict[str, Tensor] | None = None,
        pattern: Pattern = TWO_OF_FOUR,
        **settings: Any,
    ) -> Mask:
        """Learn a mask on calibration windows, with one optimizer step per window.

        Args:
            windows: (N, T) token ids.
            output_dir: folder for checkpoints; a run that was stopped goes on from the last complete one.
            prior: name -> bool mask with the input dimension last, which the logits start from; None for no prior.
            pattern: N:M of the mask.
            settings: fields of the method's ``config_class``.

        Returns:
            The mask; the model is as it was.

        Raises:
            UsageError: the width of a weight is no multiple of M, or the method does not learn this pattern.
        """
        check_model(model)
        check_tokenizer(tokenizer)
        check_windows(windows, model.config)
        accelerated = model.device.type != "cpu"
        bf16 = accelerated and native_bf16(str(model.device))
        settings = {"use_cpu": not accelerated, "bf16": bf16, "activation_checkpointing": accelerated} | settings
        with settings_at_fault():
            config = cls.config_class(**settings, output_dir=str(output_dir), max_length=windows.shape[1])
        made_by = {name: getattr(config, name) for name in DECISIVE}  # given or not: a default may change
        made_by |= {"prune_method": cls.method, "sparsity_type": str(pattern)}
        claim(output_dir, _record(model, windows, prior, made_by), earlier={"include": "None", "exclude": "None"})
        data = Dataset.from_dict({"input_ids": windows.tolist()})
        given = {"train_dataset": data, "processing_class": tokenizer, "data_collator": window_collator(tokenizer)}
        with restored(model, weights=False):
            clean_generation_config(model)
            try:
                trainer = cls(model, config, prior=prior, pattern=pattern, **given)
                trainer.train(resume_from_checkpoint=last_complete_checkpoint(output_dir))
                return trainer.mask()
            finally:
                for target in find_prunable(model, multiple=1):
                    target.module._parameters.pop(_attribute(target), None)

    def logits(self, target: Prunable) -> nn.Parameter:
        """(K, O, I / M) float32 logits of one weight."""
        return getattr(target.module, _attribute(target))

    def _save_logits(self, folder: Path) -> None:
        logits = {t.name: self.logits(t).detach().contiguous() for t in self.targets}
        save_file(logits, folder / LOGITS_FILE)  # under the names of their weights, which transformers may change

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Only logits have moved; the weights are those given."""
        stored = load_file(Path(resume_from_checkpoint) / LOGITS_FILE)
        with torch.no_grad():
            for target in self.targets:
                self.logits(target).copy_(stored[target.name])

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            logits = [self.logits(t) for t in self.targets]
            self.optimizer = cls([{"params": logits, "weight_decay": self.args.weight_decay}], **options)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        step = self.state.global_step + 1
        with doing(f"step {step} of learning"):
            with self._soft_masks():
                loss = super().training_step(model, inputs, num_items_in_batch)
                self._gradients_of_logits()
            if not loss.isfinite():
                raise RunError(f"The loss is {loss.item()} at step {step}; lower the learning rate.")
        return loss

    def mask(self) -> Mask:
        """The most likely mask of every block."""
        tensors = {t.name: self.hard_mask(self.logits(t).detach()).cpu() for t in self.targets}
        return Mask(tensors, self.pattern, order=order_of(self.model))

    @contextlib.contextmanager
    def _soft_masks(self) -> Iterator[None]:
        """Parameters hold W0 times the sampled soft mask inside the block."""
        try:
            with torch.no_grad():
                for place, target in enumerate(self.targets):
                    soft, self._kept[target.name] = self.soft_mask(self._perturbed(place, target))
                    target.rows(target.weight).copy_(target.rows(self.base[target.name]) * soft)
            yield
        finally:
            with torch.no_grad():
                for target in self.targets:
                    target.weight.copy_(self.base[target.name])

    @torch.no_grad()
    def _gradients_of_logits(self) -> None:
        """From each weight's gradient to its logits'."""
        progress = self.state.global_step / self.state.max_steps
        tau, kappa = self.args.heat(progress)
        steps = self.current_gradient_accumulation_steps
        for target in self.targets:
            kept = self._kept.pop(target.name)
            gradient, target.weight.grad = target.weight.grad, None
            if gradient is None:  # an expert that saw no token
                continue
            rows, base = target.rows(target.weight).float(), target.rows(self.base[target.name]).float()
            # The second term is the paper's: it keeps large weights, so that gradients do not vanish.
            keep = 2 * self.args.keep_large * (1 - progress) / steps
            of_mask = (target.rows(gradient).float() - keep * rows) * base
            of_logits = self.of_perturbed(of_mask, kept) * (kappa / tau)
            logits = self.logits(target)
            logits.grad = of_logits if logits.grad is None else logits.grad.add_(of_logits)

    def _perturbed(self, place: int, target: Prunable) -> Tensor:
        """(kappa p + g) / tau, (K, O, I / M). Seed, step and place alone decide the noise: a resumed run redraws it."""
        step = self.state.global_step
        tau, kappa = self.args.heat(step / self.state.max_steps)
        logits = self.logits(target).detach()
        generator = torch.Generator(logits.device).manual_seed(noise_seed(self.args.seed, step, place))
        # Gumbel noise by inversion: on CPUs torch's exponential_ takes longer than all of this.
        noise = torch.empty_like(logits).uniform_(generator=generator).log_().neg_().log_().neg_()
        scaled = noise.add_(logits, alpha=kappa)
        return scaled.div_(tau)


def _record(model: PreTrainedModel, windows: Tensor, prior: dict[str, Tensor] | None, settings: dict) -> dict:
    """What a run learns from, for its claim."""
    digest = hashlib.sha256(windows.numpy().tobytes())
    for name, kept in sorted((prior or {}).items()):
        digest.update(name.encode() + kept.numpy().tobytes())
    for name, index in order_of(model).packed().items():  # sums of weights do not tell it
        digest.update(name.encode() + index.numpy().tobytes())
    record = {"model": str(model.config._name_or_path), "weights": weight_sum(model), "dataset": digest.hexdigest()}
    return {"settings": record | {name: str(value) for name, value in settings.items()}}


def one_shot_prior(
    model: PreTrainedModel, windows: Tensor, method: Any, pattern: Pattern = TWO_OF_FOUR, **options: Any
) -> dict[str, Tensor]:
    """Mask of a one-shot method for the original weights; the model's weights stay as they are.

    Args:
        windows: (N, T) token ids.
        method: one of ``proxsparse.baselines.ONE_SHOT``.
        pattern: N:M of the mask.
        options: arguments of ``prune_layerwise``.
    """
    targets = find_prunable(model, options.get("include"), options.get("exclude"), pattern.m)
    kept = {t.name: t.weight.detach().to("cpu", copy=True) for t in targets}
    try:
        return prune_layerwise(model, windows, method, pattern, update=False, **options).tensors
    finally:
        with torch.no_grad():
            for target in targets:
                target.weight.copy_(kept[target.name])


def _attribute(target: Prunable) -> str:
    return f"{target.attribute}_mask_logits"


def _line(ends: tuple[float, float], progress: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * progress


def _power(ends: tuple[float, float], progress: float) -> float:
    return ends[0] * (ends[1] / ends[0]) ** progress
