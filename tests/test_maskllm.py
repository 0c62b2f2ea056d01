"""MaskLLM: its gradient, its masks, and that it finds a best mask that is known."""

import json
from functools import partial

import pytest
import torch
from conftest import byte_tokenizer, slow, tiny_llama
from datasets import Dataset
from test_prunable import build
from torch import nn
from transformers import TrainerCallback

from proxsparse.baselines import roi
from proxsparse.baselines.maskllm import (
    MASKS,
    MaskLLMConfig,
    MaskLLMTrainer,
    hard_mask,
    initial_logits,
    learn_mask,
)
from proxsparse.baselines.sampling import SampledTrainer, _attribute, one_shot_prior
from proxsparse.baselines.wanda import Wanda
from proxsparse.errors import UsageError
from proxsparse.model.prunable import find_prunable
from proxsparse.operator.pattern import Pattern


def windows(count=8, length=16):
    return torch.randint(1, 257, (count, length), generator=torch.Generator().manual_seed(0))


def trainer_of(model, tmp_path, count=8, **settings):
    settings = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "save_strategy": "no"} | settings
    config = MaskLLMConfig(output_dir=str(tmp_path), max_length=16, **settings)
    data = Dataset.from_dict({"input_ids": windows(count).tolist()})
    return MaskLLMTrainer(model, config, train_dataset=data, processing_class=byte_tokenizer())


def test_the_six_masks_are_all_of_24():
    assert MASKS.sum(1).tolist() == [2.0] * 6
    assert len({tuple(row) for row in MASKS.tolist()}) == 6


def test_the_learned_mask_is_24_and_the_weights_are_untouched(tmp_path):
    model = tiny_llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    mask = learn_mask(model, byte_tokenizer(), windows(), tmp_path, learning_rate=0.1)
    assert set(mask.tensors) == {t.name for t in find_prunable(model)}
    for kept in mask.tensors.values():
        assert (kept.unflatten(-1, (-1, 4)).sum(-1) == 2).all()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)


def test_temperature_and_scale_cool_as_asked(tmp_path):
    config = partial(MaskLLMConfig, str(tmp_path), use_cpu=True, bf16=False, tau=(4.0, 0.04), kappa=(100.0, 400.0))
    assert config().heat(0.5) == (pytest.approx(2.02), 250.0)  # the published cooling
    fast = config(cooling="exponential")
    assert fast.heat(0.5) == (pytest.approx(0.4), pytest.approx(200.0))  # the geometric means
    assert fast.heat(0.0) == (4.0, 100.0)
    early = config(cooling="exponential", cooled_by=0.5)
    assert early.heat(0.25) == pytest.approx(fast.heat(0.5))
    assert early.heat(0.8) == pytest.approx((0.04, 400.0))
    with pytest.raises(UsageError, match="must be one of linear, exponential"):
        config(cooling="cosine")
    with pytest.raises(UsageError, match="at most 1; got 2"):
        config(cooled_by=2)


def test_the_cooling_makes_it_another_run(tmp_path):
    linear = learn_masks(tiny_llama(), tmp_path / "a", save_strategy="no")
    fast = learn_masks(tiny_llama(), tmp_path / "b", save_strategy="no", cooling="exponential")
    assert any(not torch.equal(linear[name], fast[name]) for name in linear)
    with pytest.raises(UsageError, match="`cooling=linear`, now it is exponential"):
        learn_masks(tiny_llama(), tmp_path / "a", save_strategy="no", cooling="exponential")


@pytest.mark.parametrize("learn", [learn_mask, roi.learn_mask])
def test_another_setting_makes_it_another_run_even_where_it_was_a_default(learn, tmp_path):
    learn_masks(tiny_llama(), tmp_path, learn=learn, save_strategy="no")
    learn_masks(tiny_llama(), tmp_path, learn=learn, save_strategy="no", logging_steps=2)  # which decides nothing
    with pytest.raises(UsageError, match="holds a run with `tau="):
        learn_masks(tiny_llama(), tmp_path, learn=learn, save_strategy="no", tau=(8.0, 0.01))
    with pytest.raises(UsageError, match="holds a run with `exclude=None`, now it is q_proj"):
        learn_masks(tiny_llama(), tmp_path, learn=learn, save_strategy="no", exclude="q_proj")
    record = json.loads((tmp_path / "run.json").read_text())  # of a version that left nothing out
    assert record["settings"].pop("exclude") == "None"
    (tmp_path / "run.json").write_text(json.dumps(record))
    learn_masks(tiny_llama(), tmp_path, learn=learn, save_strategy="no")
    with pytest.raises(UsageError, match="holds a run with `exclude=None`, now it is q_proj"):
        learn_masks(tiny_llama(), tmp_path, learn=learn, save_strategy="no", exclude="q_proj")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"tau": (1.0, 0.0)}, "`tau` must be above 0"),
        ({"prior": {}}, "`prior` has no mask for model.layers.0"),
        ({"pattern": Pattern.parse("unstructured", 0.5)}, "learns"),
    ],
    ids=["tau", "prior", "pattern"],
)
def test_what_can_not_be_learned_is_one_sentence(wrong, sentence, tmp_path):
    with pytest.raises(UsageError, match=sentence):
        roi.learn_mask(tiny_llama(), byte_tokenizer(), windows(2), tmp_path, **wrong)
    with pytest.raises(UsageError, match=r"token ids of shape \(N, T >= 2\)"):
        roi.learn_mask(tiny_llama(), byte_tokenizer(), windows(2).tolist(), tmp_path)


def learn_masks(model, folder, count=8, learn=learn_mask, **settings):
    return learn(model, byte_tokenizer(), windows(count), folder, learning_rate=0.1, **settings).tensors


