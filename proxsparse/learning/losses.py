"""The two terms that ProxSparse adds to a language-model loss: the frozen-weight penalty and distillation."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

# float32 copies of the logits of this many positions exist at a time; of more, every one would be new memory, whose
# pages take longer to come than the loss takes.
POSITIONS_AT_ONCE = 64
HEAD_POSITIONS = 128  # at a time through the LM head: its weight is read again for each piece


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


class _ThroughHead(torch.autograd.Function):
    """As ``_Distillation``: the gradient comes with the value, so that no piece of the logits is kept."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, teacher: Tensor, head: nn.Linear, labels: Tensor, share: float, temperature: float
    ):
        kind = hidden.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
        weight, bias = head.weight.to(low), None if head.bias is None else head.bias.to(low)
        gradient, sums = torch.empty_like(hidden), torch.zeros(2, dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], HEAD_POSITIONS):
            part = slice(start, start + HEAD_POSITIONS)
            log_p = _soften(linear(teacher[part].to(low), weight, bias).float(), temperature).log_softmax(-1)
            logits = linear(hidden[part].to(low), weight, bias)
            log_q = _soften(logits.float(), temperature).log_softmax(-1)
            p = log_p.exp()
            sums[0] += log_p.sub_(log_q).mul_(p).sum() * temperature**2
            sums[1] += cross_entropy(logits.float(), labels[part], reduction="sum")
            slope = log_q.exp_().sub_(p).mul_(share * temperature)
            if share < 1:
                likely, places = logits.float().softmax(-1), labels[part, None]
                likely.scatter_add_(1, places, likely.new_full(places.shape, -1.0))
                slope.add_(likely, alpha=1 - share)
            gradient[part] = slope.to(low) @ weight
        ctx.save_for_backward(gradient)
        kl, lm = sums.unbind()
        ctx.mark_non_differentiable(kl, lm)
        return share * kl + (1 - share) * lm, kl, lm

    @staticmethod
    def backward(ctx, gradient: Tensor, *_):
        (saved,) = ctx.saved_tensors
        return (saved * gradient).to(saved.dtype), None, None, None, None, None


def loss_through_head(
    hidden: Tensor, teacher: Tensor, head: nn.Linear, labels: Tensor, share: float = 1.0, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Distillation, mixed with the language-model loss, of logits that never exist all at once.

    Args:
        hidden: (T, H) last hidden states; gradients flow to them.
        teacher: (T, H) those of the dense model; no gradient.
        head: the LM head of both, from H to V; no gradient.
        labels: (T,) token ids.
        share: of the distillation, 0 to 1; the rest is the language-model loss.
        temperature: > 0, see ``distillation_loss``.

    Returns:
        Scalars in float32, in nats, sums over the positions: the mixture, its distillation, its language-model loss.
    """
    return _ThroughHead.apply(hidden, teacher, head, labels, share, temperature)


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
