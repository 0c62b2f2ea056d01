"""Optimizers that step weights one by one in float32, and round bfloat16 weights stochastically."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

from proxsparse.model.sharding import first_entry, local, settled
from proxsparse.operator.adafactor import Passes
from proxsparse.operator.rounding import Noise, noise_seed, round_stochastically


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
        seed: of the rounding noise. The noise of a step depends on the seed, the step and the weight's place only, so
            that a resumed run repeats it, on any kind of device. FSDP2 replaces the weights, and numbers them anew.
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
        noise = self._noise(parameter, step)
        if noise is None:
            parameter.copy_(value)
        else:
            local(parameter).copy_(round_stochastically(local(value), noise))

    def _noise(self, parameter: Tensor, step: int) -> Noise | None:
        """Of a weight's stochastic rounding in a step; None: it is rounded to nearest."""
        if parameter.dtype != torch.bfloat16 or not self.stochastic:
            return None
        return Noise(noise_seed(self.seed, step, self._place(parameter)), first_entry(parameter))

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
        seed: of the rounding noise.

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
    takes shards (DTensor) too. A weight's second moments are one number per row and one per column, so that it costs no
    memory. A float32 gradient of a shard or a vector is used up: the update is made in its place.

    Args:
        params, lr, weight_decay: as in torch.optim.AdamW.
        seed: of the rounding noise.
        stochastic: False rounds bfloat16 weights to nearest.
        kernel: of the passes over a matrix, as in ``prox_op_``.

    Source: Shazeer and Stern, https://arxiv.org/abs/1804.04235; decay and clipping are theirs.
    """

    DECAY, CLIP, EPSILON = -0.8, 1.0, 1e-30
    COST = Cost(0.01, copies=1)  # of a weight that is not contiguous
    COST_OF_SHARDS: ClassVar = {torch.float32: Cost(0.01, copies=3), torch.bfloat16: Cost(0.01, copies=6)}

    def __init__(
        self, params, lr=1e-3, weight_decay=0.0, seed: int = 0, stochastic: bool = True, kernel: str | None = None
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, seed, stochastic)
        self.kernel = kernel

    def _step_one(self, parameter: Tensor, group: dict) -> None:
        state = self.state[parameter]
        state["step"] = state.get("step", 0) + 1
        if parameter.dim() < 2 or isinstance(parameter, DTensor):
            self._step_whole(parameter, state, group)
        else:
            self._step_in_passes(parameter, state, group)

    def _step_in_passes(self, parameter: Tensor, state: dict, group: dict) -> None:
        """Of a plain matrix or a stack of them, without a temporary of its size."""
        height, width = parameter.shape[-2:]
        assert parameter.grad is not None
        passes = Passes(parameter, parameter.grad, self.kernel)
        rows, columns = passes.square_sums(self.EPSILON)
        row = self._average("row", (rows / width).float(), state)
        column = self._average("column", (columns / height).float(), state)
        factors = (row / row.mean(-1, keepdim=True)).rsqrt(), column.rsqrt()
        size = (passes.update_square_sum(*factors) / parameter.numel()).sqrt().float()
        rate = group["lr"] / (size / self.CLIP).clamp(min=1.0)
        passes.step_(*factors, rate, 1 - group["lr"] * group["weight_decay"], self._noise(parameter, state["step"]))

    def _step_whole(self, parameter: Tensor, state: dict, group: dict) -> None:
        """Of a vector, or of a shard, whose sums are those of all processes."""
        assert parameter.grad is not None
        update = parameter.grad.float()
        squares = update.square().add_(self.EPSILON)
        if update.dim() < 2:
            update.mul_(self._average("squares", squares, state).rsqrt())
        else:
            row = self._average("row", squares.mean(-1), state)
            column = self._average("column", settled(squares.mean(-2)), state)
            del squares
            update.mul_((row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1)).mul_(column.rsqrt().unsqueeze(-2))
        size = settled(update.square().mean()).sqrt()
        update.mul_(group["lr"] / (size / self.CLIP).clamp(min=1.0))
        value = parameter.float()
        if group["weight_decay"]:
            value = value * (1 - group["lr"] * group["weight_decay"])
        self._store(value - update, parameter, state["step"])

    def _average(self, name: str, value: Tensor, state: dict) -> Tensor:
        """Over the steps so far; of the last one counts 1 - beta2."""
        if name in state:
            state[name].lerp_(value, state["step"] ** self.DECAY)
        else:
            state[name] = value
        return state[name]
