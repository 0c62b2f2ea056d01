"""The learning loop: when the operator runs, what is logged, resuming, bfloat16, and failures."""

import copy

import pytest
import torch
from conftest import slow, tiny_llama
from datasets import Dataset
from test_prunable import build
from transformers import TrainerCallback

from proxsparse.errors import RunError
from proxsparse.learning.config import METHODS, ProxSparseConfig
from proxsparse.learning.losses import distillation_loss
from proxsparse.learning.proximal import ProxCallback, ProximalStep
from proxsparse.learning.trainer import ProxSparseTrainer
from proxsparse.operator.prox import prox_op
from proxsparse.resume import last_complete_checkpoint

STEPS = 6


def config(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_length": 32,
        "disable_tqdm": True,
    }
    return ProxSparseConfig(**(settings | changes))


def data(rows=STEPS, seed=0):
    ids = torch.randint(1, 257, (rows, 32), generator=torch.Generator().manual_seed(seed))
    return Dataset.from_dict({"input_ids": ids.tolist()})


def trainer(folder, tokenizer, model=None, rows=STEPS, callbacks=(), **changes):
    settings = config(folder, **changes)
    return ProxSparseTrainer(
        model or tiny_llama(), settings, train_dataset=data(rows), processing_class=tokenizer, callbacks=list(callbacks)
    )


class CountSteps(TrainerCallback):
    def __init__(self):
        self.steps = 0

    def on_step_end(self, *args, **kwargs):
        self.steps += 1


def test_samples_that_come_one_by_one_are_learned_from(tmp_path, tokenizer):
    settings = config(tmp_path, method="paper", max_steps=2, save_strategy="no")
    rows = data(STEPS).to_iterable_dataset()
    runs = ProxSparseTrainer(tiny_llama(), settings, train_dataset=rows, processing_class=tokenizer)
    runs.train()
    assert runs.state.global_step == 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_the_operator_runs_once_per_optimizer_step(tmp_path, tokenizer, method, accumulation, monkeypatch):
    runs = trainer(tmp_path, tokenizer, method=method, gradient_accumulation_steps=accumulation)
    calls = []
    monkeypatch.setattr(ProximalStep, "__call__", lambda step, *args: calls.append(args))
    runs.train()
    assert len(calls) == runs.state.global_step == STEPS // accumulation


def test_a_skipped_step_is_not_shrunk():
    calls = []
    callback = ProxCallback(lambda *args: calls.append(args))

    class Scaler:
        scale = 8.0

        def get_scale(self):
            return self.scale

    class Optimizer:
        scaler = Scaler()
        step_was_skipped = False

    class State:
        global_step, max_steps = 0, 1

    optimizer = Optimizer()
    callback.on_pre_optimizer_step(None, State, None, optimizer=optimizer)
    optimizer.scaler.scale = 4.0  # what an overflow does, also where the fused optimizers report no skip
    callback.on_optimizer_step(None, State, None, optimizer=optimizer)
    assert not calls
    callback.on_pre_optimizer_step(None, State, None, optimizer=optimizer)
    callback.on_optimizer_step(None, State, None, optimizer=optimizer)
    assert len(calls) == 1
    optimizer.step_was_skipped = True
    callback.on_pre_optimizer_step(None, State, None, optimizer=optimizer)
    callback.on_optimizer_step(None, State, None, optimizer=optimizer)
    assert len(calls) == 1