@pytest.mark.parametrize(
    ("family", "learn"), [slow("llama", learn_mask), slow("mixtral", learn_mask), ("mixtral", roi.learn_mask)]
)
def test_a_run_that_was_stopped_goes_on_exactly_and_another_is_refused(family, learn, tmp_path, monkeypatch):
    make, learned = partial(build, family, vocab_size=257), partial(learn_masks, learn=learn)
    whole = learned(make(), tmp_path / "whole", save_steps=2)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    def stopping(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.add_callback(Stop())

    original = SampledTrainer.__init__
    with monkeypatch.context() as patch:
        patch.setattr(SampledTrainer, "__init__", stopping)
        with pytest.raises(KeyboardInterrupt):
            learned(make(), tmp_path / "broken", save_steps=2)
    again = learned(make(), tmp_path / "broken", save_steps=2)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    with pytest.raises(UsageError, match="holds a run with another `dataset`: give another `output_dir`"):
        learned(make(), tmp_path / "broken", count=6, save_steps=2)


def test_the_model_comes_back_as_it_was(tmp_path):
    model = tiny_llama()
    cache, forward = model.config.use_cache, model.forward
    learn_masks(model, tmp_path, bf16=True)
    assert model.config.use_cache == cache
    assert model.forward == forward
    assert model(input_ids=windows(1)).logits.dtype == torch.float32


def test_a_prior_is_where_learning_starts():
    model = tiny_llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    prior = one_shot_prior(model, windows(), Wanda())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    (kept,) = {name: m for name, m in prior.items() if name.endswith("layers.0.mlp.up_proj.weight")}.values()
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(hard_mask(initial_logits(tuple(kept.shape), kept, 30.0, generator)), kept)
    weak = hard_mask(initial_logits(tuple(kept.shape), None, 3.0, generator))
    assert (weak == kept).float().mean() < 0.7


def test_the_gradient_of_the_logits_is_autograds(tmp_path):
    model = tiny_llama(num_hidden_layers=1)
    trainer = trainer_of(model, tmp_path, max_steps=4, keep_large=1e-3)
    trainer.state.max_steps, trainer.current_gradient_accumulation_steps = 4, 1
    batch = {"input_ids": windows(1), "labels": windows(1)}
    with trainer._soft_masks():
        loss = model(**batch).loss
        loss.backward()
        trainer._gradients_of_logits()
    closed = {t.name: trainer.logits(t).grad.clone() for t in trainer.targets}
    # The same by autograd, through torch.func.
    logits = {t.name: trainer.logits(t).detach().clone().requires_grad_() for t in trainer.targets}
    weights, penalty = {}, 0.0
    for place, target in enumerate(trainer.targets):
        noise = trainer._perturbed(place, target)  # (kappa p + g) / tau
        fixed = noise - trainer.args.kappa[0] / trainer.args.tau[0] * trainer.logits(target).detach()
        choice = (fixed + trainer.args.kappa[0] / trainer.args.tau[0] * logits[target.name]).softmax(0)
        weights[target.name] = trainer.base[target.name] * torch.einsum("koi,kj->oij", choice, MASKS).flatten(-2)
        penalty = penalty + weights[target.name].square().sum()
    for target in trainer.targets:
        delattr(target.module, _attribute(target))
    found = torch.func.functional_call(model, weights, kwargs=batch).loss - 1e-3 * penalty
    found.backward()
    for name, gradient in closed.items():
        torch.testing.assert_close(gradient, logits[name].grad, rtol=1e-3, atol=1e-7)


def test_it_finds_a_best_mask_that_is_known(tmp_path):
    """A model whose dense output needs two inputs of each block only: the others are noise to be dropped."""
    torch.manual_seed(0)
    model = tiny_llama(num_hidden_layers=1, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    targets = find_prunable(model)
    best = {t.name: MASKS[torch.randint(6, (t.weight.shape[0], t.weight.shape[1] // 4))].flatten(-2) for t in targets}
    mlp = [t for t in targets if "mlp" in t.name]
    with torch.no_grad():
        for target in targets:
            target.weight.mul_(best[target.name])
    data = windows(400, 16)
    clean = {t.name: t.weight.detach().clone() for t in mlp}
    with torch.no_grad():
        wanted = model(input_ids=data).logits
        for target in mlp:  # distractors of the same size where the best mask has zeros
            noise = torch.randn_like(target.weight) * clean[target.name].std()
            target.weight.add_(noise * (1 - best[target.name]))

    class Taught(MaskLLMTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            places = (inputs["input_ids"][:, None] == data[None].to(inputs["input_ids"].device)).all(-1).int().argmax(1)
            return nn.functional.mse_loss(model(input_ids=inputs["input_ids"]).logits, wanted[places])

    settings = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "save_strategy": "no"}
    settings |= {"num_train_epochs": 6, "per_device_train_batch_size": 8, "learning_rate": 0.02, "kappa": (10.0, 100.0)}
    config = MaskLLMConfig(output_dir=str(tmp_path), max_length=16, **settings)
    rows = Dataset.from_dict({"input_ids": data.tolist()})
    trainer = Taught(model, config, train_dataset=rows, processing_class=byte_tokenizer())
    before = trainer.mask().tensors
    trainer.train()
    after = trainer.mask().tensors
    first = sum(float((before[t.name] == best[t.name].bool()).float().mean()) for t in mlp) / len(mlp)
    last = sum(float((after[t.name] == best[t.name].bool()).float().mean()) for t in mlp) / len(mlp)
    assert first == pytest.approx(0.5, abs=0.06)  # by chance: no prior
    assert last > 0.8, (first, last)
