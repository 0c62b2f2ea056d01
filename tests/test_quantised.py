"""Quantised checkpoints: dequantised to the same bfloat16 weights everywhere, or refused in one sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from conftest import byte_tokenizer, tiny_llama
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from safetensors.torch import load_file, save_file
from test_checkpoint import mixture, run

from proxsparse.__main__ import main as console
from proxsparse.errors import RunError, UsageError
from proxsparse.learning.copies import OriginalWeights
from proxsparse.mask import load_mask
from proxsparse.model import hub, loading, quantised
from proxsparse.model.checkpoint import Checkpoint
from proxsparse.model.loading import load_config, load_model
from proxsparse.model.prunable import find_prunable
from proxsparse.operator.prox import top2_mask

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def by_blocks(weight, height, width):
    """Codes and scales of float8 blocks, and what they stand for: written as loops, the definition itself."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // height), -(-columns // width))
    codes, plain = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight, dtype=torch.bfloat16)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
            scales[i, j] = weight[part].abs().max() / 448
            codes[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
            plain[part] = (codes[part].float() * scales[i, j]).to(torch.bfloat16)
    return codes, scales, plain


@pytest.fixture
def fp8(tmp_path):
    """A tiny Llama in float8 blocks of 24 x 16, which do not divide its weights; and its plain tensors."""
    folder = tmp_path / "fp8"
    model = tiny_llama().to(torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    plain = dict(tensors)
    for target in find_prunable(model):
        codes, scales, plain[target.name] = by_blocks(tensors[target.name].float(), 24, 16)
        tensors |= {target.name: codes, f"{target.name}_scale_inv": scales}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    entry = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [24, 16], "activation_scheme": "dynamic"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    return folder, plain


def test_float8_blocks_are_read_as_the_bfloat16_numbers_they_stand_for(fp8):
    folder, plain = fp8
    model = load_model(str(folder))
    assert not hasattr(model.config, "quantization_config")
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, plain[name])
    assert {name: stored.shape for name, stored in Checkpoint(folder).tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in plain.items()
    }
    wide = load_model(str(folder), dtype=torch.float32)  # rounded to bfloat16 first: the same mask in every precision
    assert all(torch.equal(tensor, plain[name].float()) for name, tensor in wide.state_dict().items())
    assert load_config(str(folder)).dtype == torch.bfloat16


def test_transformers_dequantises_blocks_that_divide_to_the_same_numbers(tmp_path):
    model = tiny_llama(hidden_size=64, intermediate_size=64).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for target in find_prunable(model):
        codes, scales, _ = by_blocks(tensors[target.name].float(), 16, 16)
        tensors |= {target.name: codes, f"{target.name}_scale_inv": scales}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=hf.FineGrainedFP8Config(weight_block_size=(16, 16), dequantize=True)
    )
    ours = load_model(str(tmp_path)).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.state_dict().items())


def assert_plain_and_masked(folder, plain, mask):
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config.get("dtype") or config["torch_dtype"]) == "bfloat16"
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == plain.keys()
    for name, tensor in plain.items():
        wanted = tensor.masked_fill(~mask.tensors[name], 0.0) if name in mask.tensors else tensor
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], wanted), name


def test_every_command_sees_the_same_weights_and_saves_plain_ones(fp8, tmp_path):
    folder, plain = fp8
    run("prune", "--model", folder, "--prune_method", "magnitude", "--save", tmp_path / "mask", "--save_model",
        tmp_path / "a")  # fmt: skip
    mask = load_mask(tmp_path / "mask")
    assert all(torch.equal(kept, top2_mask(plain[name].float())) for name, kept in mask.tensors.items())
    flags = ["--model", folder, "--mask", tmp_path / "mask"]
    run("apply", *flags, "--save", tmp_path / "b", "--no_eval", "--dtype", "float32")
    run("export", *flags, "--to", tmp_path / "c")
    run("export", *flags, "--to", tmp_path / "d", "--form", "compact")
    for saved in "abc":
        assert_plain_and_masked(tmp_path / saved, plain, mask)
        run("check", "--model", tmp_path / saved, "--base", folder)
    run("check", "--model", tmp_path / "d", "--base", folder)
    assert "are quantised; the kept ones are their values in bfloat16" in (tmp_path / "c" / "README.md").read_text()
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    assert torch.equal(again.lm_head.weight, plain["lm_head.weight"])


