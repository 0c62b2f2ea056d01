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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from proxsparse.errors import RunError
from proxsparse.learning.refusals import Refusal
from proxsparse.model.sharding import local, settled
from proxsparse.operator.rounding import noise_seed, round_stochastically

if TYPE_CHECKING:
    from proxsparse.learning.config import ProxSparseConfig

logger = logging.getLogger(__name__)


class Cost(NamedTuple):
    """What an optimizer takes.

    Attributes:
        states: bytes per trained weight.
        copies: float32 copies of one weight while it is stepped.
    """

    states: float
    copies: int = 0


class _Rounded(torch.optim.Optimizer):
    """Steps weights one by one in float32, and rounds what is stored in bfloat16.

    Args:
        params, defaults: as in torch.optim.Optimizer.
        seed: seed of the rounding noise. The noise of a step depends only on the seed, the step and the weight's place,
            so that a resumed run repeats it.
        stochastic: False rounds to nearest.
    """

    def __init__(self, params, defaults: dict, seed: int, stochastic: bool):
        super().__init__(params, defaults)
        self.seed, self.stochastic = seed, stochastic
        self._places, self._numbered = WeakTensorKeyDictionary(), 0
        for group in self.param_groups:
            for parameter in group["params"]:
                self._place(parameter)

    def _place(self, parameter: Tensor) -> int:
        """Number of a weight; FSDP2 puts new ones where the old were, which must be free to go."""
        if parameter not in self._places:
            self._numbered += 1
            self._places[parameter] = self._numbered
        return self._places[parameter]

    def _store(self, value: Tensor, parameter: Tensor, step: int) -> None:
        """Write a float32 value into a weight: bfloat16 is rounded stochastically, others to nearest."""
        if parameter.dtype != torch.bfloat16 or not self.stochastic:
            parameter.copy_(value)
            return
        seed = noise_seed(self.seed, step, self._place(parameter))
        generator = torch.Generator(parameter.device).manual_seed(seed)
        local(parameter).copy_(round_stochastically(local(value), generator))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None):  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)
        return loss

    def _step_one(self, parameter: Tensor, group: dict) -> None:
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch, but float32 states stay float32: torch casts them to their weight's dtype."""
        given = {key: dict(state) for key, state in state_dict["state"].items()}
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for key, parameter in zip(saved, parameters, strict=True):
            for name, value in given.get(key, {}).items():
                if torch.is_tensor(value) and value.dtype == torch.float32 and value.dim():
                    self.state[parameter][name] = value.to(parameter.device)


class StochasticAdamW(_Rounded):
    """AdamW (decoupled weight decay) with stochastic rounding of bfloat16 weights; others are rounded to nearest.

    The first moment is kept in the weights' dtype. The second is float32: its steps are a thousandth of it, which
    bfloat16 rounds away.

    Args:
        params, lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        seed: seed of the rounding noise.

    Source: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101.
    """

    COST = Cost(states=6.0, copies=6)  # a bfloat16 and a float32 moment

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, seed: int = 0):
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, seed, stochastic=True)

    def _step_one(self, parameter: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        mean = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["exp_avg"].copy_(mean)
        denominator = square.div(1 - beta2**step).sqrt_().add_(group["eps"])
        value = parameter.float().mul_(1 - group["lr"] * group["weight_decay"])
        value.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1**step))
        self._store(value, parameter, step)


class Adafactor(_Rounded):
    """Adafactor without momentum and with a given learning rate; bfloat16 weights are rounded stochastically.

    As transformers' with ``scale_parameter=False, relative_step=False``, which it equals on float32 weights; this one
    takes shards (DTensor) too. A weight's second moments are one number per row and one per column, so that they
    cost almost no memory. A float32 gradient is overwritten by the update.

    Args:
        params, lr, weight_decay: as in torch.optim.AdamW.
        seed: seed of the rounding noise.
        stochastic: False rounds bfloat16 weights to nearest.

    Source: Shazeer and Stern, https://arxiv.org/abs/1804.04235; decay and clipping are theirs.
    """

    DECAY, CLIP, EPSILON = -0.8, 1.0, 1e-30
    COST_FLOAT32, COST_BFLOAT16 = Cost(0.01, copies=3), Cost(0.01, copies=6)

    def __init__(self, params, lr=1e-3, weight_decay=0.0, seed: int = 0, stochastic: bool = True):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, seed, stochastic)

    def _step_one(self, parameter: Tensor, group: dict) -> None:
        state = self.state[parameter]
        state["step"] = step = state.get("step", 0) + 1
        forget = step**self.DECAY  # 1 - beta2
        assert parameter.grad is not None
        update = parameter.grad.float()
        squares = update.square().add_(self.EPSILON)
        if update.dim() < 2:
            update.mul_(self._average("squares", squares, state, forget).rsqrt())
        else:
            row = self._average("row", squares.mean(-1), state, forget)
            column = self._average("column", settled(squares.mean(-2)), state, forget)
            del squares
            update.mul_((row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1)).mul_(column.rsqrt().unsqueeze(-2))
        size = settled(update.square().mean()).sqrt()
        update.mul_(group["lr"] / (size / self.CLIP).clamp(min=1.0))
        value = parameter.float()
        if group["weight_decay"]:
            value = value * (1 - group["lr"] * group["weight_decay"])
        self._store(value - update, parameter, step)

    @staticmethod
    def _average(name: str, value: Tensor, state: dict, forget: float) -> Tensor:
        if name in state:
            state[name].lerp_(value, forget)
        else:
            state[name] = value
        return state[name]


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


def name_of(args: "ProxSparseConfig") -> str:
    return str(getattr(args.optim, "value", args.optim))


def package_of(name: str) -> str | None:
    """The package that an optimizer of the Trainer needs next to torch."""
    return next((package for part, package in PACKAGES.items() if part in name), None)


def cost_of(args: "ProxSparseConfig", dtype: torch.dtype) -> Cost:
    """What the optimizer of these settings takes for trained weights of this dtype."""
    name, low = name_of(args), dtype == torch.bfloat16
    if name == "adafactor":
        return Adafactor.COST_BFLOAT16 if low else Adafactor.COST_FLOAT32
    if low and args.rounding == "stochastic" and name in ADAMW:
        return StochasticAdamW.COST
    return Cost(STATES.get(name, STATES["adamw_torch"])[dtype != torch.float32])


def own_optimizer(
    args: "ProxSparseConfig", model: nn.Module
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
