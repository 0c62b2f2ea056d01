"""Configuration of a learning run: TRL's SFTConfig and what ProxSparse adds.

The paper's method and this project's default differ only in the values of these fields; ``METHODS`` lists both.
"""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from transformers.training_args import OptimizerNames
from trl import SFTConfig

from proxsparse.errors import UsageError
from proxsparse.learning import objective, optim
from proxsparse.learning.copies import PLACES
from proxsparse.learning.refusals import Refusal, refuse
from proxsparse.model.channels import PERMUTE, PERMUTE_HELP

CHOICES: dict[str, tuple] = {
    "score": ("activation", "weight"),
    "rounding": ("stochastic", "nearest"),
    "keep_base": PLACES,
    "project_lambda2": (0, 1),
    "permute": PERMUTE,
}
_SHARE = (lambda value: 0 <= value <= 1, "between 0 and 1")
_POSITIVE = (lambda value: 0 < value < float("inf"), "a finite number > 0")
_COUNT = (lambda value: value >= 1, "at least 1")
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lambda2_value": (lambda value: 0 <= value < float("inf"), "a finite number of at least 0.0"),
    "target_share": (lambda value: 0 < value < 1, "more than 0 and less than 1"),
    "distill": _SHARE,
    "lambda_ramp": _SHARE,
    "epsilon": _POSITIVE,
    "temperature": _POSITIVE,
    "learning_rate": _POSITIVE,
    "norm_samples": _COUNT,
    "num_train_epochs": _POSITIVE,
    "max_steps": (lambda value: value == -1 or value >= 1, "at least 1, or -1 for all samples"),
    "gradient_accumulation_steps": _COUNT,
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
}
# What SFTConfig offers for conversations and for texts of several lengths; here all are windows of one length.
REFUSALS = (
    *(
        Refusal(
            attrgetter(name),
            f"`{name}=True` is for conversations or texts of several lengths, and calibration texts are cut into "
            f"windows of one length: leave `{name}` out.",
        )
        for name in ("assistant_only_loss", "completion_only_loss", "packing", "eval_packing", "padding_free")
    ),
    Refusal(
        lambda c: c.fsdp and "RANK" not in os.environ,
        "`fsdp` shards a model over several processes, and this is one: start with accelerate launch --config_file "
        "script/accelerate/fsdp2.yaml, and leave `fsdp` out.",
    ),
    Refusal(
        attrgetter("deepspeed"),
        "Learning under DeepSpeed is not supported: ZeRO keeps weights in flat pieces that cut through blocks of "
        "four. Use FSDP2, as script/accelerate/fsdp2.yaml sets it up.",
    ),
    Refusal(
        lambda c: c.activation_offloading and c.use_cpu,
        "`activation_offloading=True` moves activations from an accelerator to the CPU, and this run is on the CPU: "
        "leave it out.",
    ),
    Refusal(
        lambda c: c.save_strategy == "best" and c.eval_strategy == "no",
        "`save_strategy=best` saves when the evaluation is better than before, and there is none: give "
        "`eval_strategy=steps` and `eval_samples` too.",
    ),
)
# Where the name of a reporter is not that of its package; of several, one is enough.
REPORTERS = {
    name: name
    for name in ("wandb", "trackio", "comet_ml", "mlflow", "neptune", "codecarbon", "clearml", "dagshub", "swanlab")
} | {"tensorboard": "tensorboard tensorboardX", "azure_ml": "azureml", "flyte": "flytekit", "dvclive": "dvclive"}

# Defaults by method; a value the user gives wins.
METHODS: dict[str, dict[str, Any]] = {
    # Liu et al. 2025: fine-tune all weights on the language-model loss, shrink by an absolute lambda, keep |w|.
    "paper": {
        "score": "weight",
        "masked_forward": False,
        "distill": 0.0,
        "relative": False,
        "lambda_ramp": 0.0,
        "train_only_pruned": False,
        "learning_rate": 1e-4,
        "lambda_value": 0.25,
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
        "learning_rate": 1e-2,
        "lambda_value": 2e-3,
        "optim": "adafactor",  # measured better than AdamW, at no memory
        "adam_beta2": 0.95,
        "warmup_steps": 0.05,
    },
}


UNSET: Any = None  # filled in from METHODS


@dataclass
class ProxSparseConfig(SFTConfig):
    """SFTConfig and the settings of ProxSparse. Every field is also a flag of ``end-to-end/main.py``.

    The help of a field says what it does. ``METHODS`` gives the defaults that depend on ``method``.

    Raises:
        UsageError: a value is not accepted, or two settings exclude each other.
    """

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
    learning_rate: float = field(default=UNSET, metadata={"help": "the peak learning rate"})
    optim: OptimizerNames | str = field(
        default=UNSET, metadata={"help": "the Trainer's optimizer, as adafactor or adamw_torch_fused"}
    )
    adam_beta2: float = field(default=UNSET, metadata={"help": "AdamW's second decay"})
    warmup_steps: float = field(default=UNSET, metadata={"help": "steps of warm-up; below 1, a share of all steps"})

    method: str = field(default="masked", metadata={"help": f"preset of the settings below: {', '.join(METHODS)}"})
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
    temperature: float = field(default=1.0, metadata={"help": "temperature of the distillation"})
    relative: bool = field(
        default=UNSET,
        metadata={"help": "take lambda1 and the learning rate relative to each matrix's root mean square"},
    )
    lambda_ramp: float = field(
        default=UNSET, metadata={"help": "share of the steps over which lambda1 rises from zero"}
    )
    train_only_pruned: bool = field(
        default=UNSET, metadata={"help": "freeze embeddings, norms, biases and the LM head"}
    )
    rounding: str = field(
        default="stochastic",
        metadata={"help": "rounding of bfloat16 weights: stochastic, or nearest (as upstream; it loses small steps)"},
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
        for name, value in METHODS[self.method].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self.lambda_value = self._lambda()  # type: ignore[assignment]
        self._check()
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.optim_in_backward:
            self.max_grad_norm = 0.0  # the norm of all gradients is known only when the first ones are gone
        super().__post_init__()

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

    def _check(self) -> None:
        for name, accepted in CHOICES.items():
            if getattr(self, name) not in accepted:
                listed = ", ".join(map(str, accepted))
                raise UsageError(f"`{name}` must be one of {listed}; got {getattr(self, name)!r}.")
        for name, (allowed, words) in RANGES.items():
            if not allowed(getattr(self, name)):
                raise UsageError(f"`{name}` must be {words}; got {getattr(self, name)}.")
        refuse((*objective.REFUSALS, *optim.REFUSALS, *REFUSALS), self)

    def require_packages(self) -> None:
        """Refuse settings that need a package which is not here; to be called before a model is loaded.

        Raises:
            UsageError: names the package.
        """
        reporters = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        needed = [("report_to", name, REPORTERS.get(name)) for name in reporters]
        needed += [("optim", optim.name_of(self), optim.package_of(optim.name_of(self)))]
        for setting, value, packages in needed:
            if packages and not any(importlib.util.find_spec(package) for package in packages.split()):
                raise UsageError(
                    f"`{setting}={value}` needs the package {packages.split()[0]}, which is not installed here: "
                    f"install it, or choose another `{setting}`."
                )
