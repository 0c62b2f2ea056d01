"""Recover what pruning cost: the kept weights learn from the dense model, and the mask stays as it is.

    recover(pruned, dense, mask, tokenizer, windows)          # the pruned model changes in place
    save_pruned(pruned, mask, "recovered")

The result is a model whose weights were updated. It is never to be compared with a mask on the original weights without
saying so.

    full     the kept weights of every pruned matrix, and all gains and biases of the layers
    norms    gains and biases alone: every matrix stays as it is, bit for bit
    layer    as full, one layer after the other: its outputs come close to the dense layer's (``recover_layers``)

Embeddings and the LM head never move. Learning rates are relative: a rate of 0.001 moves a weight by a thousandth of
its matrix's root mean square per step.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.training_args import OptimizerNames

from proxsparse.errors import UsageError, settings_at_fault
from proxsparse.learning.checks import check_choices_of_transformers, check_inputs, check_values
from proxsparse.learning.config import TrainingConfig
from proxsparse.learning.distilling import DistillingTrainer
from proxsparse.learning.folder import DECISIVE as OF_TRAINING
from proxsparse.learning.head import plain_head
from proxsparse.learning.keep import KeepMask
from proxsparse.learning.layers import check_layers, layers_done, recover_layers
from proxsparse.learning.learn import defaults_on
from proxsparse.learning.objective import Objective, Share
from proxsparse.learning.optim import name_of, scale_learning_rates
from proxsparse.learning.progress import show_progress
from proxsparse.learning.refusals import Refusal
from proxsparse.mask import Mask, apply_mask, fit_mask, is_pruned_by
from proxsparse.model.channels import put_into_order, recall_order
from proxsparse.model.hub_errors import quiet_bars
from proxsparse.model.inputs import digest
from proxsparse.model.loading import resolve_device
from proxsparse.model.prunable import decoder_of
from proxsparse.model.restoring import restored
from proxsparse.record import read_record
from proxsparse.resume import RUN_FILE, alone_in, claim, starting_point

SCOPES = ("full", "norms", "layer")
DECISIVE = (
    "scope", "distill", "temperature", "rounding", "optim", "seed", "num_train_epochs", "per_device_train_batch_size",
    "weight_decay", "lr_scheduler_type", *OF_TRAINING,
)  # fmt: skip
# The rate of full is the better of two on SmolLM2-135M; the others are not tuned.
RATES = {"full": 1.5e-3, "norms": 5e-3, "layer": 1.5e-3}
REFUSALS = (
    Refusal(
        lambda c: c.distill and (c.label_smoothing_factor or c.loss_type != "nll"),
        "`label_smoothing_factor` and `loss_type` change the language-model loss, and distillation takes its place: "
        "leave them out, or use `distill=0`.",
    ),
    Refusal(
        lambda c: c.scope == "layer" and (c.distill != 1 or c.temperature != 1),
        "`scope=layer` compares the outputs of layers, which have no `distill` and no `temperature`: leave both out.",
    ),
    Refusal(
        lambda c: c.scope == "layer" and (c.max_steps > 0 or c.gradient_accumulation_steps > 1),
        "`scope=layer` sees every window `num_train_epochs` times in each layer, and steps after each batch: leave "
        "`max_steps` and `gradient_accumulation_steps` out.",
    ),
    Refusal(
        lambda c: c.scope == "layer" and name_of(c) != "adafactor",
        "`scope=layer` steps with adafactor; got `optim={0.optim}`.",
    ),
)


@dataclass
class RecoveryConfig(TrainingConfig):
    """Settings of a recovery: those of SFTConfig, and a few of its own.

    Raises:
        UsageError: a value is not accepted.
    """

    scope: str = field(default="full", metadata={"help": f"what learns: {', '.join(SCOPES)}"})
    distill: float = field(
        default=1.0, metadata={"help": "share of the loss that is KL to the dense model; the rest is the text's"}
    )
    learning_rate: float = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "the peak learning rate, relative to each matrix's root mean square"},
    )
    optim: OptimizerNames | str = field(default="adafactor", metadata={"help": "the Trainer's optimizer"})
    warmup_steps: float = field(default=0.05, metadata={"help": "steps of warm-up; below 1, a share of all steps"})

    def __post_init__(self):
        if self.scope not in SCOPES:
            raise UsageError(f"`scope` must be one of {', '.join(SCOPES)}; got {self.scope!r}.")
        if self.learning_rate is None:
            self.learning_rate = RATES[self.scope]
        check_values(self, REFUSALS)
        with settings_at_fault():
            super().__post_init__()
        check_choices_of_transformers(self)


class FromDense(Objective):
    """The loss of a model that learns from another one, which does not change."""

    @contextlib.contextmanager
    def computing(self, states: Callable[[], Tensor]) -> Iterator[None]:
        if self.args.distill:
            self.teacher = states()
        yield
        self.teacher = None

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        yield

    def penalty(self, share: Share, device: torch.device | str) -> Tensor | float:
        return 0.0


class RecoveryTrainer(DistillingTrainer):
    """SFTTrainer that distils the dense model into the weights that a mask keeps.

    Args:
        model: the pruned model.
        args: its scope is full or norms.
        dense: the model as it was before it was pruned, on the same device.
        mask: the mask of the pruned model.
        kwargs: see ``DistillingTrainer``.

    Raises:
        UsageError: the mask does not fit the model, or nothing in it can learn in this scope.
    """

    purpose = "recovery"

    def __init__(
        self, model: PreTrainedModel, args: RecoveryConfig, *, dense: PreTrainedModel, mask: Mask, **kwargs: Any
    ):
        targets = apply_mask(model, mask)
        self.learning = choose_weights(model, args.scope, {target.name for target in targets})
        self.dense = dense.eval().requires_grad_(False)
        self.objective = FromDense(args, targets, self._record)
        callbacks = [KeepMask(mask)] if args.scope == "full" else []
        super().__init__(model, args, callbacks=[*callbacks, *kwargs.pop("callbacks", [])], **kwargs)
        if self.model.device.type != "cpu" and args.distill:
            self.objective.head = common_head(self.model, self.dense)

    def _teacher(self, model, inputs) -> Tensor:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager(), self.accelerator.autocast():
            outputs = self._outputs(self.dense, inputs, self.objective.head, self.dense)
        return outputs if self.objective.head else outputs.logits

    def create_optimizer(self, model=None):
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            scale_learning_rates(optimizer, {id(weight): scale_of(weight) for weight in self.learning})
        return optimizer


def common_head(model: PreTrainedModel, dense: PreTrainedModel) -> nn.Linear | None:
    """The LM head, where it is all there is to the logits of both models, and the same in both."""
    own, other = plain_head(model), plain_head(dense)
    if own is None or other is None or not torch.equal(own.weight, other.weight):
        return None
    biases = [head.bias for head in (own, other) if head.bias is not None]
    return own if not biases or (len(biases) == 2 and torch.equal(*biases)) else None


def choose_weights(model: PreTrainedModel, scope: str, pruned: set[str]) -> list[nn.Parameter]:
    """The weights that learn in a scope; the others are frozen.

    Args:
        pruned: names of the pruned weights.

    Raises:
        UsageError: there are none.
    """
    inside = {id(parameter) for parameter in decoder_of(model).parameters()}
    for name, parameter in model.named_parameters():
        small = parameter.dim() <= 1 and id(parameter) in inside
        parameter.requires_grad_(small or (scope != "norms" and name in pruned))
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise UsageError(f"A {type(model).__name__} has neither gains nor biases: use `scope=full`.", "scope")
    return found


@torch.no_grad()
def scale_of(weight: Tensor) -> float:
    """Root mean square of the entries that are not zero; 1 where all are, as biases are at times."""
    values = weight.float()
    count = int(values.count_nonzero())
    return float(values.square().sum() / count) ** 0.5 if count else 1.0


def recover(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    mask: Mask,
    tokenizer: PreTrainedTokenizerBase,
    windows: Tensor,
    output_dir: Path | str | None = None,
    *,
    device: str | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Update the kept weights of a pruned model so that it computes more of what the dense model does, in place.

    Args:
        model: the pruned model, float32 or bfloat16. It is pruned, if it is not.
        dense: the model before it was pruned, on the same device. Its channels take the mask's order.
        mask: the mask. ``proxsparse.mask_of_pruned`` takes it from the zeros of a pruned model.
        tokenizer: tokenizer of both.
        windows: (N, T) token ids to learn from; each is seen once.
        output_dir: folder for checkpoints. The same call again goes on from the last one. None: nothing is written.
        device: to compute on; None: where the model is. With ``scope="layer"`` both models may wait on the CPU.
        settings: fields of ``RecoveryConfig``, such as ``scope="norms"``.

    Returns:
        The Trainer's log.

    Raises:
        UsageError: a setting is wrong, the mask or the dense model does not fit, or the folder holds another run.
        RunError: the run diverged.
    """
    check_inputs(model, tokenizer, windows)
    _check_given(model, dense, mask)
    kind = torch.device(resolve_device(device or str(model.device))).type
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("Recovery runs in one process: start it without accelerate launch or torchrun.")
    if kind == "cuda" and torch.cuda.device_count() > 1:
        raise UsageError("Recovery uses one GPU: choose it with CUDA_VISIBLE_DEVICES.")
    with tempfile.TemporaryDirectory() as scratch:
        kept_nowhere: dict[str, Any] = {} if output_dir else {"save_strategy": "no"}
        defaults = defaults_on(kind) | kept_nowhere | {"output_dir": str(output_dir or scratch)}
        with settings_at_fault():
            config = RecoveryConfig(**(defaults | settings), max_length=windows.shape[1])
        recall_order(dense)
        if is_pruned_by(mask, fit_mask(dense, mask)):
            raise UsageError(
                f"The dense model {dense.config._name_or_path} is pruned by the mask already: give the model that was "
                "pruned.",
                "base",
            )
        with restored(model, weights=False), restored(dense, weights=False):
            put_into_order(dense, mask.order)  # so that hidden states can be compared; it computes the same
            return _run(model, dense, mask, tokenizer, windows, config)