def test_without_a_gradient_step_the_paper_method_is_the_operator_repeated(tmp_path, tokenizer):
    model = tiny_llama()
    before = copy.deepcopy(model)
    runs = trainer(tmp_path, tokenizer, model, method="paper", learning_rate=1e-30, lambda_value=0.3)
    runs.train()
    name = "model.layers.0.mlp.up_proj.weight"
    expected = before.get_parameter(name).detach()
    for _ in range(STEPS):
        expected = prox_op(expected, 0.3)
    torch.testing.assert_close(runs.model.get_parameter(name).detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_log_has_every_metric(tmp_path, tokenizer, method):
    runs = trainer(tmp_path, tokenizer, method=method)
    runs.train()
    logs = [entry for entry in runs.state.log_history if "share_24" in entry]
    assert len(logs) == STEPS
    loss = "kl" if method == "masked" else "lm_loss"
    for key in (loss, "regularizer", "share_24", "mask_churn", "prox_seconds", "prox_share"):
        assert all(key in entry for entry in logs), key
    assert 0 < logs[-1]["prox_share"] < 1
    assert logs[0]["regularizer"] > logs[-1]["regularizer"] > 0


def test_reporters_get_the_metrics(tmp_path, tokenizer, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer(tmp_path / "run", tokenizer, report_to="tensorboard").train()
    events = accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert {"train/share_24", "train/mask_churn", "train/kl", "train/prox_share"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("train/share_24")) == STEPS


def test_a_strong_lambda_ends_with_24_blocks_everywhere(tmp_path, tokenizer):
    runs = trainer(tmp_path, tokenizer, method="paper", lambda_value=20.0)
    runs.train()
    assert runs.state.log_history[-2]["share_24"] == 1.0


def test_masked_forward_computes_with_the_masked_original_weights(tmp_path, tokenizer):
    model = tiny_llama()
    original = {n: p.detach().clone() for n, p in model.named_parameters()}
    runs = trainer(tmp_path, tokenizer, model)
    runs.train()
    mask = runs.mask()
    moved = 0.0
    for target in runs.targets:
        moved += (target.weight.detach() - original[target.name]).abs().sum().item()
        with runs.objective.turns.away():
            runs.objective.turns.put_masked()
            seen = target.weight.detach().clone()
        assert torch.equal(seen, original[target.name] * mask.tensors[target.name])
        with runs.objective.turns.away():
            runs.objective.turns.put_original()
            assert torch.equal(target.weight.detach(), original[target.name])
    assert moved > 0


def test_without_the_masked_forward_the_teacher_is_the_dense_model_too(tmp_path, tokenizer):
    changes = {"method": "paper", "distill": 1.0, "train_only_pruned": True, "learning_rate": 1e-2, "lambda_value": 0.1}
    runs, teacher = trainer(tmp_path, tokenizer, **changes), []
    plain = runs._teacher

    def logits(model, inputs):
        teacher.append((inputs["input_ids"], plain(model, inputs)))
        return teacher[-1][1]

    runs._teacher = logits
    runs.train()
    dense = tiny_llama()
    assert len(teacher) == STEPS
    for ids, found in teacher:
        assert torch.allclose(found, dense(input_ids=ids).logits, atol=1e-5)
    assert runs.state.log_history[-2]["kl"] > 1e-3


def test_masked_forward_freezes_what_is_not_pruned(tmp_path, tokenizer):
    model = tiny_llama()
    before = model.model.embed_tokens.weight.detach().clone()
    runs = trainer(tmp_path, tokenizer, model)
    runs.train()
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_learning_lowers_the_divergence_from_the_dense_model(tmp_path, tokenizer):
    runs = trainer(tmp_path, tokenizer, rows=60, learning_rate=0.02)
    ids = torch.tensor(data(60)["input_ids"])

    @torch.no_grad()
    def divergence():
        with runs.objective.turns.away():
            runs.objective.turns.put_original()
            dense = runs.model(input_ids=ids).logits.flatten(0, 1)
        with runs.objective.turns.away():
            runs.objective.turns.put_masked()
            return (distillation_loss(runs.model(input_ids=ids).logits.flatten(0, 1), dense) / dense.shape[0]).item()

    before = divergence()
    runs.train()
    assert divergence() < 0.8 * before


def test_lambda2_is_in_the_loss_and_its_gradient_does_not_depend_on_accumulation(tmp_path, tokenizer):
    gradients = []
    for accumulation in (1, 2):
        torch.manual_seed(0)
        model = tiny_llama()
        runs = trainer(
            tmp_path / str(accumulation), tokenizer, model, rows=accumulation, method="paper", project_lambda2=1,
            lambda2_value=1e3, gradient_accumulation_steps=accumulation, max_grad_norm=0.0, learning_rate=1e-9,
        )  # fmt: skip
        with torch.no_grad():
            for target in runs.targets:  # away from W0, where the penalty has a slope
                target.weight.mul_(1.5)
        seen = []

        class Grab(TrainerCallback):
            def on_pre_optimizer_step(self, *args, seen=seen, runs=runs, **kwargs):
                seen.append(runs.targets[0].weight.grad.clone())

        runs.add_callback(Grab())
        runs.train()
        gradients.append(seen[0])
        assert any(entry.get("lambda2_loss", 0) > 0 for entry in runs.state.log_history)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.02, atol=1e-2 * gradients[0].abs().max().item())


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_bfloat16_learns_only_with_stochastic_rounding(tmp_path, tokenizer, rounding):
    model = tiny_llama().to(torch.bfloat16)
    before = model.get_parameter("model.layers.0.mlp.up_proj.weight").detach().clone()
    # A step of 1e-4 is a tenth of a unit in the last place of a weight of 0.2, and there are six.
    runs = trainer(
        tmp_path, tokenizer, model, method="paper", learning_rate=1e-4, lambda_value=0.0, rounding=rounding,
        warmup_steps=0, lr_scheduler_type="constant",
    )  # fmt: skip
    runs.train()
    big = before.abs() > 0.1
    changed = (model.get_parameter("model.layers.0.mlp.up_proj.weight").detach() != before)[big].float().mean().item()
    assert (changed > 0.15) if rounding == "stochastic" else (changed < 0.05)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_mask(tmp_path, tokenizer, method):
    masks = []
    for attempt in range(2):
        runs = trainer(tmp_path / str(attempt), tokenizer, method=method)
        runs.train()
        masks.append(runs.mask().tensors)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "lam"), [(torch.float32, "auto"), slow(torch.bfloat16, None), slow(torch.float32, None)]
)
def test_a_resumed_run_ends_with_the_mask_of_an_unbroken_one(tmp_path, tokenizer, method, dtype, lam):
    saving = {"save_strategy": "steps", "save_steps": 2, "method": method, "save_total_limit": 2, "lambda_value": lam}
    whole = trainer(tmp_path / "whole", tokenizer, tiny_llama().to(dtype), **saving)
    whole.train()
    broken = trainer(tmp_path / "broken", tokenizer, tiny_llama().to(dtype), callbacks=[StopAt(5)], **saving)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    checkpoint = last_complete_checkpoint(tmp_path / "broken")
    assert checkpoint.endswith("checkpoint-4")
    again = trainer(tmp_path / "broken", tokenizer, tiny_llama().to(dtype), **saving)
    again.train(resume_from_checkpoint=checkpoint)
    for target in again.targets:
        assert torch.equal(target.weight, whole.model.get_parameter(target.name)), target.name
    first, second = whole.mask().tensors, again.mask().tensors
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["mixtral", slow("qwen3_moe"), slow("gpt2")])
def test_other_architectures_resume_exactly(tmp_path, tokenizer, family):
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    whole = trainer(tmp_path / "whole", tokenizer, build(family, vocab_size=257), **saving)
    whole.train()
    broken = trainer(tmp_path / "broken", tokenizer, build(family, vocab_size=257), callbacks=[StopAt(5)], **saving)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    again = trainer(tmp_path / "broken", tokenizer, build(family, vocab_size=257), **saving)
    again.train(resume_from_checkpoint=last_complete_checkpoint(tmp_path / "broken"))
    for target in again.targets:
        assert torch.equal(target.weight, whole.model.get_parameter(target.name)), target.name


