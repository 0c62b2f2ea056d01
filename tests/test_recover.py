"""Recovery: the kept weights learn from the dense model, the mask stays, and what is saved says so."""

import dataclasses
import json

import pytest
import torch
from conftest import tiny_llama
from test_compact import magnitudes

import proxsparse
from proxsparse.__main__ import main as console
from proxsparse.errors import RunError, UsageError
from proxsparse.learning.recover import recover
from proxsparse.mask import Mask, apply_mask, fit_mask, load_mask

PLAIN = {"bf16": False, "logging_steps": 1, "save_steps": 2}


@pytest.fixture
def windows():
    return torch.randint(1, 257, (6, 24), generator=torch.Generator().manual_seed(0))


def pruned_and_dense(**sizes):
    dense, pruned = tiny_llama(**sizes), tiny_llama(**sizes)
    mask = Mask(magnitudes(dense))
    apply_mask(pruned, mask)
    return pruned, dense, mask


def copy_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def divergence(model, dense, windows):
    with torch.no_grad():
        p, q = (m(input_ids=windows).logits.log_softmax(-1) for m in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("scope", ["full", "layer"])
def test_kept_weights_and_gains_move_and_zeros_and_ends_do_not(scope, tokenizer, windows):
    model, dense, mask = pruned_and_dense()
    before, far = copy_of(model), divergence(model, dense, windows)
    teacher = copy_of(dense)
    recover(model, dense, mask, tokenizer, windows, scope=scope, num_train_epochs=4, learning_rate=0.01, **PLAIN)
    names = moved(model, before)
    assert set(mask.tensors) <= names
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & names
    for name, target in fit_mask(model, mask).items():
        assert not target.rows(target.weight.detach())[~mask.tensors[name]].view(torch.int32).any(), name
    assert divergence(model, dense, windows) < 0.9 * far
    assert not moved(dense, teacher)
    assert all(p.requires_grad for p in [*model.parameters(), *dense.parameters()])


def test_with_scope_norms_every_matrix_keeps_its_bits(tokenizer, windows):
    model, dense, mask = pruned_and_dense()
    before, far = copy_of(model), divergence(model, dense, windows)
    recover(model, dense, mask, tokenizer, windows, scope="norms", num_train_epochs=4, **PLAIN)
    assert moved(model, before) == {name for name in before if "norm" in name}
    assert divergence(model, dense, windows) < far


@pytest.mark.parametrize("scope", ["full", "layer"])
def test_a_recovery_that_stopped_goes_on_to_the_same_weights(scope, tokenizer, windows, tmp_path, monkeypatch):
    unbroken, dense, mask = pruned_and_dense()
    recover(unbroken, dense, mask, tokenizer, windows, tmp_path / "unbroken", scope=scope, **PLAIN)
    model, *_ = pruned_and_dense()
    stop = {"full": "proxsparse.learning.recover.RecoveryTrainer._teacher", "layer": "proxsparse.learning.layers.fit"}
    module, _, name = stop[scope].rpartition(".")
    calls, whole = [], monkeypatch.derive_importpath(stop[scope], True)[1]
    whole = getattr(whole, name) if isinstance(name, str) else whole

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) == {"full": 4, "layer": 2}[scope]:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(stop[scope], broken)
        with pytest.raises(KeyboardInterrupt):
            recover(model, dense, mask, tokenizer, windows, tmp_path / "broken", scope=scope, **PLAIN)
    model, *_ = pruned_and_dense()  # a new process
    recover(model, dense, mask, tokenizer, windows, tmp_path / "broken", scope=scope, **PLAIN)
    assert not moved(model, copy_of(unbroken))
