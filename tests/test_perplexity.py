"""The perplexity loop against the definition."""

import math

import pytest
import torch
from conftest import tiny_llama

from proxsparse.errors import RunError, task_of
from proxsparse.evaluation import perplexity as module
from proxsparse.evaluation.perplexity import perplexity


@pytest.fixture
def windows():
    return torch.randint(1, 257, (7, 40), generator=torch.Generator().manual_seed(0))


def test_it_is_the_exponential_of_the_mean_window_loss(windows):
    model = tiny_llama()
    losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
    found = perplexity(model, windows)
    assert found.perplexity == pytest.approx(math.exp(sum(losses) / 7), rel=1e-5)
    spread = torch.tensor(losses).double().std().item() / math.sqrt(7)
    assert found.standard_error == pytest.approx(found.perplexity * spread, rel=1e-3)
    assert (found.windows, found.ctx_len) == (7, 40)


@pytest.mark.parametrize("batch_size", [2, 3, 7, 100])
def test_batches_do_not_change_it(windows, batch_size):
    model = tiny_llama()
    assert perplexity(model, windows, batch_size).perplexity == pytest.approx(
        perplexity(model, windows).perplexity, rel=1e-4
    )


def test_a_model_that_overflows_is_reported(windows):
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="loss is not finite on window 0"):
        perplexity(model, windows)


def test_a_loss_whose_exponential_is_too_large_gives_infinity_and_a_note(windows, caplog):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    found = perplexity(model, windows)
    losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
    assert found.nll == pytest.approx(sum(losses) / 7, rel=1e-5)
    assert found.nll > 710
    assert found.perplexity == found.standard_error == math.inf
    assert "written as infinity" in caplog.text


def test_a_note_says_which_text_was_measured(windows, monkeypatch):
    monkeypatch.setattr(module, "window_losses", lambda model, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        perplexity(tiny_llama(), windows, progress="wiki")
    assert task_of(caught.value) == "measuring the perplexity on wiki"


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_the_float32_copy_of_the_logits_does_not_grow_with_the_batch(windows, batch_size, monkeypatch):
    monkeypatch.setattr(module, "POSITIONS_AT_ONCE", 16)
    positions = []

    def seen(logits, targets, reduction):
        positions.append(targets.numel())
        return torch.nn.functional.cross_entropy(logits, targets, reduction=reduction)

    expected = perplexity(tiny_llama(), windows).nll
    monkeypatch.setattr(module, "cross_entropy", seen)
    assert perplexity(tiny_llama(), windows, batch_size).nll == pytest.approx(expected, rel=1e-6)
    assert max(positions) <= 16


def test_it_leaves_the_mode_of_the_model(windows):
    model = tiny_llama().train()
    perplexity(model, windows[:1])
    assert model.training
