"""Layer-wise steps: what they minimise and move, what they leave alone, and which layers can't have them."""

import copy
import weakref

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import tiny_llama
from test_prunable import FAMILIES, build
from test_trainer import STEPS, config, data, trainer
from tiny_models import tiny_model
from transformers import RwkvConfig, RwkvForCausalLM

from proxsparse.errors import RunError, UsageError
from proxsparse.evaluation.report import draw_run
from proxsparse.learning.copies import OriginalWeights, TakingTurns
from proxsparse.learning.layer_steps import LayerSteps, Pace
from proxsparse.learning.rounded import Adafactor
from proxsparse.model.prunable import find_prunable

SMALL = {"vocab_size": 257, "hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64}
IDS = torch.tensor(data(1)["input_ids"][:])


def stepped(model, steps=1, rate=0.02, settings=None, masked=True, **arguments):
    """Errors of as many steps on one window, after which the model holds the learned weights; and its targets."""
    targets = find_prunable(model)
    rates = {id(target.weight): rate for target in targets}
    paces = iter(Pace(rates, step) for step in range(steps))
    layers = LayerSteps(model, targets, config("unused", **{"layer_span": 1} | (settings or {})), lambda: next(paces))
    turns = TakingTurns(model, targets, OriginalWeights(targets, "device"), None)
    errors = []
    for _ in range(steps):
        with turns.away():
            turns.put_original()
            with layers.watching(), torch.no_grad():
                model.eval()(input_ids=IDS, use_cache=False, **arguments)
            model.train()
            if masked:
                turns.put_masked()
            errors.append(layers.step(turns, layers.pace()).item())
    return errors, layers


def layer_errors(dense, model, spans):
    """Of every layer of a model that is pruned by magnitude, as the module says; spans are given dense inputs."""
    with torch.no_grad():
        states = dense(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states
    rotary = model.model.rotary_emb(states[0], torch.arange(IDS.shape[1])[None])
    for span in spans:
        made = states[span[0]]
        for index in span:
            with torch.no_grad():  # the last hidden state is normed, so the layer is run
                wanted = dense.model.layers[index](states[index], position_embeddings=rotary)
            made = model.model.layers[index](made, position_embeddings=rotary)
            yield (made - wanted).square().sum() / (wanted - states[index]).square().sum()


def pruned(dense):
    model = copy.deepcopy(dense)
    for target in find_prunable(model):
        blocks = target.weight.detach().view(-1, 4)
        dropped = blocks.abs().topk(2, largest=False).indices
        target.weight.data = blocks.scatter(1, dropped, 0.0).view_as(target.weight)
    return model


@pytest.mark.parametrize(
    ("span", "spans"), [(1, [[0], [1], [2]]), (2, [[0, 1], [2]]), (3, [[0, 1, 2]]), (9, [[0, 1, 2]])]
)
def test_a_step_is_adafactors_on_the_error_of_each_span_of_layers_under_its_mask(span, spans):
    dense, learning = tiny_llama(num_hidden_layers=3), tiny_llama(num_hidden_layers=3)
    masked = pruned(dense)
    expected = list(layer_errors(dense, masked, spans))
    sum(expected).backward()
    wanted = copy.deepcopy(dense)
    names = [target.name for target in find_prunable(wanted)]
    for name in names:
        wanted.get_parameter(name).grad = masked.get_parameter(name).grad
    Adafactor([wanted.get_parameter(name) for name in names], lr=0.02).step()
    (error,), _ = stepped(learning, settings={"layer_span": span})
    assert error == pytest.approx(sum(expected).item() / len(expected), rel=1e-4)
    for name, weight in learning.named_parameters():
        torch.testing.assert_close(weight, wanted.get_parameter(name), rtol=1e-4, atol=1e-5)
        assert torch.equal(weight, dense.get_parameter(name)) == (name not in names)


@pytest.mark.parametrize("span", [1, 2])
def test_layers_come_closer_to_the_dense_ones(span):
    errors, _ = stepped(tiny_llama(), steps=12, settings={"layer_span": span})
    assert errors[-1] < 0.9 * errors[0]


def test_spans_shift_from_step_to_step_and_end_where_layers_are_left_out():
    _, layers = stepped(tiny_llama(num_hidden_layers=7), settings={"layer_span": 3})

    def spans(step, without=()):
        layers._seen = dict.fromkeys(index for index in layers.own if index not in without)
        return list(layers._spans(step))

    assert spans(0) == [[0, 1, 2], [3, 4, 5], [6]]
    assert spans(1) == [[0, 1], [2, 3, 4], [5, 6]]
    assert spans(2) == [[0], [1, 2, 3], [4, 5, 6]]
    assert spans(3) == spans(0)
    assert spans(0, without=[1]) == [[0], [2], [3, 4, 5], [6]]


@pytest.mark.parametrize(
    ("model", "begins"),
    [
        (lambda: tiny_model("blt"), {0, 2, 4, 5, 6}),
        (lambda: RwkvForCausalLM(RwkvConfig(**SMALL, num_hidden_layers=4, rescale_every=2)).eval(), {0, 2}),
    ],
    ids=["blt", "rwkv"],
)
def test_a_span_ends_where_the_model_computes_something_between_layers(model, begins):
    model = model().requires_grad_(True)
    (error,), layers = stepped(model, settings={"layer_span": 8}, rate=0.0, masked=False)
    assert set(layers.own) - layers.following == begins
    assert error < 1e-6  # of dense layers, which return what they did in the model


def test_activations_that_are_computed_again_change_nothing():
    models, kept = [tiny_llama(), tiny_llama()], []
    for model, again in zip(models, (False, True), strict=True):
        runs = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        stepped(model, settings={"layer_span": 2, "activation_checkpointing": again})
        kept.append(len(runs))
    assert kept[1] == kept[0] + 1  # and in the backward pass
    assert all(torch.equal(p, models[1].get_parameter(name)) for name, p in models[0].named_parameters())


def test_gradients_of_the_run_are_still_there_after_a_step_and_no_other_is():
    model = tiny_llama()
    model.lm_head.requires_grad_(False)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.grad = torch.full_like(weight, 3.0)
    calls = []
    weight.register_post_accumulate_grad_hook(calls.append)
    stepped(model)
    assert not calls  # an optimizer that steps in the backward pass would have stepped
    assert torch.equal(weight.grad, torch.full_like(weight, 3.0))
    assert all(p.grad is None for p in model.parameters() if p is not weight)


def test_the_layers_are_as_in_training_afterwards():
    model = tiny_llama(attention_dropout=0.5)
    errors, layers = stepped(model, steps=2, rate=0.0)
    assert errors[0] == errors[1]  # without dropout
    assert len(layers.own) == 2
    assert all(module.training for module in model.modules())


def test_layers_that_are_not_alone_learn_from_the_loss_of_the_model_only(caplog):
    shared = tiny_llama(num_hidden_layers=4)
    shared.model.layers[2].mlp = shared.model.layers[1].mlp
    dense = copy.deepcopy(shared)
    _, layers = stepped(shared)
    assert list(layers.own) == [0, 3]
    assert "2 of 4 layers learn from the model's loss only" in caplog.text
    assert "layer 1 shares weights with another one" in caplog.text
    moved = {n.split(".")[2] for n, p in shared.named_parameters() if not torch.equal(p, dense.get_parameter(n))}
    assert moved == {"0", "3"}


def reads_once(model):
    """The second layer needs something that is there once per pass of the whole model."""
    left = []
    model.model.register_forward_pre_hook(lambda *_: left.append(1.0))
    second = model.model.layers[1].forward
    model.model.layers[1].forward = lambda states, **rest: second(states, **rest) + left.pop()


def reads_an_attribute(model):
    """The second layer reads what the first one wrote, whenever it ran last."""
    left = {}
    first, second = (layer.forward for layer in model.model.layers)

    def leave(states, **rest):
        left["states"] = states
        return first(states, **rest)

    model.model.layers[0].forward = leave
    model.model.layers[1].forward = lambda states, **rest: second(states, **rest) + left["states"]


def runs_twice(model):
    second = model.model.layers[1]
    model.model.layers[0].register_forward_hook(lambda block, given, out: second(out, position_embeddings=ROTARY[0]))
    model.model.rotary_emb.register_forward_hook(lambda block, given, out: ROTARY.insert(0, out))


def changes_shape(model):
    model.model.layers[1].register_forward_hook(lambda block, given, out: out[None])
    model.model.norm.register_forward_pre_hook(lambda block, given: (given[0][0],))


ROTARY = []
ODD = {
    reads_once: "fails by itself (IndexError)",
    reads_an_attribute: "reads what another one leaves behind",
    runs_twice: "runs more than once",
    changes_shape: "is not run, or does not turn hidden states into others of the same shape",
}


@pytest.mark.parametrize("odd", ODD)
def test_a_layer_that_cannot_be_run_by_itself_has_no_steps(odd, caplog):
    model = tiny_llama()
    odd(model)
    _, layers = stepped(model)
    assert list(layers.own) == [0]
    assert f"1 of 2 layers learn from the model's loss only, without steps of their own; layer 1 {ODD[odd]}" in (
        caplog.text
    )


def test_layers_read_what_the_dense_model_wrote_into_an_argument_for_them():
    model = tiny_llama()
    first, second = (layer.forward for layer in model.model.layers)

    def write(states, shared, **rest):
        shared["first"] = first(states, **rest)
        return shared["first"]

    model.model.layers[0].forward = write
    model.model.layers[1].forward = lambda states, shared, **rest: second(states, **rest) + shared["first"]
    _, layers = stepped(model, shared={})
    assert list(layers.own) == [0, 1]


def test_running_out_of_memory_is_not_taken_for_a_layer_that_cannot_be_run():
    model = tiny_llama()
    first, calls = model.model.layers[0].forward, []

    def forward(*given, **rest):
        calls.append(1)
        if len(calls) == 2:  # the dense model's pass is the first
            raise torch.OutOfMemoryError
        return first(*given, **rest)

    model.model.layers[0].forward = forward
    with pytest.raises(torch.OutOfMemoryError):
        stepped(model)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_of_other_architectures_learns(name):
    model = build(name, vocab_size=257, initializer_range=0.2)
    errors, layers = stepped(model, steps=8, settings={"layer_span": 2})
    assert list(layers.own) == [0, 1]
    assert layers.following == {1}
    assert errors[-1] < 0.97 * errors[0]


def test_an_error_that_is_not_finite_stops_the_run(tmp_path, tokenizer):
    model = tiny_llama()
    runs = trainer(tmp_path, tokenizer, model)
    runs.objective.layers._checked = True
    compute = runs.objective.layers._compute
    runs.objective.layers._compute = lambda *given: compute(*given) * float("nan")
    with pytest.raises(RunError, match=r"The error of the layers' outputs is nan at step \d"):
        runs.train()


def test_noise_of_bfloat16_weights_differs_by_step_and_micro_batch(tmp_path, tokenizer):
    seeds = []
    model = tiny_llama().to(torch.bfloat16)
    runs = trainer(tmp_path, tokenizer, model, gradient_accumulation_steps=2, layer_span=1)
    step_span = runs.objective.layers._step_span

    def watched(*arguments):
        seeds.append(arguments[-1])
        return step_span(*arguments)

    runs.objective.layers._step_span = watched
    runs.train()
    assert len(set(seeds)) == len(seeds) == 12


def test_compiled_models_have_them_too(tmp_path, tokenizer):
    masks = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        runs = trainer(tmp_path, tokenizer, **compiled)
        runs.train()
        assert list(runs.objective.layers.own) == [0, 1]
        masks.append(runs.mask().tensors)
    assert all(torch.equal(kept, masks[1][name]) for name, kept in masks[0].items())


def test_their_rate_is_that_of_the_run_by_a_factor_shared_by_its_micro_batches(tmp_path, tokenizer):
    runs = trainer(tmp_path, tokenizer, layer_rate=3.0, gradient_accumulation_steps=2)
    ratios = []
    step = runs.objective.layers.step

    def watched(turns, pace):
        ratios.extend((pace.rates[id(p)], g["lr"]) for g in runs.optimizer.param_groups for p in g["params"])
        return step(turns, pace)

    runs.objective.layers.step = watched
    runs.train()
    assert len(ratios) == 14 * STEPS
    assert all(rate == pytest.approx(1.5 * common) for rate, common in ratios)
    assert any(common > 0 for _, common in ratios)


def test_only_the_first_steps_of_a_run_have_them(tmp_path, tokenizer):
    runs = trainer(tmp_path, tokenizer, layer_steps=2)
    runs.train()
    have = [entry["step"] for entry in runs.state.log_history if "layer_error" in entry]
    assert have == [1, 2]


@pytest.mark.parametrize("distill", [1.0, 0.0])
def test_the_logits_of_the_dense_model_are_gone_when_the_backward_pass_begins(distill, tmp_path, tokenizer):
    runs = trainer(tmp_path, tokenizer, distill=distill)
    teacher, backward, alive = runs._teacher, runs.accelerator.backward, []
    kept = []

    def remembered(*given):
        logits = teacher(*given)
        kept.append(weakref.ref(logits))
        return logits

    def watched(*given, **rest):
        alive.append(kept[-1]() is not None)
        return backward(*given, **rest)

    runs._teacher, runs.accelerator.backward = remembered, watched
    runs.train()
    assert alive == [False] * STEPS


@pytest.mark.parametrize(
    "changes", [{"pattern": "4:8"}, {"bf16": True}, {"fp16": True}, {"distill": 0.0}, {"optim_in_backward": True}]
)
def test_runs_of_all_kinds_have_them(changes, tmp_path, tokenizer):
    runs = trainer(tmp_path / "with", tokenizer, **changes)
    runs.train()
    errors = [entry["layer_error"] for entry in runs.state.log_history if "layer_error" in entry]
    assert len(errors) == STEPS
    without = trainer(tmp_path / "without", tokenizer, layer_rate=0, **changes)
    without.train()
    assert any(not torch.equal(kept, without.mask().tensors[name]) for name, kept in runs.mask().tensors.items())


@pytest.mark.parametrize("changes", [{"method": "paper"}, {"masked_forward": False}, {"train_only_pruned": False}])
def test_runs_that_can_not_have_them_have_none_and_say_so_where_they_are_wanted(changes, tmp_path):
    changes = {"distill": 0.0} | changes
    assert config(tmp_path, **changes).layer_rate == 0
    with pytest.raises(UsageError, match="`layer_rate=1.0`"):
        config(tmp_path, layer_rate=1.0, **changes)


def test_the_picture_of_a_run_shows_their_errors_where_they_are_larger_than_the_loss(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("proxsparse.evaluation.report.plt.close", figures.append)
    history = [{"step": step, "mask_churn": 0.1, "kl": 0.1, "layer_error": 0.9} for step in (1, 2, 3)]
    draw_run(history, tmp_path / "run.png", "a run")
    monkeypatch.undo()
    (figure,) = figures
    assert figure.axes[0].get_ylim()[1] > 0.9
    plt.close(figure)


def test_single_large_errors_do_not_flatten_the_loss(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("proxsparse.evaluation.report.plt.close", figures.append)
    errors = (90.0, 0.3, 0.3)
    history = [{"step": step, "mask_churn": 0.1, "kl": 2.0, "layer_error": error} for step, error in enumerate(errors)]
    draw_run(history, tmp_path / "run.png", "a run")
    monkeypatch.undo()
    (figure,) = figures
    assert 2.0 < figure.axes[0].get_ylim()[1] < 3.0
    plt.close(figure)
