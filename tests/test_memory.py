"""What cuts memory learns the same mask: step in backward, original weights in their files, small states."""

import importlib.util
import weakref

import pytest
import torch
from conftest import slow, tiny_llama
from test_trainer import trainer
from transformers import TrainerCallback
from transformers.optimization import Adafactor

from proxsparse.learning import optim
from proxsparse.learning.copies import OriginalWeights
from proxsparse.model.prunable import find_prunable


def masks(folder, tokenizer, model=None, **changes):
    runs = trainer(folder, tokenizer, model=model, **changes)
    runs.train()
    return runs.mask().tensors, {n: p.detach().clone() for n, p in runs.model.named_parameters()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first) and first.keys() == second.keys()


@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.bfloat16])
@pytest.mark.parametrize("method", ["masked", "paper"])
@pytest.mark.parametrize("optim", [slow("adamw_torch"), "adamw_torch_fused", "adafactor"])
def test_the_step_in_backward_gives_the_same_weights(tmp_path, tokenizer, method, optim, dtype):
    given = {"method": method, "optim": optim, "max_grad_norm": 0.0, "model": None}
    results = [
        masks(tmp_path / str(fused), tokenizer, **(given | {"model": tiny_llama().to(dtype)}), optim_in_backward=fused)
        for fused in (False, True)
    ]
    (mask, weights), (fused_mask, fused_weights) = results
    assert same(mask, fused_mask)
    assert same(weights, fused_weights)
    assert not same(weights, dict(tiny_llama().to(dtype).named_parameters()))  # it learned something


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adafactor_is_that_of_transformers(decay):
    torch.manual_seed(0)
    shapes = [(12, 8), (3, 8, 4), (7,)]
    ours = [torch.nn.Parameter(torch.randn(*shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    fixed = {"scale_parameter": False, "relative_step": False}
    pair = optim.Adafactor(ours, 0.05, weight_decay=decay), Adafactor(theirs, 0.05, weight_decay=decay, **fixed)
    for _ in range(20):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine) * torch.rand_like(mine)
            other.grad = mine.grad.clone()
        for optimizer in pair:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_gradients_never_exist_all_at_once(tmp_path, tokenizer):
    alive, most = weakref.WeakSet(), []
    model = tiny_llama()

    def count(parameter):
        alive.add(parameter.grad)
        most.append(len(alive))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    trainer(tmp_path, tokenizer, model=model, optim_in_backward=True).train()
    assert len(most) > 50
    assert max(most) <= 2  # one, and the next one that is being made


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_a_run_with_the_step_in_backward_resumes_exactly(tmp_path, tokenizer):
    settings = {"optim_in_backward": True, "save_strategy": "steps", "save_steps": 2}
    whole, _ = masks(tmp_path / "whole", tokenizer, **settings)
    trainer(tmp_path / "broken", tokenizer, callbacks=[StopAfter(4)], **settings).train()
    second = trainer(tmp_path / "broken", tokenizer, **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    assert same(whole, second.mask().tensors)


@pytest.mark.parametrize("place", ["cpu", "checkpoint"])
def test_the_mask_does_not_depend_on_where_the_original_weights_are(tmp_path, tokenizer, checkpoint, place):
    found = []
    for keep in ("device", place):
        model = tiny_llama()
        model.config._name_or_path = checkpoint
        found.append(masks(tmp_path / keep, tokenizer, model=model, keep_base=keep)[0])
    assert same(*found)


def test_weights_left_in_the_checkpoint_are_not_copied(checkpoint):
    targets = find_prunable(tiny_llama())
    original = OriginalWeights(targets, "checkpoint", checkpoint)
    assert not original._kept
    wanted = {target.name: target.weight.detach().clone() for target in targets}
    for target in targets:
        target.weight.detach().zero_()
        assert torch.equal(original.of(target), wanted[target.name])


def test_weights_that_are_not_those_of_the_checkpoint_are_kept_and_it_is_said(checkpoint, caplog):
    targets = find_prunable(tiny_llama())
    targets[3].weight.detach().mul_(2)
    changed = targets[3].weight.detach().clone()
    original = OriginalWeights(targets, "checkpoint", checkpoint)
    assert f"1 of {len(targets)} original weights" in caplog.text
    assert targets[3].name in caplog.text
    assert torch.equal(original.of(targets[3]), changed)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs pip install '.[memory]'")
@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_8_bit_states_learn_nearly_the_same_mask(tmp_path, tokenizer, fused):
    model = tiny_llama(hidden_size=64, intermediate_size=256)  # states under 4096 entries stay float32
    plain, _ = masks(tmp_path / "plain", tokenizer, model=model)
    model = tiny_llama(hidden_size=64, intermediate_size=256)
    small = trainer(tmp_path / "small", tokenizer, model=model, optim="adamw_bnb_8bit", optim_in_backward=fused)
    small.train()
    states = [v for state in small.optimizer.optimizer.state.values() for v in state.values()]
    assert any(torch.is_tensor(state) and state.dtype == torch.uint8 for state in states)
    mask = small.mask().tensors
    different = sum(int((mask[name] != plain[name]).sum()) for name in mask) / sum(m.numel() for m in mask.values())
    assert different < 0.05