def test_learning_extraction_and_the_originals_agree(fp8, corpus, tmp_path):
    folder, plain = fp8
    flags = ["--dataset", corpus, "--ctx_len", 32, "--samples", 8, "--bf16", "false", "--keep_base", "checkpoint"]
    run("learn", "--model", folder, "--method", "masked", *flags, "--output_dir", tmp_path / "run")
    learned = load_mask(tmp_path / "run")
    run("extract", "--checkpoint", tmp_path / "run", "--output", tmp_path / "again.safetensors")
    again = load_mask(tmp_path / "again.safetensors")
    assert all(torch.equal(again.tensors[name], kept) for name, kept in learned.tensors.items())
    targets = find_prunable(load_model(str(folder)))
    original = OriginalWeights(targets, "checkpoint", str(folder))
    assert not original._kept
    assert all(torch.equal(original.of(target), plain[target.name]) for target in targets)


def test_experts_in_float8_are_merged_and_masked_one_by_one(tmp_path):
    folder = mixture("qwen3_moe", tmp_path / "fp8")
    plain = {}
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if "proj" in name]:
            codes, scales, plain[name] = by_blocks(tensors[name].float(), 16, 16)
            tensors |= {name: codes, f"{name}_scale_inv": scales, f"{name[:-7]}.activation_scale": torch.ones(1)}
        save_file(tensors, path, metadata={"format": "pt"})
        plain |= {name: tensor for name, tensor in tensors.items() if "proj" not in name}
    config = json.loads((folder / "config.json").read_text())
    entry = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    run("prune", "--model", folder, "--prune_method", "magnitude", "--save", tmp_path / "mask", "--save_model",
        tmp_path / "out")  # fmt: skip
    found = Checkpoint(tmp_path / "out").tensors
    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        pruned = "proj" in name
        kept = top2_mask(tensor.float()) if pruned else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(found[name].read(), tensor.masked_fill(~kept, 0.0)), name
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == plain.keys()
    run("check", "--model", tmp_path / "out", "--base", folder)


@pytest.fixture
def mxfp4(tmp_path):
    """A tiny gpt-oss with experts in blocks of 32, and its plain tensors."""
    folder = tmp_path / "gpt-oss"
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 128}
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**sizes, initializer_range=0.2)).to(torch.bfloat16)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    plain = dict(tensors)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        codes = torch.randint(0, 16, (experts, outputs, inputs))
        exponents = torch.randint(120, 128, (experts, outputs, inputs // 32))
        pairs = codes.view(experts, outputs, inputs // 32, 16, 2)
        tensors[f"{name}_blocks"] = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)
        tensors[f"{name}_scales"] = exponents.to(torch.uint8)
        values = torch.tensor(FP4)[codes] * 2.0 ** (exponents - 127).repeat_interleave(32, -1)
        plain[name] = values.transpose(1, 2).contiguous().to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    entry = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    return folder, plain


def test_four_bit_experts_of_gpt_oss_are_read_and_saved_as_bfloat16(mxfp4, tmp_path):
    folder, plain = mxfp4
    model = load_model(str(folder))
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())
    run("prune", "--model", folder, "--prune_method", "magnitude", "--save", tmp_path / "mask")
    mask = load_mask(tmp_path / "mask")
    stacked = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(mask.tensors[stacked], top2_mask(plain[stacked].transpose(1, 2).float()))
    for form in ("dense", "compact"):
        out = tmp_path / form
        run("export", "--model", folder, "--mask", tmp_path / "mask", "--to", out, "--form", form)
        run("check", "--model", out, "--base", folder)
        found = load_model(str(out)).state_dict()
        assert torch.equal(found[stacked], plain[stacked].masked_fill(~mask.tensors[stacked].transpose(1, 2), 0.0))
        assert torch.equal(found["lm_head.weight"], plain["lm_head.weight"])


ENTRIES = {
    "GPTQ": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "AWQ": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {}}},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "HQQ": {"quant_method": "hqq", "quant_config": {}},
}


