"""Adapters under a mask: what trains is what is merged, and the merged model is still 2:4."""

import json
import shutil

import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from safetensors.torch import load_file, save_file
from test_compact import magnitudes
from test_prunable import build
from trl import SFTConfig, SFTTrainer

import proxsparse
from proxsparse.__main__ import main as console
from proxsparse.deploy import lora
from proxsparse.deploy.check import check_sparsity
from proxsparse.errors import RunError, UsageError
from proxsparse.mask import Mask, load_mask

peft = pytest.importorskip("peft", reason="an extra: pip install 'proxsparse[lora]'")

IDS = torch.arange(1, 25).view(1, -1)
LAYERS = ["q_proj", "v_proj", "up_proj", "down_proj", "lm_head"]


def settings(**changes):
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 12, "target_modules": LAYERS, "task_type": "CAUSAL_LM"} | changes))


def filled(wrapped, seed=0):
    """An adapter as it is after training: B is not zero any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return wrapped.eval()


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.fixture
def pruned(checkpoint, mask, tmp_path):
    proxsparse.save_pruned(checkpoint, load_mask(mask), tmp_path / "pruned")
    return str(tmp_path / "pruned")


@pytest.fixture
def adapter(pruned, mask, tmp_path):
    """The folder of an adapter that was made under the mask."""
    wrapped = filled(proxsparse.masked_lora(proxsparse.load_model(pruned), load_mask(mask), settings()))
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_trained_by_the_sfttrainer_loses_nothing_when_it_is_merged(
    pruned, mask, checkpoint, tokenizer, tmp_path
):
    model = proxsparse.masked_lora(
        proxsparse.load_model(pruned), load_mask(mask), settings(lora_dropout=0.1, target_modules=LAYERS[:4])
    )
    args = SFTConfig(
        output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, max_steps=4, learning_rate=0.05, max_length=32,
        per_device_train_batch_size=2, report_to="none", save_strategy="no",
    )  # fmt: skip
    rows = Dataset.from_dict({"text": [f"Sentence {i}: some weights matter more than others." for i in range(8)]})
    SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer).train()
    model.save_pretrained(tmp_path / "adapter")
    trained, before = logits(model), logits(proxsparse.load_model(pruned))
    assert (trained - before).abs().max() > 0.1
    flags = ["--model", pruned, "--adapter", str(tmp_path / "adapter"), "--to", str(tmp_path / "merged")]
    assert console(["merge", *flags]) == 0
    torch.testing.assert_close(logits(proxsparse.load_model(str(tmp_path / "merged"))), trained, rtol=1e-4, atol=1e-4)
    counts, offenders = check_sparsity(str(tmp_path / "merged"))
    assert counts["weights"] == 14
    assert offenders == []
    assert "were updated by the adapter" in (tmp_path / "merged" / "README.md").read_text()


def test_the_merged_weight_is_the_pruned_one_plus_the_masked_product(pruned, adapter, mask):
    before = proxsparse.load_model(pruned).state_dict()
    merged = proxsparse.merge_lora(proxsparse.load_model(pruned), adapter, load_mask(mask)).state_dict()
    assert merged.keys() == before.keys()
    parts, kept = load_file(adapter / "adapter_model.safetensors"), load_mask(mask).tensors
    for name, found in merged.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        wanted = before[name]
        if f"{key}.lora_A.weight" in parts:
            product = parts[f"{key}.lora_B.weight"] @ parts[f"{key}.lora_A.weight"] * 3.0
            wanted = wanted + (product * kept[name] if name in kept else product)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        if name in kept:
            assert not found[~kept[name]].view(torch.int32).any()


def test_an_adapter_trained_without_a_mask_is_masked_when_it_is_merged(pruned, mask, tmp_path):
    plain = filled(peft.get_peft_model(proxsparse.load_model(pruned), settings()))
    plain.save_pretrained(tmp_path / "plain")
    model = proxsparse.load_model(pruned)
    merged = proxsparse.merge_lora(model, tmp_path / "plain", proxsparse.mask_of_pruned(model))
    assert proxsparse.mask_of_pruned(merged).tensors.keys() == load_mask(mask).tensors.keys()
    assert not torch.allclose(logits(merged), logits(plain))


@pytest.mark.parametrize("changes", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}, {"lora_bias": True}])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_forward_and_merge_agree_for_biases_ranks_and_transposed_weights(family, changes):
    model = build(family, vocab_size=63)
    layers = ["c_attn", "c_fc", "c_proj"] if family == "gpt2" else ["q_proj", "v_proj"]
    wrapped = proxsparse.masked_lora(model, Mask(magnitudes(model)), settings(target_modules=layers, **changes))
    before = logits(filled(wrapped))
    merged = wrapped.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)
    assert len(proxsparse.mask_of_pruned(merged).tensors) > 3


def test_merging_in_place_can_be_undone(pruned, mask):
    wrapped = filled(proxsparse.masked_lora(proxsparse.load_model(pruned), load_mask(mask), settings()))
    before = logits(wrapped)
    wrapped.merge_adapter()
    torch.testing.assert_close(logits(wrapped), before, rtol=1e-4, atol=1e-4)
    wrapped.unmerge_adapter()
    torch.testing.assert_close(logits(wrapped), before, rtol=1e-4, atol=1e-4)
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits(wrapped), logits(proxsparse.load_model(pruned)))


def test_gradients_reach_the_adapter_only_through_kept_weights(pruned, mask):
    wrapped = filled(proxsparse.masked_lora(proxsparse.load_model(pruned), load_mask(mask), settings()))
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name for name, p in wrapped.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    layer = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    a = layer.lora_A["default"].weight
    wanted = a.grad.clone()
    wrapped.zero_grad()
    # The gradient of the full weight, masked, through the product: the chain rule, written out.
    original = layer.base_layer.weight.requires_grad_(True)
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    through = original.grad * load_mask(mask).tensors["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(layer.lora_B["default"].weight.T @ through * 3.0, wanted, rtol=1e-4, atol=1e-6)


def test_a_saved_adapter_trains_on(pruned, adapter, mask):
    again = proxsparse.masked_lora(proxsparse.load_model(pruned), load_mask(mask), adapter)
    first = filled(proxsparse.masked_lora(proxsparse.load_model(pruned), load_mask(mask), settings()))
    torch.testing.assert_close(logits(again), logits(first))
    assert any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"num_hidden_layers": 1}, "was made for .*pruned and does not fit .*: the model has no model.layers.1"),
        ({"intermediate_size": 48}, "has 64 inputs in the adapter and 48 in the model"),
        ({"vocab_size": 300}, "lm_head has 257 outputs in the adapter and 300 in the model"),
    ],
)
def test_an_adapter_of_another_model_is_refused_in_a_sentence(other, sentence, adapter):
    model = tiny_llama(**other)
    with pytest.raises(UsageError, match=sentence):
        proxsparse.merge_lora(model, adapter, Mask(magnitudes(model)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"use_dora": True}, "An adapter with use_dora can't be masked"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the model's own weights"),
        ({"modules_to_save": ["o_proj"]}, "modules_to_save trains all of .*o_proj, which is pruned"),
    ],
)
def test_forms_without_a_mask_are_refused_in_a_sentence(changes, sentence, model):
    with pytest.raises(UsageError, match=sentence):
        proxsparse.masked_lora(model, Mask(magnitudes(model)), settings(**changes))


def test_other_adapters_and_experts_are_refused_in_a_sentence(model):
    with pytest.raises(UsageError, match="must be a LoRA adapter of peft; got IA3Config"):
        proxsparse.masked_lora(model, Mask(magnitudes(model)), peft.IA3Config())
    mixture = build("mixtral")
    config = settings(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(UsageError, match="An adapter with target_parameters can't be masked"):
        proxsparse.masked_lora(mixture, Mask(magnitudes(mixture)), config)


@pytest.mark.parametrize("changes", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]},
                                     {"target_modules": ["q_proj", "embed_tokens"]}])  # fmt: skip
def test_a_weight_that_two_layers_share_is_not_trained(changes):
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(UsageError, match="whose weight the embedding and the LM head share: leave both out"):
        proxsparse.masked_lora(model, Mask(magnitudes(model)), settings(**changes))


def test_modules_that_are_trained_whole_are_merged_too(pruned, mask, tmp_path):
    config = settings(target_modules=["q_proj"], modules_to_save=["lm_head"])
    wrapped = filled(proxsparse.masked_lora(proxsparse.load_model(pruned), load_mask(mask), config))
    with torch.no_grad():
        wrapped.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    wrapped.save_pretrained(tmp_path / "adapter")
    flags = ["--model", pruned, "--adapter", str(tmp_path / "adapter"), "--to", str(tmp_path / "merged")]
    assert console(["merge", *flags]) == 0
    merged = proxsparse.load_model(str(tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), logits(wrapped), rtol=1e-4, atol=1e-4)


def test_a_model_with_adapters_takes_no_second_one(pruned, mask):
    wrapped = proxsparse.masked_lora(proxsparse.load_model(pruned), load_mask(mask), settings())
    with pytest.raises(UsageError, match="has adapters already"):
        proxsparse.masked_lora(wrapped, load_mask(mask), settings())


def test_a_kept_mask_on_a_model_with_adapters_points_to_masked_adapters(pruned, mask):
    wrapped = proxsparse.masked_lora(proxsparse.load_model(pruned), load_mask(mask), settings())
    with pytest.raises(UsageError, match="make them with masked_lora"):
        proxsparse.keep_mask(wrapped, load_mask(mask), torch.optim.SGD(wrapped.parameters()))


def test_without_peft_one_sentence_names_the_extra(model, monkeypatch):
    monkeypatch.setattr(lora, "installed", lambda module: False)
    with pytest.raises(RunError, match="need the package peft: pip install 'peft>=0.21', the extra .lora."):
        proxsparse.masked_lora(model, Mask(magnitudes(model)), settings())


def test_what_is_no_adapter_is_refused_before_the_model_is_loaded(pruned, adapter, tmp_path, capsys):
    def merge(folder):
        code = console(["merge", "--model", pruned, "--adapter", str(folder), "--to", str(tmp_path / "out")])
        shown = capsys.readouterr()
        assert "pruned:" not in shown.out
        return code, shown.err

    assert merge(pruned)[0] == 2
    assert merge("./nowhere") == (2, "error: --adapter: there is no folder ./nowhere; give the folder or the Hub id "
                                  "of an adapter.\n")  # fmt: skip
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    code, error = merge(adapter)
    assert code == 2
    assert "has no adapter_model.safetensors" in error


def test_a_damaged_adapter_is_one_sentence_and_leaves_no_folder(pruned, adapter, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(adapter, broken)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    save_file(tensors | {name: torch.full_like(tensors[name], torch.nan)}, broken / "adapter_model.safetensors")
    flags = ["merge", "--model", pruned, "--adapter", str(broken), "--to", str(tmp_path / "out")]
    assert console(flags) == 1
    assert "can't be merged" in capsys.readouterr().err
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    assert console(flags) == 1
    assert "is damaged" in capsys.readouterr().err
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps(config)[:-9])
    assert console(flags) == 1
    assert not (tmp_path / "out").exists()
