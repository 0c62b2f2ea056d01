"""Optimizer steps: bfloat16 weights that learn, and gradients that never exist all at once.

StochasticAdamW computes the update in float32 and rounds it stochastically. bfloat16 has eight significant bits, so a
step of 1e-4 on a weight of 0.05 is below half a unit in the last place, and rounding to nearest loses it, every time.
Rounded stochastically it survives on average, at no extra memory.
"""

import types
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from proxsparse.kernels.eager import round_stochastically
from proxsparse.sharding import local


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) with stochastic rounding of bfloat16 weights; others are rounded to nearest.

    The first moment is kept in the weights' dtype. The second is float32: its steps are a thousandth of it, which
    bfloat16 rounds away.

    Args:
        params, lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        seed: of the rounding noise. The noise of a step depends on the seed, the step and the weight's place only,
            so that a resumed run repeats it.

    Source: Loshchilov and Hutter, https://arxiv.org/abs/1711.05101.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, seed: int = 0):
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.seed = seed
        self._places: dict[Tensor, int] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                self._place(parameter)

    def _place(self, parameter: Tensor) -> int:
        """Number of a weight, which its noise depends on; FSDP2 brings new ones in the place of the old."""
        return self._places.setdefault(parameter, len(self._places) + 1)

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch, but the second moments stay float32: torch casts states to their weight's dtype."""
        squares = {k: v["exp_avg_sq"] for k, v in state_dict["state"].items()}
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, square in squares.items():
            parameter = parameters[index]
            self.state[parameter]["exp_avg_sq"] = square.to(parameter.device, torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None):  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group, self._place(parameter))
        return loss

    def _step_one(self, parameter: Tensor, group: dict, place: int) -> None:
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
        if parameter.dtype == torch.bfloat16:
            generator = torch.Generator(parameter.device).manual_seed(noise_seed(self.seed, step, place))
            local(parameter).copy_(round_stochastically(local(value), generator))
        else:
            parameter.copy_(value)


def noise_seed(seed: int, step: int, place: int) -> int:
    """A seed of its own for every rounding: 32 bits mixed from the run's seed, the step and the weight's place."""
    mixed = (seed * 0x9E3779B1 + step * 0x85EBCA77 + place * 0xC2B2AE3D + 0x27D4EB2F) & 0xFFFFFFFF
    mixed ^= mixed >> 15
    mixed = (mixed * 0x2C1B3C6D) & 0xFFFFFFFF
    return mixed ^ (mixed >> 13)


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
        groups = optimizer.param_groups
        group = next(g for g in groups if any(p is parameter for p in g["params"]))
        optimizer.param_groups = [{**group, "params": [parameter]}]
        try:
            with learned(parameter):
                whole_step(optimizer)
        finally:
            optimizer.param_groups = groups
        parameter.grad = None

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(step)
    optimizer.step = types.MethodType(lambda self, closure=None: None, optimizer)  # type: ignore[method-assign]
    return optimizer
