"""Masks in the layouts that MaskLLM and PATCH publish, written here as their programs write them."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from huggingface_hub import ModelCard
from test_compact import magnitudes
from test_prunable import build
from transformers import AutoModelForCausalLM

import proxsparse
from proxsparse.__main__ import main as console
from proxsparse.commands import export as export_command
from proxsparse.errors import RunError, UsageError
from proxsparse.mask import load_mask
from proxsparse.operator.pattern import Pattern

UP = "model.layers.0.mlp.up_proj.weight"


def own_layout(model):
    """Name -> mask in the weight's own layout, as a numpy array."""
    from proxsparse.model.prunable import find_prunable

    kept = magnitudes(model)
    return {t.name: kept[t.name].movedim(-1, t.in_dim).contiguous().numpy() for t in find_prunable(model)}


def save_as_maskllm(masks, path):
    np.savez_compressed(path, **{f"{name}.mask": np.packbits(mask) for name, mask in masks.items()})


def save_as_patch(masks, path, **meta):
    meta = {"repo": "llama-MaskLLM", "base_model": "meta/llama", "method": "MaskLLM", "pattern": "2:4"} | meta
    arrays = {"__meta__": np.array(json.dumps(meta))}
    for name, mask in masks.items():
        arrays[name] = np.packbits(mask.reshape(-1))
        arrays[f"{name}.__shape__"] = np.array(mask.shape, dtype=np.int64)
    np.savez_compressed(path, **arrays)


SAVE = {"maskllm": save_as_maskllm, "patch": save_as_patch}


@pytest.mark.parametrize("layout", SAVE)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_masks_come_back_with_inputs_last(layout, family, tmp_path):
    model = build(family)
    SAVE[layout](own_layout(model), tmp_path / "mask.npz")
    for path in (tmp_path / "mask.npz", tmp_path):
        found = load_mask(path, model)
        assert found.pattern == Pattern(2, 4)
        wanted = magnitudes(model)
        assert found.tensors.keys() == wanted.keys()
        assert all(torch.equal(found.tensors[name], wanted[name]) for name in wanted)
    assert found.info["method"].startswith("MaskLLM")
    assert found.base_model == ("meta/llama" if layout == "patch" else "")


