"""Configuration of a learning run: TRL's SFTConfig and what ProxSparse adds.

The paper's method and this project's default differ only in the values of these fields; ``METHODS`` lists both.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers.training_args import OptimizerNames
from trl import SFTConfig

from proxsparse.errors import UsageError, settings_at_fault
from proxsparse.learning.checks import OF_MASKS, check_choices_of_transformers, check_values
from proxsparse.learning.objective import REFUSALS as OF_OBJECTIVES
from proxsparse.learning.optim import REFUSALS as OF_OPTIMIZERS
from proxsparse.model.channels import PERMUTE_HELP
from proxsparse.operator.pattern import TWO_OF_FOUR, Pattern

# Defaults by method; a value the user gives wins.
METHODS: dict[str, dict[str, Any]] = {
    # Liu et al. 2025: fine-tune all weights on the language-model loss, shrink, keep |w|. Their lambda and rate are
    # absolute and were tuned model by model (``ABSOLUTE``). Relative ones fit weights of any scale.
    "paper": {
        "score": "weight",
        "masked_forward": False,
        "distill": 0.0,
        "relative": True,
        "lambda_ramp": 0.5,
        "train_only_pruned": False,
        "layer_rate": 0.0,
        "learning_rate": 5e-3,
        "lambda_value": 2e-2,
        "optim": "adamw_torch_fused",
        "adam_beta2": 0.999,
        "warmup_steps": 0.1,
    },
    # The measured best (BENCHMARKS.md): train on what will be deployed, W0 under the mask, towards the dense model.
    "masked": {
        "score": "activation",
        "masked_forward": True,
        "distill": 1.0,
        "relative": True,
        "lambda_ramp": 0.5,
        "train_only_pruned": True,
        "layer_rate": 2.0,
        "learning_rate": 5e-3,
        "lambda_value": 2e-3,
        "optim": "adafactor",  # measured better than AdamW, at no memory
        "adam_beta2": 0.95,
        "warmup_steps": 0.05,
    },
}
# Of the paper's method where the user gives lambda or the rate, as the published recipes do.
ABSOLUTE: dict[str, Any] = {"relative": False, "lambda_ramp": 0.0, "learning_rate": 1e-4, "lambda_value": 0.25}


UNSET: Any = None  # filled in from METHODS


@dataclass
class TrainingConfig(SFTConfig):
    """SFTConfig with other defaults, and the settings that learning a mask and recovering weights share."""

    # The Trainer's defaults that would hurt here. Weight decay would shrink kept and pruned weights alike, which
    # blurs what lambda1 does; the paper uses none. Dropout is what the model's configuration says (zero in current
    # decoders). One epoch: a mask sees each sample once.
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 1
    per_device_eval_batch_size: int = 1
    weight_decay: float = 0.0
    lr_scheduler_type: str = "linear"
    logging_steps: float = 0.02
    save_steps: float = 0.1
    save_total_limit: int | None = 2
    seed: int = 42
    temperature: float = field(default=1.0, metadata={"help": "temperature of the distillation"})
    rounding: str = field(
        default="stochastic",
        metadata={"help": "rounding of bfloat16 weights: stochastic, or nearest (as upstream; it loses small steps)"},
    )


@dataclass
class ProxSparseConfig(TrainingConfig):
    """SFTConfig and the settings of ProxSparse. Every field is also a flag of ``end-to-end/main.py``.

    The help of a field says what it does. ``METHODS`` gives the defaults that depend on ``method``.

    Raises:
        UsageError: a value is not accepted, or two settings exclude each other.
    """

    learning_rate: float = field(default=UNSET, metadata={"help": "the peak learning rate"})
    optim: OptimizerNames | str = field(
        default=UNSET, metadata={"help": "the Trainer's optimizer, for example adafactor or adamw_torch_fused"}
    )
    adam_beta2: float = field(default=UNSET, metadata={"help": "AdamW's second decay"})
    warmup_steps: float = field(default=UNSET, metadata={"help": "steps of warm-up; below 1, a share of all steps"})

    method: str = field(default="masked", metadata={"help": f"preset of the settings below: {', '.join(METHODS)}"})
    pattern: str = field(
        default=str(TWO_OF_FOUR),
        metadata={"help": "N:M: every block of M weights keeps N; patterns other than 2:4 are learned without lambda1"},
    )
    lambda_value: str = field(  # 'auto', or a number; text here because the flag's parser takes one type
        default=UNSET,
        metadata={
            "help": "lambda1, strength of the 2:4 regulariser, applied once per step; auto: feedback sets it so that "
            "target_share of the blocks are 2:4 at the end"
        },
    )
    target_share: float = field(default=0.95, metadata={"help": "share of 2:4 blocks that lambda_value auto aims at"})
    project_lambda2: int = field(default=0, metadata={"help": "1: add the frozen-weight regulariser (lambda2)"})
    lambda2_value: float = field(default=0.0, metadata={"help": "lambda2, strength of the frozen-weight regulariser"})
    epsilon: float = field(default=0.1, metadata={"help": "epsilon of the frozen-weight regulariser, > 0"})
    score: str = field(
        default=UNSET,
        metadata={"help": "what a block compares: weight (|w|) or activation (|w| times the norm of its input)"},
    )
    masked_forward: bool = field(
        default=UNSET, metadata={"help": "compute the loss with the masked original weights, straight-through"}
    )
    distill: float = field(
        default=UNSET,
        metadata={"help": "share of the loss that is KL to the dense model; the rest is the language-model loss"},
    )
    layer_rate: float = field(
        default=UNSET,
        metadata={
            "help": "learning rate of the layer-wise steps, in which each layer learns to compute what the dense layer "
            "computes, relative to learning_rate; 0: none"
        },
    )
    layer_steps: int = field(
        default=100,
        metadata={"help": "optimizer steps that begin with layer-wise steps; the later ones follow the loss alone"},
    )
    layer_span: int = field(
        default=4, metadata={"help": "neighbouring layers that learn together in a layer-wise step"}
    )
    relative: bool = field(
        default=UNSET,
        metadata={
            "help": "take lambda1, lambda2, epsilon and the learning rate relative to each matrix's root mean square; "
            "with paper, default: true, but false where lambda_value or learning_rate is given"
        },
    )
    lambda_ramp: float = field(
        default=UNSET, metadata={"help": "share of the steps over which lambda1 rises from zero"}
    )
    train_only_pruned: bool = field(
        default=UNSET, metadata={"help": "freeze embeddings, norms, biases and the LM head"}
    )
    keep_base: str = field(
        default="device",
        metadata={
            "help": "where the original weights are kept: device, cpu, or checkpoint (read again from its files, one "
            "weight at a time)"
        },
    )
    offload_learned: bool = field(
        default=False,
        metadata={
            "help": "keep the learned weights on the CPU while the masked ones compute: slower, one copy less on the "
            "device"
        },
    )
    optim_in_backward: bool = field(
        default=False,
        metadata={
            "help": "update each weight as soon as its gradient is ready, so that the gradients never exist all at "
            "once; not with gradient clipping, gradient accumulation or several processes"
        },
    )
    norm_samples: int = field(default=32, metadata={"help": "calibration samples that measure the input norms"})
    permute: str = field(default="none", metadata={"help": PERMUTE_HELP})
    include: str | None = field(
        default=None, metadata={"help": "prune only weights whose name matches this regular expression"}
    )
    exclude: str | None = field(
        default=None, metadata={"help": "leave out weights whose name matches this regular expression"}
    )

    def __post_init__(self):
        if self.method not in METHODS:
            raise UsageError(f"`method` must be one of {', '.join(METHODS)}; got {self.method!r}.")
        self.pattern = str(self.wanted)
        if self.lambda_value is None and self.wanted != TWO_OF_FOUR:
            self.lambda_value = 0.0  # type: ignore[assignment]
        for name, value in self._defaults().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.lambda_value = self._lambda()  # type: ignore[assignment]
        check_values(self, OF_OBJECTIVES, OF_OPTIMIZERS, OF_MASKS)
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.optim_in_backward:
            self.max_grad_norm = 0.0  # the norm of all gradients is known only when the first ones are gone
        with settings_at_fault():
            super().__post_init__()
        check_choices_of_transformers(self)

    def _defaults(self) -> dict[str, Any]:
        """Of the settings that the method decides."""
        given = self.learning_rate is not None or self.lambda_value is not None
        absolute = self.method == "paper" and (given if self.relative is None else not self.relative)
        chosen = METHODS[self.method] | (ABSOLUTE if absolute else {})
        # Layers learn under the mask, if the run does, and from the dense model, which keeps its other weights.
        without = self.masked_forward is False or self.train_only_pruned is False
        return chosen | ({"layer_rate": 0.0} if without else {})

    @property
    def wanted(self) -> Pattern:
        """The pattern of the mask."""
        return Pattern.of_blocks(self.pattern)

    @property
    def auto_lambda(self) -> bool:
        return self.lambda_value == "auto"

    def _lambda(self) -> str | float:
        if self.lambda_value == "auto":
            return "auto"
        try:
            value = float(self.lambda_value)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise UsageError(f"`lambda_value` must be a finite number of at least 0, or auto; got {self.lambda_value}.")
        return value