@pytest.fixture
def coded(checkpoint, tmp_path):
    """A function that gives a folder whose config.json has one more entry; its weights are never looked at."""

    def make(**entries):
        config = json.loads((Path(checkpoint) / "config.json").read_text())
        ignore = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(checkpoint, tmp_path / "coded", ignore=ignore, dirs_exist_ok=True)
        (tmp_path / "coded" / "config.json").write_text(json.dumps(config | entries))
        return tmp_path / "coded"

    return make


@pytest.mark.parametrize(
    ("label", "command"),
    [
        ("GPTQ", "plan"),
        ("AWQ", "learn"),
        ("bitsandbytes", "prune"),
        ("compressed-tensors", "apply"),
        ("torchao", "export"),
        ("quanto", "plan"),
        ("HQQ", "prune"),
    ],
)
def test_other_schemes_are_refused_in_one_sentence_before_anything_is_read(
    label, command, coded, mask, corpus, tmp_path, capsys
):
    folder = coded(quantization_config=ENTRIES[label])
    text = ["--dataset", corpus, "--ctx_len", 32]
    flags = {
        "plan": text,
        "learn": [*text, "--samples", 8, "--output_dir", tmp_path / "run"],
        "prune": [*text, "--prune_method", "wanda", "--save", tmp_path / "mask"],
        "apply": ["--mask", mask, "--save", tmp_path / "out", "--no_eval"],
        "export": ["--mask", mask, "--to", tmp_path / "out"],
    }[command]
    assert console([str(word) for word in (command, "--model", folder, *flags)]) == 2
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"is quantised with {label}: " in shown
    assert "Give the original weights" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "entries",
    [
        {"compression_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}},
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
        {"quantization_config": {"load_in_8bit": True}},
        {"quantization_config": {"quant_method": "a_new_one"}},
    ],
)
def test_an_entry_is_found_wherever_it_is(entries, coded):
    with pytest.raises(UsageError, match="is quantised with"):
        load_config(str(coded(**entries)))


def test_null_entries_are_plain(coded):
    assert load_config(str(coded(quantization_config=None))).model_type == "llama"


def test_evaluation_names_the_package_that_reads_the_scheme(coded, monkeypatch):
    monkeypatch.setattr(quantised, "installed", lambda module: False)
    folder = coded(quantization_config=ENTRIES["GPTQ"])
    with pytest.raises(RunError, match="quantised with GPTQ, which the package gptqmodel reads: install it, or give"):
        load_model(str(folder), evaluating=True)


def test_a_scheme_that_transformers_does_not_know_is_not_measured(coded):
    folder = coded(quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})
    with pytest.raises(UsageError, match="quantised with modelopt, which transformers can't read"):
        load_model(str(folder), evaluating=True)


def test_integers_are_not_taken_for_weights(checkpoint, tmp_path, mask, capsys):
    shutil.copytree(checkpoint, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    own = tensors.pop("model.layers.0.mlp.up_proj.weight")
    tensors["model.layers.0.mlp.up_proj.weight"] = (own * 100).to(torch.int8)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    given = ["--model", str(tmp_path / "model")]
    save, to = ["--save", str(tmp_path / "out")], ["--mask", mask, "--to", str(tmp_path / "out")]
    for command in (["prune", *given, "--prune_method", "magnitude", *save], ["export", *given, *to]):
        assert console([str(word) for word in command]) == 1
        assert "is quantised, and its config.json does not say how" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_codes_without_their_scales_are_not_taken_for_weights(fp8):
    folder, _ = fp8
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"up_proj.weight holds codes in a form that is not read here"):
        load_model(str(folder))