def _check_given(model: PreTrainedModel, dense: PreTrainedModel, mask: Mask) -> None:
    if not isinstance(mask, Mask):
        raise UsageError(f"`mask` must be a mask, as load_mask returns it; got {type(mask).__name__}.", "mask")
    if not isinstance(dense, PreTrainedModel):
        raise UsageError(f"`dense` must be a model, as load_model returns it; got {type(dense).__name__}.", "base")
    if dense is model:
        raise UsageError("`dense` is the pruned model itself: load the dense one next to it.", "base")
    shapes = {name: parameter.shape for name, parameter in dense.named_parameters()}
    if shapes != {name: parameter.shape for name, parameter in model.named_parameters()}:
        raise UsageError(
            f"The dense model {dense.config._name_or_path} has other weights than the pruned one: give the model that "
            "was pruned.",
            "base",
        )


def _run(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    mask: Mask,
    tokenizer: PreTrainedTokenizerBase,
    windows: Tensor,
    config: RecoveryConfig,
) -> list[dict[str, Any]]:
    folder = Path(str(config.output_dir))
    settings = {name: str(getattr(config, name)) for name in DECISIVE} | {
        "model": model.config._name_or_path,
        "base": dense.config._name_or_path,
        "mask": digest_of(mask),
        "text": digest(windows),
    }
    checkpoint = starting_point(folder, config.resume_from_checkpoint)
    if (folder / RUN_FILE).is_file() and "scope" not in read_record(folder / RUN_FILE, needs="settings")["settings"]:
        raise UsageError(f"{folder} holds a run of learning: give another `output_dir`.", "output_dir")
    progress = checkpoint is not None or layers_done(folder)
    claim(folder, {"settings": settings if progress else {}}, write=False)
    if config.scope == "layer":
        model.eval()  # dropout would hide what a layer computes
        check_layers(model, windows)
        targets = apply_mask(model, mask)
        learning = choose_weights(model, config.scope, {target.name for target in targets})
        with alone_in(folder):
            _claim(folder, settings, progress)
            moving = {id(weight) for weight in learning}
            scales = {name: scale_of(p) for name, p in model.named_parameters() if id(p) in moving}
            return recover_layers(model, dense.eval(), mask, windows, config, scales)
    disable_progress_bars()
    rows = Dataset.from_dict({"input_ids": windows.tolist()})
    dense.to(config.device)  # type: ignore[arg-type]
    trainer = RecoveryTrainer(model, config, dense=dense, mask=mask, train_dataset=rows, processing_class=tokenizer)
    show_progress(trainer)
    with quiet_bars(), alone_in(folder):
        _claim(folder, settings, progress)
        trainer.train(resume_from_checkpoint=checkpoint)
    return trainer.state.log_history


def _claim(folder: Path, settings: dict[str, str], progress: bool) -> None:
    """Write down whose recovery this is; one that has not come to a checkpoint leaves nothing that could be lost."""
    if not progress:
        (folder / RUN_FILE).unlink(missing_ok=True)
    claim(folder, {"settings": settings})


def digest_of(mask: Mask) -> str:
    """SHA-256 of all entries of a mask, by name."""
    found = hashlib.sha256()
    for name, kept in sorted(mask.tensors.items()):
        found.update(name.encode())
        found.update(np.packbits(kept.numpy()).tobytes())
    return found.hexdigest()
