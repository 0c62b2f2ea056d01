"""Masks: packing, checking, applying to the right model only."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_prunable import build

from proxsparse.errors import RunError, UsageError
from proxsparse.mask import Mask, apply_mask, extract_mask, load_mask, save_mask
from proxsparse.model.prunable import find_prunable, sparsity_by_kind
from proxsparse.operator.pattern import Pattern
from proxsparse.operator.prox import top2_mask


def mask_of(model, name="tiny"):
    targets = find_prunable(model)
    mask = extract_mask({t.name: t.weight.detach() for t in targets}, targets)
    mask.base_model = name
    return mask


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_a_mask_survives_the_file(tmp_path_factory, rows, groups, seed):
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    weight = torch.randn(rows, 4 * groups, generator=torch.Generator().manual_seed(seed))
    mask = Mask({"w": top2_mask(weight)}, base_model="m", info={"method": "x", "lambda1": 0.5})
    save_mask(mask, path)
    again = load_mask(path)
    assert torch.equal(again.tensors["w"], mask.tensors["w"])
    assert (str(again.pattern), again.base_model, again.info) == ("2:4", "m", {"method": "x", "lambda1": 0.5})


def test_a_transposed_mask_survives_the_file(tmp_path):
    kept = top2_mask(torch.randn(8, 24)).T.contiguous().T  # as masks of Conv1D weights come
    save_mask(Mask({"w": kept}), tmp_path / "mask.safetensors")
    assert torch.equal(load_mask(tmp_path / "mask.safetensors").tensors["w"], kept)


def test_a_mask_costs_one_bit_a_weight(tmp_path):
    mask = mask_of(tiny_llama())
    save_mask(mask, tmp_path / "mask.safetensors")
    bits = sum(m.numel() for m in mask.tensors.values())
    assert sum(t.nbytes for t in load_file(tmp_path / "mask.safetensors").values()) == bits // 8


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "phi3"])
def test_applying_keeps_the_kept_weights_bit_for_bit_and_zeroes_the_rest(family):
    model, original = build(family), build(family)
    mask = mask_of(model)
    pruned = apply_mask(model, mask)
    assert len(pruned) == len(mask.tensors)
    names = {t.name for t in pruned}
    for name, parameter in model.named_parameters():
        before = original.get_parameter(name)
        if name not in names:
            assert torch.equal(parameter, before), name
    for target in pruned:
        rows, before = target.rows(target.weight), target.rows(original.get_parameter(target.name))
        kept = mask.tensors[target.name]
        assert torch.equal(rows[kept], before[kept])
        assert (rows[~kept] == 0).all()
        assert not torch.signbit(rows[~kept]).any()
        assert (kept.unflatten(-1, (-1, 4)).sum(-1) == 2).all()


def test_a_mask_for_another_model_is_refused():
    mask = mask_of(tiny_llama(), "deep")
    with pytest.raises(
        UsageError, match=r"made for deep and does not fit .*has 7 weights the model lacks, the first is"
    ):
        apply_mask(tiny_llama(num_hidden_layers=1), mask)
    with pytest.raises(UsageError, match=r"q_proj.weight has shape \(32, 32\) in the mask and \(64, 64\) in the model"):
        apply_mask(tiny_llama(hidden_size=64), mask)


def test_learned_weights_that_are_not_finite_are_named():
    model = tiny_llama()
    targets = find_prunable(model)
    weights = {t.name: t.weight.detach() for t in targets}
    weights[targets[2].name][0, 0] = float("nan")
    with pytest.raises(RunError, match=r"v_proj.weight has NaN or infinite entries"):
        extract_mask(weights, targets)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[: len(raw) // 2], "is damaged"),
        (lambda raw: b"\xff" * 64 + raw[64:], "is damaged"),
        (lambda raw: b"", "is damaged"),
        (lambda raw: raw.replace(b"proxsparse-mask-1", b"proxsparse-mask-9"), "not a mask written by"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(tmp_path, damage, message):
    path = tmp_path / "mask.safetensors"
    save_mask(mask_of(tiny_llama()), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises((RunError, UsageError), match=message):
        load_mask(path)


@pytest.mark.parametrize(
    ("tensor", "shape", "message"),
    [
        (np.full((2, 1), 0xFF, np.uint8), [2, 8], "is not 2:4: 4 blocks differ, the first is block 0"),
        (np.full((2, 1), 0x33, np.uint8), [2, 16], "is not packed as its shape"),
        (np.full((2, 1), 0x33, np.uint8), [2, -8], "is not packed as its shape"),
        (np.full((2, 1), 0x33, np.uint8), "x", "is not packed as its shape"),
        (np.full((2, 1), 0.5, np.float32), [2, 8], "is not packed as its shape"),
        (np.full((2, 1), 0x03, np.uint8), [2, 6], "has width 6, which has no blocks of 4"),
    ],
)
def test_wrong_contents_are_refused(tmp_path, tensor, shape, message):
    metadata = {"format": "proxsparse-mask-1", "pattern": "2:4", "base_model": "", "info": {}, "shapes": {"w": shape}}
    save_file({"w": tensor}, tmp_path / "m.safetensors", {"proxsparse": json.dumps(metadata)})
    with pytest.raises(RunError, match=message):
        load_mask(tmp_path / "m.safetensors")


@given(st.binary(max_size=400))
@settings(max_examples=100, deadline=None)
def test_the_reader_survives_any_bytes(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("fuzz") / "mask.safetensors"
    path.write_bytes(raw)
    with pytest.raises((RunError, UsageError)):
        load_mask(path)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_the_reader_survives_changed_bytes(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("mask")
    save_mask(Mask({"w": top2_mask(torch.randn(4, 8)), "v": top2_mask(torch.randn(2, 12))}), folder / "whole")
    raw = bytearray((folder / "whole").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (folder / "changed").write_bytes(raw[: data.draw(st.integers(len(raw) // 2, len(raw)))])
    try:
        found = load_mask(folder / "changed")
    except (UsageError, RunError):
        return
    # What is let through is a mask: of some pattern, and every block of it.
    for tensor in found.tensors.values():
        assert tensor.dtype == torch.bool
        if str(found.pattern) == "2:4":
            assert (tensor.unflatten(-1, (-1, 4)).sum(-1) == 2).all()


def test_the_same_mask_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_mask(mask_of(tiny_llama()), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UsageError, match="There is no file"):
        load_mask(tmp_path / "nothing.safetensors")


def test_a_mask_is_written_whole_or_not_at_all(tmp_path):
    broken = Mask({"w": torch.ones(2, 4, dtype=torch.bool)})
    with pytest.raises(RunError, match="is not 2:4"):
        save_mask(broken, tmp_path / "mask.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pattern", ["4:2", "2:2", "0:4", "2-4", "a:b", ""])
def test_bad_patterns_are_refused(pattern):
    with pytest.raises(UsageError, match="must be N:M with N < M"):
        Pattern.parse(pattern)


def test_zeros_are_counted_by_block_and_layer_kind():
    model = tiny_llama()
    targets = find_prunable(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::4] = 0
        model.model.layers[1].mlp.up_proj.weight[:, ::4] = 0
    shares = sparsity_by_kind({t.name: t.weight for t in targets}, targets)
    assert shares["mlp.up_proj"] == [0, 1, 0, 0, 0]
    assert shares["mlp.gate_proj"] == [1, 0, 0, 0, 0]
    assert sum(shares["all"]) == pytest.approx(1)
    assert list(shares)[-1] == "all"