@pytest.mark.parametrize("layout", SAVE)
def test_every_command_with_a_mask_takes_them(layout, checkpoint, mask, corpus, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    SAVE[layout](own_layout(model), tmp_path / "theirs.npz")
    flags = ["--model", checkpoint, "--mask", str(tmp_path / "theirs.npz")]
    text = ["--dataset", corpus, "--ctx_len", "32", "--max_windows", "2"]
    assert console(["apply", *flags, *text, "--save", str(tmp_path / "applied")]) == 0
    assert console(["export", *flags, "--to", str(tmp_path / "exported")]) == 0
    assert console(["export", *flags, "--form", "mask", "--to", str(tmp_path / "mask")]) == 0
    for folder in ("applied", "exported"):
        assert console(["check", "--model", str(tmp_path / folder), "--base", checkpoint]) == 0
    ours, theirs = load_mask(mask).tensors, load_mask(tmp_path / "mask").tensors
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_our_own_npz_form_comes_back(checkpoint, mask, tmp_path):
    flags = ["--model", checkpoint, "--mask", str(mask), "--form", "npz", "--to", str(tmp_path / "npz")]
    assert console(["export", *flags]) == 0
    found = load_mask(tmp_path / "npz", proxsparse.load_model(checkpoint))
    assert all(torch.equal(found.tensors[name], kept) for name, kept in load_mask(mask).tensors.items())


def test_tiles_that_stay_dense_make_an_unstructured_mask(model, tmp_path):
    masks = own_layout(model)
    masks[UP][:32] = True
    save_as_patch(masks, tmp_path / "mask.npz", pattern="Dense/2:4 tiles", method="PATCH")
    found = load_mask(tmp_path / "mask.npz", model)
    assert str(found.pattern) == "unstructured"
    assert found.info["pattern"] == "Dense/2:4 tiles"
    assert found.tensors[UP][:32].all()
    proxsparse.apply_mask(model, found)
    assert (model.get_parameter(UP)[:32] != 0).all()


def test_other_patterns_and_masks_that_prune_nothing(model, tmp_path):
    quarter = {name: np.tile([True, False, False, False], mask.size // 4).reshape(mask.shape)
               for name, mask in own_layout(model).items()}  # fmt: skip
    save_as_maskllm(quarter, tmp_path / "quarter.npz")
    assert load_mask(tmp_path / "quarter.npz", model).pattern == Pattern.parse("1:4", 0.75)
    eighth = {name: np.tile([True, True, False, False] + 4 * [False], mask.size // 8).reshape(mask.shape)
              for name, mask in own_layout(model).items()}  # fmt: skip
    save_as_maskllm(eighth, tmp_path / "eighth.npz")
    assert load_mask(tmp_path / "eighth.npz", model).pattern == Pattern.parse("2:8", 0.75)
    save_as_maskllm({name: np.ones_like(mask) for name, mask in quarter.items()}, tmp_path / "all.npz")
    with pytest.raises(UsageError, match="keeps everything: it prunes no model"):
        load_mask(tmp_path / "all.npz", model)


@pytest.mark.parametrize("layout", SAVE)
def test_a_mask_of_another_model_is_refused_in_a_sentence(layout, model, tmp_path):
    SAVE[layout](own_layout(model), tmp_path / "mask.npz")
    with pytest.raises(UsageError, match="does not fit .*it has the weight model.layers.1"):
        load_mask(tmp_path / "mask.npz", tiny_llama(num_hidden_layers=1))
    with pytest.raises(UsageError, match=r"does not fit .* in the mask and shape \(48, 32\) in the model"):
        load_mask(tmp_path / "mask.npz", tiny_llama(intermediate_size=48))
    with pytest.raises(UsageError, match="pass the model"):
        load_mask(tmp_path / "mask.npz")


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"a.weight": np.zeros(4, np.uint8)},
        {"a.mask": np.zeros((2, 2), np.uint8)},
        {"a.mask": np.zeros(4, np.float32)},
        {"a": np.zeros(4, np.uint8), "b": np.zeros(4, np.uint8), "a.__shape__": np.array([4, 8])},
    ],
)
def test_an_unknown_layout_is_one_sentence(arrays, model, tmp_path):
    np.savez(tmp_path / "mask.npz", **arrays)
    with pytest.raises(UsageError, match="is an npz file in an unknown layout"):
        load_mask(tmp_path / "mask.npz", model)


def test_pickled_and_damaged_files_are_one_sentence(model, checkpoint, tmp_path, capsys):
    np.savez(tmp_path / "pickled.npz", **{"a.mask": np.array([{}], dtype=object)})
    with pytest.raises(RunError, match="holds more than arrays"):
        load_mask(tmp_path / "pickled.npz", model)
    whole = io.BytesIO()
    save_as_maskllm(own_layout(model), whole)
    for data in (b"nothing", whole.getvalue()[:-200], b""):
        (tmp_path / "broken.npz").write_bytes(data)
        flags = ["--model", checkpoint, "--mask", str(tmp_path / "broken.npz"), "--to", str(tmp_path / "out")]
        assert console(["export", *flags]) == 1
        assert "broken.npz is damaged" in capsys.readouterr().err


def test_a_mask_is_pushed_with_its_card(checkpoint, mask, tmp_path, monkeypatch):
    calls = []
    api = SimpleNamespace(
        create_repo=lambda name, exist_ok, private: calls.append((name, private)),
        upload_folder=lambda repo_id, folder_path: calls.append(sorted(p.name for p in folder_path.iterdir())),
    )
    monkeypatch.setattr(export_command, "HfApi", lambda: api)
    flags = ["--model", checkpoint, "--mask", str(mask), "--form", "mask", "--push_to_hub", "me/a-mask"]
    assert console(["export", *flags, "--to", str(tmp_path / "out")]) == 0
    assert calls[0] == ("me/a-mask", True)
    assert {"README.md", "mask.json", "mask.safetensors"} <= set(calls[1])
    assert not [name for name in calls[1] if name.startswith("model")]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "hf download me/a-mask mask.safetensors" in card.text
    assert "2:4" in card.data.tags