@pytest.mark.parametrize("scale", ["tensor", "row"])
def test_float8_with_a_scale_per_tensor_or_row_is_read_and_leaves_plain_weights_alone(fp8, scale, mask, tmp_path):
    folder, plain = fp8
    tensors = load_file(folder / "model.safetensors")
    want = dict(plain)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        codes = tensors[name.removesuffix("_scale_inv")]
        factors = torch.linspace(0.001, 0.002, len(codes))[:, None] if scale == "row" else torch.tensor(0.0015)
        del tensors[name]
        base = name.removesuffix(".weight_scale_inv")
        tensors |= {f"{base}.weight_scale": factors, f"{base}.input_scale": torch.tensor(2.0)}
        want[f"{base}.weight"] = (codes.float() * factors).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["weight_block_size"]
    (folder / "config.json").write_text(json.dumps(config))
    read = dict(load_model(str(folder)).state_dict())
    assert all(torch.equal(read[name], want[name]) for name in want)
    export = ["export", "--model", str(folder), "--mask", str(mask), "--to", str(tmp_path / "out")]
    assert console(export) == 0
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == want.keys()


@pytest.mark.parametrize("entry", ["fp8", ["fp8"], 8])
def test_a_quantisation_that_is_no_mapping_is_said(fp8, entry, capsys):
    folder, _ = fp8
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    assert console(["eval", "--model", str(folder), "--dataset", "wiki"]) == 2
    assert "it must be a mapping" in capsys.readouterr().err


def test_codes_are_noticed_where_the_configuration_says_nothing(fp8, tmp_path, mask):
    folder, _ = fp8
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        RunError, match="is quantised, and its config.json does not say how: .*proj.weight in model.saf"
    ):
        load_model(str(folder))
    assert console(["export", "--model", str(folder), "--mask", str(mask), "--to", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_codes_on_the_hub_are_noticed_before_anything_is_downloaded(monkeypatch):
    def head(*tensors):
        return SafetensorsFileMetadata({}, {name: TensorInfo(dtype, [4], (0, 4)) for name, dtype in tensors})

    heads = {
        "a.safetensors": head(("norm.weight", "BF16"), ("mask", "U8")),
        "b.safetensors": head(("layers.0.up_proj.qweight", "I32")),
    }
    repository = SafetensorsRepoMetadata({}, True, dict.fromkeys(("norm.weight",), "a.safetensors"), heads)
    monkeypatch.setattr(hub.HfApi, "get_safetensors_metadata", lambda *_, **__: repository)
    monkeypatch.setattr(loading.PreTrainedConfig, "get_config_dict", lambda *_, **__: ({}, {}))
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", lambda *_, **__: hf.LlamaConfig())
    hub.hub_tensors.cache_clear()
    for use in (load_model, load_config):
        with pytest.raises(RunError, match=r"up_proj.qweight in b.safetensors holds I32 codes. Give the original"):
            use("some/codes")
    hub.hub_tensors.cache_clear()


@pytest.mark.parametrize("size", [[128], "128", [0, 0], [16.5, 16], 128])
def test_blocks_of_no_size_are_said(fp8, size):
    folder, _ = fp8
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = size
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="weight_block_size .*, and it must be two sizes such as .128, 128."):
        load_model(str(folder))


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({UP: t[UP].float().to(torch.int8)}), "up_proj.weight holds codes in a form .*I8"),
        (
            lambda t: t.update({f"{UP}_scale_inv": torch.ones(3, 5)}),
            "is damaged .*up_proj.weight: scales of shape",
        ),
    ],
)
def test_integers_with_scales_and_scales_that_do_not_fit_are_refused(fp8, change, message, mask, tmp_path, capsys):
    folder, _ = fp8
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=message):
        load_model(str(folder))
    assert console(["export", "--model", str(folder), "--mask", str(mask), "--to", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_an_entry_without_a_method_is_said(coded, capsys):
    folder = coded(quantization_config={"bits": 4, "group_size": 128})
    for command in ("plan", "eval"):
        assert console([command, "--model", str(folder), "--ctx_len", "32"]) == 2
        assert "is quantised with a method that it does not name" in capsys.readouterr().err
    with pytest.raises(UsageError, match="has quantization_config '{}', and it must be a mapping such as"):
        load_config(str(coded(quantization_config={})))
