"""What a run may be given: settings and their combinations, a caller's arguments, and packages that have to be here.

Each is asked before anything is computed, and answered in one sentence that names the setting.
"""

import dataclasses
import importlib.util
import numbers
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from transformers import get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from proxsparse.errors import UsageError, check_switches
from proxsparse.learning import optim
from proxsparse.learning.copies import PLACES
from proxsparse.learning.refusals import Refusal, refuse
from proxsparse.model.channels import PERMUTE
from proxsparse.model.prunable import check_model
from proxsparse.model.windows import check_tokenizer, check_windows
from proxsparse.operator.pattern import TWO_OF_FOUR

if TYPE_CHECKING:
    from proxsparse.learning.config import TrainingConfig

# What is measured of held-out samples, whatever the method; another name would fail at the first look.
MEASURED = ("loss", "entropy", "mean_token_accuracy")
CHOICES: dict[str, tuple] = {
    "score": ("activation", "weight"),
    "rounding": ("stochastic", "nearest"),
    "keep_base": PLACES,
    "project_lambda2": (0, 1),
    "permute": PERMUTE,
    "metric_for_best_model": (None, *(f"{start}{name}" for start in ("", "eval_") for name in MEASURED)),
    "dataset_text_field": ("text",),
    "torch_compile_mode": (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
}
_SHARE = (lambda value: 0 <= value <= 1, "between 0 and 1")
_DECAY = (lambda value: 0 <= value < 1, "at least 0 and less than 1")
_POSITIVE = (lambda value: 0 < value < float("inf"), "a finite number > 0")
_NOT_NEGATIVE = (lambda value: 0 <= value < float("inf"), "a finite number of at least 0")
_COUNT = (lambda value: value >= 1, "at least 1")
_SEED = (lambda value: 0 <= value < 2**32, "between 0 and 4294967295")
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lambda2_value": (lambda value: 0 <= value < float("inf"), "a finite number of at least 0.0"),
    "target_share": (lambda value: 0 < value < 1, "more than 0 and less than 1"),
    "distill": _SHARE,
    "lambda_ramp": _SHARE,
    "epsilon": _POSITIVE,
    "temperature": _POSITIVE,
    "learning_rate": _POSITIVE,
    "norm_samples": _COUNT,
    "neftune_noise_alpha": _POSITIVE,
    "layer_rate": _NOT_NEGATIVE,
    "layer_steps": (lambda value: value >= 0, "at least 0"),
    "layer_span": _COUNT,
    "num_train_epochs": _POSITIVE,
    "max_steps": (lambda value: value == -1 or value >= 1, "at least 1, or -1 for all samples"),
    "gradient_accumulation_steps": _COUNT,
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "eval_accumulation_steps": _COUNT,
    "seed": _SEED,
    "data_seed": _SEED,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "adam_beta1": _DECAY,
    "adam_beta2": _DECAY,
    "adam_epsilon": _NOT_NEGATIVE,
    "logging_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "save_total_limit": _COUNT,
    "dataloader_num_workers": (lambda value: value >= 0, "at least 0"),
}
OR_NONE = ("max_grad_norm",)  # its default is a number, and None turns it off
# What SFTConfig offers for conversations and for texts of several lengths; here all are windows of one length.
SWITCHES = ("assistant_only_loss", "completion_only_loss", "packing", "eval_packing", "padding_free")
TOKENS = ("eos_token", "pad_token", "chat_template_path")
OWN_OPTIONS = ("adafactor", "adamw_torch", "adamw_torch_fused")  # optimizers that take no optim_args
OF_MASKS = (
    Refusal(
        lambda c: c.layer_rate and not c.masked_forward,
        "`layer_rate={0.layer_rate}` is for layers that learn under the mask, and this run does not: use "
        "`method=masked`, or leave `layer_rate` out.",
    ),
    Refusal(
        lambda c: c.layer_rate and not c.train_only_pruned,
        "`layer_rate={0.layer_rate}` needs the layers of the dense model, and norms and biases that move are no longer "
        "its own: give `train_only_pruned=True`, or leave `layer_rate` out.",
    ),
    Refusal(
        lambda c: c.layer_rate and "layerwise" in optim.name_of(c),
        "`layer_rate={0.layer_rate}` follows the learning rate of the optimizer, and `optim={0.optim}` keeps it to "
        "itself: give `layer_rate=0`, or another `optim`.",
    ),
    Refusal(
        lambda c: c.wanted != TWO_OF_FOUR and not c.masked_forward,
        "`pattern={0.pattern}` is learned under the mask, which `method=paper` is not: use `method=masked`, or "
        "`pattern=2:4`.",
    ),
    Refusal(
        lambda c: c.wanted != TWO_OF_FOUR and c.lambda_value != 0,
        "`lambda_value={0.lambda_value}` is the strength of the operator of 2:4 blocks, and `pattern={0.pattern}` has "
        "none: leave `lambda_value` out.",
    ),
)
REFUSALS = (
    *(
        Refusal(
            attrgetter(name),
            f"`{name}{'=True' if name in SWITCHES else ''}` is for conversations or texts of several lengths, and "
            f"calibration texts are cut into windows of one length: leave `{name}` out.",
        )
        for name in (*SWITCHES, *TOKENS)
    ),
    Refusal(
        attrgetter("model_init_kwargs"),
        "`model_init_kwargs` is for a model that TRL loads, and here it is loaded before: give `dtype`, `revision` or "
        "`trust_remote_code` instead.",
    ),
    Refusal(
        lambda c: c.optim_args and optim.name_of(c) in OWN_OPTIONS,
        "`optim_args` does not reach this optimizer: give `learning_rate`, `weight_decay`, `adam_beta1`, `adam_beta2` "
        "or `adam_epsilon`, or another `optim`.",
    ),
    Refusal(
        lambda c: c.optim_target_modules and not any(n in optim.name_of(c) for n in ("galore", "apollo")),
        "`optim_target_modules` is for GaLore and APOLLO; which weights are pruned is said with `include` and "
        "`exclude`.",
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


def check_inputs(model: Any, tokenizer: Any, windows: Any, eval_windows: Any = None) -> None:
    """Refuse what a Python caller may mix up, before anything is computed.

    Args:
        model: a model of transformers that can be trained.
        tokenizer: of the model.
        windows: (N, T) token ids.
        eval_windows: the same, or None.

    Raises:
        UsageError: names the argument, what was found and what is accepted.
    """
    check_model(model)
    if hasattr(model, "_orig_mod"):
        raise UsageError("The model is compiled: give the model itself, and `torch_compile=True`.", "model")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UsageError("The model is on the device meta, where it has no values: load it onto another one.", "model")
    if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise UsageError(
            f"`model` must be a causal language model, which predicts the next token; got {type(model).__name__}.",
            "model",
        )
    check_tokenizer(tokenizer)
    if model.dtype == torch.float16:
        raise UsageError(
            "float16 can't be learned in, as second moments underflow: load the model in bfloat16.", "dtype"
        )
    check_windows(windows, model.config)
    if eval_windows is not None:
        check_windows(eval_windows, model.config, "eval_windows")


def check_values(config: "TrainingConfig", *tables: Iterable[Refusal]) -> None:
    """Refuse what no run can have, before transformers looks at it.

    Args:
        tables: combinations that this kind of run can't have.

    Raises:
        UsageError: names the setting, what was found and what is accepted.
    """
    for name, accepted in CHOICES.items():
        if hasattr(config, name) and getattr(config, name) not in accepted:
            listed = ", ".join(str(choice) for choice in accepted if choice is not None)
            some = "one of " if len(accepted) > 1 else ""
            raise UsageError(f"`{name}` must be {some}{listed}; got {getattr(config, name)!r}.")
    fields = {field.name: field for field in dataclasses.fields(config)}
    for name in filter(fields.__contains__, RANGES):
        value = getattr(config, name)
        _check_number(fields[name], value)
        if isinstance(value, float) and fields[name].type in (int, "int"):
            setattr(config, name, int(value))
    for name, field in fields.items():
        value, takes_none = getattr(config, name), field.default is None or field.type is not bool
        switch = field.type in (bool, bool | None) and name != "include_num_input_tokens_seen"  # which takes words too
        if switch and not (value is None and takes_none):
            check_switches(**{name: value})
    refuse((*chain(*tables), *REFUSALS), config)


def _check_number(setting: dataclasses.Field, value: Any) -> None:
    """Refuse a number out of its range, and what is no number."""
    name, (allowed, words) = setting.name, RANGES[setting.name]
    if value is None and (setting.default is None or name in OR_NONE):
        return
    number = isinstance(value, numbers.Real)
    if not number or not allowed(value):
        raise UsageError(f"`{name}` must be {words}; got {value if number else repr(value)}.")
    if setting.type in (int, "int") and not float(value).is_integer():
        raise UsageError(f"`{name}` must be a whole number, {words}; got {value}.")


def check_choices_of_transformers(config: "TrainingConfig") -> None:
    """Refuse what transformers would stumble over only once the model is there: reporters and schedules.

    Raises:
        UsageError: names the setting, what was found and what is accepted.
    """
    for name in config.report_to or []:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UsageError(
                f"`report_to` must be none, all, or some of {', '.join(INTEGRATION_TO_CALLBACK)}; got {name!r}."
            )
    given = config.lr_scheduler_kwargs or {}
    if not isinstance(given, Mapping):
        raise UsageError(f'`lr_scheduler_kwargs` takes JSON, as {{"num_cycles": 2}}; got {given!r}.')
    kind = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
    tried = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        get_scheduler(kind, tried, num_warmup_steps=1, num_training_steps=9, scheduler_specific_kwargs=dict(given))
    except (TypeError, ValueError, KeyError) as error:
        raise UsageError(
            f"`lr_scheduler_type={kind}` does not go with `lr_scheduler_kwargs`, which "
            f"{'are ' + str(dict(given)) if given else 'are not given'}: {error}"
        ) from error


def require_packages(config: "TrainingConfig") -> None:
    """Refuse settings that need a package which is not here; to be called before a model is loaded.

    Raises:
        UsageError: names the package.
    """
    reporters = [config.report_to] if isinstance(config.report_to, str) else config.report_to or []
    needed = [("report_to", name, REPORTERS.get(name)) for name in reporters]
    needed += [("optim", optim.name_of(config), optim.package_of(optim.name_of(config)))]
    needed += [("use_liger_kernel", "True", "liger_kernel")] if config.use_liger_kernel else []
    for setting, value, packages in needed:
        if packages and not any(importlib.util.find_spec(package) for package in packages.split()):
            instead = f"leave `{setting}` out" if value == "True" else f"choose another `{setting}`"
            raise UsageError(
                f"`{setting}={value}` needs the package {packages.split()[0]}, which is not installed here: "
                f"install it, or {instead}."
            )