def test_a_loss_that_is_not_finite_stops_and_names_the_step_and_the_checkpoint(tmp_path, tokenizer):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    model.model.norm.weight.fill_(float("nan"))

    runs = trainer(tmp_path, tokenizer, callbacks=[Poison()], save_strategy="steps", save_steps=2)
    with pytest.raises(RunError, match=r"loss is nan at step 5.*last good checkpoint is .*checkpoint-4"):
        runs.train()
    assert (tmp_path / "checkpoint-4").is_dir()


def test_a_weight_that_is_not_finite_is_named(tmp_path, tokenizer):
    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            with torch.no_grad():
                runs.targets[3].weight[0, 0] = float("inf")

    runs = trainer(tmp_path, tokenizer, callbacks=[Poison()], method="paper")
    with pytest.raises(RunError, match=r"o_proj.weight at step 1: weight has NaN or infinite entries in 1 of"):
        runs.train()


def test_evaluation_measures_the_masked_original_weights(tmp_path, tokenizer):
    runs = trainer(tmp_path, tokenizer, eval_strategy="no")
    runs.eval_dataset = data(4, seed=1)
    dense = tiny_llama()
    found = runs.evaluate(data(4, seed=1))["eval_loss"]
    ids = torch.tensor(data(4, seed=1)["input_ids"])
    assert found != pytest.approx(dense(input_ids=ids, labels=ids).loss.item(), rel=1e-3)
    with torch.no_grad():
        for target in runs.targets:
            target.weight.mul_(runs.mask().tensors[target.name])
    assert found == pytest.approx(runs.model(input_ids=ids, labels=ids).loss.item(), rel=1e-4)
