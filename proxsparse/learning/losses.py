"""The two terms that ProxSparse adds to a language-model loss: the frozen-weight penalty and distillation."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

# float32 copies of the logits of this many positions exist at a time; of more, every one would be new memory, whose
# pages take longer to come than the loss takes.
POSITIONS_AT_ONCE = 64


class _FrozenWeightPenalty(torch.autograd.Function):
    """Keeps the two weights only: autograd on the formula would keep four temporaries of the weight's size."""

    @staticmethod
    def forward(ctx, weight: Tensor, base: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(weight, base)
        ctx.epsilon = epsilon
        working, origin, scale = _penalty_parts(weight, base, epsilon)
        return (working / scale * (working - origin)).square().sum()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weight, base = ctx.saved_tensors
        working, origin, scale = _penalty_parts(weight, base, ctx.epsilon)
        inner = working * (working - origin)
        return (gradient * 2 * inner * (2 * working - origin) / scale.square()).to(weight.dtype), None, None


def _penalty_parts(weight: Tensor, base: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    working, origin = weight.detach().to(dtype), base.to(weight.device, dtype)
    return working, origin, origin + epsilon * torch.where(origin < 0, -1.0, 1.0)


def frozen_weight_penalty(weight: Tensor, base: Tensor, epsilon: float) -> Tensor:
    """|| W / (W0 + epsilon * sign(W0)) * (W - W0) ||_F^2 with sign(0) = +1: keeps kept weights near the frozen W0.

    A weight costs nothing at W0 and at 0, so it does not stand in the way of pruning.

    Args:
        weight: W, any shape; gradients flow to it.
        base: W0, same shape, any dtype and device; no gradient.
        epsilon: > 0, unit |weight|; bounds the division for small W0.

    Returns:
        Scalar in float32 (float64 for a float64 weight).

    Source: arXiv 2502.00258, the second regulariser (lambda2).
    """
    return _FrozenWeightPenalty.apply(weight, base, epsilon)


class _Distillation(torch.autograd.Function):
    """Computes the gradient with the value: autograd would keep temporaries of the size of the student's logits."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        gradient = torch.empty_like(student)
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        for start in range(0, student.shape[0], POSITIONS_AT_ONCE):
            part = slice(start, start + POSITIONS_AT_ONCE)
            log_p = _soften(teacher[part].float(), temperature).log_softmax(-1)
            log_q = _soften(student[part].float(), temperature).log_softmax(-1)
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum() * temperature**2
            gradient[part] = log_q.exp_().sub_(p).mul_(temperature)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (saved,) = ctx.saved_tensors
        return (saved * gradient).to(saved.dtype), None, None


def _soften(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum over positions of temperature^2 * KL(teacher || student), both softened by the temperature.

    Args:
        student: (T, V) logits; gradients flow to it.
        teacher: (T, V) logits of the dense model; no gradient.
        temperature: > 0.

    Returns:
        Scalar in float32, in nats (a sum: divide by the number of positions).

    Source: Hinton, Vinyals and Dean, https://arxiv.org/abs/1503.02531.
    """
    return _Distillation.apply(student, teacher, temperature)


@torch.no_grad()
def lm_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over positions of the language-model loss, to be shown: no gradient, a few positions at a time.

    Args:
        logits: (T, V).
        targets: (T,) token ids.

    Returns:
        Scalar in float32, in nats.
    """
    parts = zip(logits.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True)
    return torch.stack([cross_entropy(part.float(), ids, reduction="sum") for part, ids in parts]).sum()
