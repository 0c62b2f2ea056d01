"""RoI: the relaxed choice of the N largest, its gradient, and what a run of it gives."""

from functools import partial

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from datasets import Dataset
from test_maskllm import windows

from proxsparse.baselines import maskllm
from proxsparse.baselines.roi import RoIConfig, RoITrainer, learn_mask, relaxed_top, top_mask
from proxsparse.baselines.sampling import one_shot_prior
from proxsparse.baselines.wanda import Wanda
from proxsparse.errors import UsageError
from proxsparse.mask import apply_mask
from proxsparse.model.prunable import find_prunable
from proxsparse.operator.pattern import Pattern

PATTERNS = [(2, 4), (1, 4), (4, 8), (3, 4)]


def logits_of(m, dtype=torch.float32):
    return torch.randn(m, 3, 50, dtype=dtype, generator=torch.Generator().manual_seed(0))


def plainly(logits, n, tau):
    """Algorithm 2 of Xie and Ermon as it is printed, in the logits' own units."""
    total, a = torch.zeros_like(logits), logits
    for _ in range(n):
        p = (a / tau).softmax(0)
        total, a = total + p, a + torch.log(1 - p)
    return total


def trainer_of(model, folder, **settings):
    config = RoIConfig(str(folder), use_cpu=True, bf16=False, save_strategy="no", max_length=16, **settings)
    data = Dataset.from_dict({"input_ids": windows().tolist()})
    return RoITrainer(model, config, train_dataset=data, processing_class=byte_tokenizer())


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_the_relaxed_choice_is_the_published_one_and_sums_to_n(n, m):
    logits = logits_of(m, torch.float64)
    for tau in (4.0, 1.0, 0.3):
        found = relaxed_top(logits / tau, n, tau)
        torch.testing.assert_close(found, plainly(logits, n, tau))
        torch.testing.assert_close(found.sum(0), torch.full_like(found[0], n))


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_a_cold_choice_is_the_n_largest(n, m):
    logits = logits_of(m)
    best = torch.zeros_like(logits).scatter_(0, logits.topk(n, dim=0).indices, 1.0)
    torch.testing.assert_close(relaxed_top(logits / 1e-6, n, 1e-6), best)
    assert torch.equal(top_mask(logits, n), best.movedim(0, -1).flatten(-2).bool())


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_its_gradient_is_that_of_finite_differences(n, m):
    for tau in (2.0, 0.5):
        choose = partial(relaxed_top, n=n, tau=tau)
        assert torch.autograd.gradcheck(choose, (logits_of(m, torch.float64)[:, :, :2] / tau).requires_grad_())


def test_its_gradient_is_finite_where_a_choice_is_certain():
    scaled = torch.tensor([[2000.0], [1000.0], [-1e6], [0.0]]).requires_grad_()
    relaxed_top(scaled, 2, 0.05).pow(2).sum().backward()
    assert scaled.grad.isfinite().all()


def test_the_gradient_of_the_logits_is_autograds(tmp_path):
    model = tiny_llama(num_hidden_layers=1)
    trainer = trainer_of(model, tmp_path, max_steps=4, keep_large=1e-3)
    trainer.state.max_steps, trainer.current_gradient_accumulation_steps = 4, 1
    trainer.state.global_step = 1
    tau, kappa = trainer.args.heat(0.25)
    batch = {"input_ids": windows(1), "labels": windows(1)}
    with trainer._soft_masks():
        model(**batch).loss.backward()
        trainer._gradients_of_logits()
    logits = {t.name: trainer.logits(t).detach().clone().requires_grad_() for t in trainer.targets}
    weights, penalty = {}, 0.0
    for place, target in enumerate(trainer.targets):
        noise = trainer._perturbed(place, target) * tau - kappa * trainer.logits(target).detach()
        soft = plainly((noise + kappa * logits[target.name]).double(), 2, tau).float()
        weights[target.name] = trainer.base[target.name] * soft.permute(1, 2, 0).flatten(1)
        penalty = penalty + weights[target.name].square().sum()
    found = torch.func.functional_call(model, weights, kwargs=batch).loss - 1e-3 * (1 - 0.25) * penalty
    found.backward()
    for target in trainer.targets:
        gradient = trainer.logits(target).grad
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, logits[target.name].grad, rtol=1e-3, atol=5e-6)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_the_learned_mask_has_the_pattern_and_the_weights_are_untouched(pattern, tmp_path):
    model = tiny_llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    mask = learn_mask(model, byte_tokenizer(), windows(), tmp_path, pattern=Pattern.parse(pattern))
    assert mask.tensors.keys() == {t.name for t in find_prunable(model)}
    n, m = map(int, pattern.split(":"))
    for kept in mask.tensors.values():
        assert (kept.unflatten(-1, (-1, m)).sum(-1) == n).all()
    assert str(mask.pattern) == pattern
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    with pytest.raises(UsageError, match="`sparsity_type="):
        learn_mask(model, byte_tokenizer(), windows(), tmp_path, pattern=Pattern.parse("3:4"))


@pytest.mark.parametrize(("settings", "alike"), [({"prior_strength": 30.0}, 1.0), ({}, 0.999)])
def test_a_prior_is_where_learning_starts(settings, alike, tmp_path):
    model = tiny_llama()
    prior = one_shot_prior(model, windows(), Wanda())
    trainer = trainer_of(model, tmp_path, **settings)
    for target in trainer.targets:
        kept = prior[target.name]
        logits = trainer.initial_logits(tuple(kept.shape), kept, torch.Generator().manual_seed(0))
        assert (trainer.hard_mask(logits) == kept).float().mean() >= alike


def test_a_run_gives_the_same_mask_twice_and_a_lower_loss_than_its_start(tmp_path):
    data, make = windows(16), partial(tiny_llama, num_hidden_layers=1)

    def loss_under(mask):
        model = make()
        apply_mask(model, mask)
        with torch.no_grad():
            return float(model(input_ids=data, labels=data).loss)

    learn = partial(learn_mask, tokenizer=byte_tokenizer(), windows=data, learning_rate=0.05, save_strategy="no")
    first = learn(make(), output_dir=tmp_path / "a", num_train_epochs=2)
    again = learn(make(), output_dir=tmp_path / "b", num_train_epochs=2)
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    start = learn(make(), output_dir=tmp_path / "c", max_steps=1, kappa=(1e-9, 1e-9))
    assert loss_under(first) < loss_under(start) - 0.05


def test_maskllm_takes_no_other_pattern_than_its_own(tmp_path):
    with pytest.raises(UsageError, match="maskllm learns 2:4 masks only; got `pattern=4:8`"):
        maskllm.learn_mask(tiny_llama(), byte_tokenizer(), torch.ones(2, 8, dtype=torch.long), tmp_path,
                           pattern=Pattern.parse("4:8"))  # fmt: skip
