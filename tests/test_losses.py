"""Distillation, the frozen-weight penalty, and the optimizer that rounds stochastically."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from proxsparse.learning.losses import distillation_loss, frozen_weight_penalty, lm_loss, loss_through_head
from proxsparse.learning.optim import StochasticAdamW


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_the_scaled_divergence_with_its_gradient(temperature):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(700, 11, generator=generator, requires_grad=True)
    teacher = torch.randn(700, 11, generator=generator)
    ours = distillation_loss(student, teacher, temperature)
    log_q, log_p = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    expected = kl_div(log_q, log_p, log_target=True, reduction="sum") * temperature**2
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, student)[0] for loss in (ours, expected)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_a_loss_through_the_head_is_that_of_the_whole_logits(share):
    torch.manual_seed(0)
    hidden, teacher, labels = torch.randn(300, 8, requires_grad=True), torch.randn(300, 8), torch.randint(0, 11, (300,))
    head = torch.nn.Linear(8, 11)
    ours, kl, lm = loss_through_head(hidden, teacher, head, labels, share, 1.5)
    logits = head(hidden)
    log_q, log_p = (logits / 1.5).log_softmax(-1), (head(teacher) / 1.5).log_softmax(-1)
    wanted_kl = kl_div(log_q, log_p, log_target=True, reduction="sum") * 1.5**2
    wanted_lm = cross_entropy(logits, labels, reduction="sum")
    expected = share * wanted_kl + (1 - share) * wanted_lm
    torch.testing.assert_close((ours, kl, lm), (expected, wanted_kl, wanted_lm), rtol=1e-5, atol=1e-4)
    gradients = (torch.autograd.grad(2 * loss, hidden)[0] for loss in (ours, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_distillation_is_zero_at_the_teacher():
    logits = torch.randn(5, 7)
    assert distillation_loss(logits, logits).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("positions", [0, 1, 64, 700])
def test_the_loss_that_is_shown_is_the_cross_entropy(positions):
    logits, targets = torch.randn(positions, 11), torch.randint(11, (positions,))
    torch.testing.assert_close(lm_loss(logits, targets), cross_entropy(logits, targets, reduction="sum"))


def test_in_float32_it_is_adamw():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 4, generator=generator)
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
    optimizers = [StochasticAdamW([weights[0]], **settings), torch.optim.AdamW([weights[1]], **settings)]
    for _ in range(10):
        gradient = torch.randn(4, 4, generator=generator)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1])


def test_in_bfloat16_small_steps_survive_on_average():
    weight = torch.nn.Parameter(torch.full((4000,), 1.0, dtype=torch.bfloat16))
    optimizer = StochasticAdamW([weight], lr=1e-4, seed=3)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # Twenty steps of 1e-4; a unit in the last place is 2^-8 = 39e-4 below one.
    assert weight.double().mean().item() == pytest.approx(1 - 20e-4, abs=2e-4)


def test_the_frozen_weight_penalty_is_its_definition():
    weight, base = torch.tensor([0.5, -1.0, 0.3]), torch.tensor([1.0, -2.0, 0.0])
    expected = sum((w / (b + 0.1 * (-1 if b < 0 else 1)) * (w - b)) ** 2 for w, b in zip(weight, base, strict=True))
    assert frozen_weight_penalty(weight, base, 0.1).item() == pytest.approx(expected.item())


def test_the_frozen_weight_penalty_has_the_gradient_of_finite_differences_and_autograd():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, dtype=torch.float64, generator=generator)
    base[0, 0] = 0.0
    weight = (base + 0.3 * torch.randn(6, 8, dtype=torch.float64, generator=generator)).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: frozen_weight_penalty(w, base, 0.2), (weight,))
    scale = base + 0.2 * torch.where(base < 0, -1.0, 1.0)
    (plain,) = torch.autograd.grad((weight / scale * (weight - base)).square().sum(), weight)
    (ours,) = torch.autograd.grad(frozen_weight_penalty(weight, base, 0.2), weight)
    torch.testing.assert_close(ours, plain)
