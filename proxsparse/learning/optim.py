"""Optimizers: bfloat16 weights that learn, relative learning rates, and gradients that never exist all at once.

Updates are computed in float32, and what is stored in bfloat16 is rounded stochastically. bfloat16 has eight
significant bits, so a step of 1e-4 on a weight of 0.05 is below half a unit in the last place, and rounding to nearest
loses it every time. Stochastic rounding keeps it on average, at no extra memory.
"""

import contextlib
import logging
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from proxsparse.errors import RunError
from proxsparse.learning.refusals import Refusal
from proxsparse.learning.rounded import Adafactor, Cost, StochasticAdamW

if TYPE_CHECKING:
    from proxsparse.learning.config import ProxSparseConfig, TrainingConfig

logger = logging.getLogger(__name__)


# Of the others, states in bytes per trained weight: (float32 weights, bfloat16 weights).
STATES = {
    "adamw_torch_fused": (8.0, 4.0),
    "adamw_torch": (8.0, 4.0),
    "adamw_torch_8bit": (2.03, 2.03),
    "adamw_torch_4bit": (1.06, 1.06),
    "adamw_8bit": (2.03, 2.03),
    "adamw_bnb_8bit": (2.03, 2.03),
    "sgd": (0.0, 0.0),
}
ADAMW = ("adamw_torch", "adamw_torch_fused")
# Parts of an optimizer's name -> the package that brings it. transformers has it from nowhere else.
PACKAGES = {
    "torch_8bit": "torchao",
    "torch_4bit": "torchao",
    "bnb": "bitsandbytes",
    "8bit": "bitsandbytes",
    "32bit": "bitsandbytes",
    "paged": "bitsandbytes",
    "ademamix": "bitsandbytes",
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "lomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "stable_adamw": "optimi",
    "schedule_free": "schedulefree",
    "anyprecision": "torchdistx",
    "xla": "torch_xla",
    "npu": "torch_npu",
}
REFUSALS = (
    Refusal(
        lambda c: c.optim_in_backward and c.gradient_accumulation_steps > 1,
        "`optim_in_backward` has no gradient to accumulate in: `gradient_accumulation_steps` must be 1; got "
        "{0.gradient_accumulation_steps}.",
    ),
    Refusal(
        lambda c: c.optim_in_backward and _reenters(c.activation_checkpointing_kwargs, c.gradient_checkpointing_kwargs),
        "`optim_in_backward` needs checkpointing that does not re-enter: leave use_reentrant out.",
    ),
    Refusal(
        lambda c: c.optim_in_backward and c.max_grad_norm not in (None, 0.0, 1.0),  # 1 is the Trainer's default
        "`optim_in_backward` can't clip by the norm of all gradients: `max_grad_norm` must be 0; got "
        "{0.max_grad_norm}.",
    ),
    Refusal(
        lambda c: c.optim_in_backward and c.fp16,
        "`optim_in_backward` needs no loss scaling: use `bf16=True` instead of `fp16=True`.",
    ),
)


def _reenters(*settings: Any) -> bool:
    """Of the two names of one setting."""
    return any(isinstance(setting, dict) and setting.get("use_reentrant") for setting in settings)


def name_of(args: "TrainingConfig") -> str:
    return str(getattr(args.optim, "value", args.optim))


def package_of(name: str) -> str | None:
    """The package that an optimizer of the Trainer needs next to torch."""
    return next((package for part, package in PACKAGES.items() if part in name), None)


def cost_of(args: "ProxSparseConfig", dtype: torch.dtype, sharded: bool = False) -> Cost:
    """What the optimizer of these settings takes for trained weights of this dtype, whole or sharded by FSDP2."""
    name, low = name_of(args), dtype == torch.bfloat16
    if name == "adafactor":
        return Adafactor.COST_OF_SHARDS[dtype] if sharded else Adafactor.COST
    if low and args.rounding == "stochastic" and name in ADAMW:
        return StochasticAdamW.COST
    return Cost(STATES.get(name, STATES["adamw_torch"])[dtype != torch.float32])


def own_optimizer(
    args: "TrainingConfig", model: nn.Module
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]] | None:
    """Class and options of the optimizer where it is one of ours: Adafactor, and AdamW with stochastic rounding."""
    name = name_of(args)
    low_precision = any(p.dtype == torch.bfloat16 and p.requires_grad for p in model.parameters())
    stochastic = low_precision and args.rounding == "stochastic"
    options: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "seed": args.seed}
    if name == "adafactor":
        return Adafactor, options | {"stochastic": stochastic}
    if stochastic and name in ADAMW:
        return StochasticAdamW, options | {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if stochastic:
        logger.warning(
            "the optimizer %s rounds bfloat16 weights in its own way; the setting 'rounding' has no effect on it", name
        )
    return None


def scale_learning_rates(optimizer: torch.optim.Optimizer, factors: dict[int, float]) -> None:
    """Give every listed weight a group of its own, whose learning rate is the common one times its factor.

    Args:
        factors: id of a parameter -> its factor.

    Raises:
        RunError: the optimizer lacks a listed weight, because it was made of other parameters.
    """
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if absent := len(factors.keys() - known):
        raise RunError(
            f"The optimizer lacks {absent} of {len(factors)} weights whose learning rate is relative to their scale: "
            "the model's parameters were replaced after the optimizer was made. Use `relative=False`, or report it."
        )
    groups = []
    for group in optimizer.param_groups:
        rest = [p for p in group["params"] if id(p) not in factors]
        own = [p for p in group["params"] if id(p) in factors]
        groups += [{**group, "params": rest}] if rest else []
        groups += [{**group, "params": [p], "lr": group["lr"] * factors[id(p)]} for p in own]
    optimizer.param_groups[:] = groups


@contextlib.contextmanager
def only(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Iterator[None]:
    """Inside, the optimizer has one weight."""
    groups = optimizer.param_groups
    group = next(g for g in groups if any(p is parameter for p in g["params"]))
    optimizer.param_groups = [{**group, "params": [parameter]}]
    try:
        yield
    finally:
        optimizer.param_groups = groups


def step_in_backward(
    optimizer: torch.optim.Optimizer, learned: Callable[[nn.Parameter], AbstractContextManager]
) -> torch.optim.Optimizer:
    """Step every weight once its gradient is whole, and free the gradient; ``optimizer.step()`` does nothing more.

    The steps are those of the optimizer, whatever it is, as long as it treats weights one by one.

    Args:
        learned: a context for each step, in which the parameter holds the weight that is to be moved.
    """
    whole_step = type(optimizer).step

    def step(parameter: nn.Parameter) -> None:
        with only(optimizer, parameter), learned(parameter):
            whole_step(optimizer)
        parameter.grad = None

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(step)
    optimizer.step = types.MethodType(lambda self, closure=None: None, optimizer)  # type: ignore[method-assign]
    return optimizer
