"""Exports of 8 and 4 bits: stock transformers reads them, zeros stay, and other weights are rounded little."""

import json
import shutil

import pytest
import torch
import transformers as hf
from conftest import byte_tokenizer, tiny_llama
from safetensors.torch import load_file, save_file
from test_checkpoint import mixture
from test_prunable import build

from proxsparse.__main__ import main as console
from proxsparse.deploy import quantise, rounding
from proxsparse.deploy.check import check_sparsity
from proxsparse.deploy.dense import save_pruned
from proxsparse.errors import RunError, UsageError
from proxsparse.mask import Mask, load_mask
from proxsparse.model.gram import spread_of
from proxsparse.model.prunable import find_prunable
from proxsparse.operator.prox import top2_mask

pytest.importorskip("loguru", reason="compressed-tensors needs it")
pytest.importorskip("compressed_tensors", reason="an extra: pip install 'proxsparse[quantize]'")

IDS = torch.arange(1, 30)[None]
# Half a step of int8 codes; half a step of float8's three bits, or of its smallest numbers.
STEPS = {"int8": lambda w, s: 0.51 * s, "fp8": lambda w, s: (w.abs() / 16).clamp(min=s * 2.0**-10) * 1.02}
CLOSE = {"int8": 0.1, "fp8": 0.2}  # relative error of logits; wrong scales or zeros give about 1
UP = "model.layers.1.mlp.up_proj.weight"


def masked(model):
    return Mask({t.name: top2_mask(t.rows(t.weight.detach().float())) for t in find_prunable(model, multiple=1)})


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama in bfloat16, in several files."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    tiny_llama().to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def kept(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    assert console(["prune", "--model", base, "--prune_method", "magnitude", "--save", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def dense(base, kept, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "pruned"
    save_pruned(base, load_mask(kept), folder)
    return str(folder)


def export(kind, base, kept, folder, *more):
    flags = ["--model", base, "--mask", str(kept), "--quantize", kind, "--to", str(folder), *more]
    return console(["export", *flags])


@pytest.fixture(scope="module", params=["int8", "fp8"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def coded(kind, base, kept, tmp_path_factory):
    folder = tmp_path_factory.mktemp("coded") / kind
    assert export(kind, base, kept, folder) == 0
    return folder


def tensors_of(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_the_files_hold_codes_with_zeros_and_one_scale_per_output(kind, coded, base, kept):
    found, mask = tensors_of(coded), load_mask(kept).tensors
    original = hf.AutoModelForCausalLM.from_pretrained(base).state_dict()
    dtype = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
    assert found.keys() == original.keys() | {f"{name}_scale" for name in mask}
    for name, weight in original.items():
        if name not in mask:
            assert torch.equal(found[name], weight)
            continue
        codes, scale = found[name], found[f"{name}_scale"]
        assert codes.dtype == dtype
        assert scale.dtype == weight.dtype
        assert scale.shape == (len(weight), 1)
        assert not codes.view(torch.uint8)[~mask[name]].any()
        assert kind == "int8" or not (codes.view(torch.uint8) == 0x80).any()  # no -0.0
        wanted = weight.float() * mask[name]
        off = (codes.float() * scale.float() - wanted).abs()
        assert (off <= STEPS[kind](wanted, scale.float())).all()


def test_transformers_loads_it_and_computes_nearly_the_same(kind, coded, dense, kept):
    pruned = hf.AutoModelForCausalLM.from_pretrained(dense)
    wanted, model = logits(pruned), hf.AutoModelForCausalLM.from_pretrained(coded)
    assert error(logits(model), wanted) < CLOSE[kind]
    whole = hf.CompressedTensorsConfig(dequantize=True)
    plain = hf.AutoModelForCausalLM.from_pretrained(coded, quantization_config=whole)
    mask = load_mask(kept).tensors
    for name, weight in plain.named_parameters():
        assert weight.dtype == torch.bfloat16
        if name in mask:
            assert not weight[~mask[name]].view(torch.int16).any()
            torch.testing.assert_close(weight, pruned.get_parameter(name), rtol=0.1, atol=0.02)
    assert error(logits(plain), wanted) < CLOSE[kind]


def test_the_configuration_is_the_standard_one(kind, coded, base):
    entry = json.loads((coded / "config.json").read_text())["quantization_config"]
    number = {"num_bits": 8, "type": {"int8": "int", "fp8": "float"}[kind], "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": number | {"strategy": "channel", "dynamic": False},
        "input_activations": number | {"strategy": "token", "dynamic": True},
    }
    assert entry == {
        "config_groups": {"group_0": group},
        "quant_method": "compressed-tensors",
        "format": {"int8": "int-quantized", "fp8": "float-quantized"}[kind],
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
    }
    card = (coded / "README.md").read_text()
    assert f"quantised to {kind}, one scale per output" in card
    assert "vLLM reads it by itself" in card


def test_check_reads_it_and_finds_a_code_too_many(coded, base, tmp_path, capsys):
    assert console(["check", "--model", str(coded)]) == 0
    assert '"wrong_blocks": 0' in capsys.readouterr().out
    assert console(["check", "--model", str(coded), "--base", base]) == 2
    assert "--base compares bit for bit, and the weights of" in capsys.readouterr().err
    shutil.copytree(coded, tmp_path / "broken")
    (file,) = [f for f in (tmp_path / "broken").glob("*.safetensors") if UP in load_file(f)]
    tensors = load_file(file)
    tensors[UP][2, 4:8] = 1
    save_file(tensors, file, metadata={"format": "pt"})
    counts, offenders = check_sparsity(str(tmp_path / "broken"))
    assert counts["wrong_blocks"] == 1
    assert offenders == [f"{UP}: 1 blocks are not 2:4, the first is row 2, block 1"]
    del tensors[f"{UP}_scale"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RunError, match="lacks the scales of"):
        check_sparsity(str(tmp_path / "broken"))


def test_it_is_measured_but_neither_pruned_nor_quantised_again(coded, kept, corpus, tmp_path, capsys):
    text = ["--dataset", corpus, "--ctx_len", "32", "--max_windows", "2"]
    assert console(["eval", "--model", str(coded), *text]) == 0
    for flags in ([], ["--quantize", "int8"]):
        capsys.readouterr()
        folder = str(tmp_path / "out")
        assert console(["export", "--model", str(coded), "--mask", str(kept), "--to", folder, *flags]) == 2
        assert capsys.readouterr().err.count("is quantised with compressed-tensors: ") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_dequantised_is_not_quantised_again(base, kept, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "fp8")
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    entry = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    assert export("fp8", str(tmp_path / "fp8"), kept, tmp_path / "out") == 2
    assert "is quantised already (fp8)" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["qwen2", "phi3", "opt", "gemma2"])
def test_other_architectures_load_and_keep_their_zeros(family, kind, tokenizer, tmp_path):
    model = build(family, vocab_size=257)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    mask = masked(model)
    save_pruned(str(tmp_path / "base"), mask, tmp_path / "dense")
    save_pruned(str(tmp_path / "base"), mask, tmp_path / "out", quantize=kind)
    wanted = logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    found = logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert error(found, wanted) < CLOSE[kind]
    assert check_sparsity(str(tmp_path / "out"))[1] == []


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_weights_that_the_format_has_no_place_for_are_refused(family, tokenizer, tmp_path):
    if family == "gpt2":
        build("gpt2", vocab_size=257).save_pretrained(tmp_path / "base")
    else:
        mixture(family, tmp_path / "base")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(UsageError, match="is no plain linear layer"):
        save_pruned(str(tmp_path / "base"), masked(model), tmp_path / "out", quantize="int8")
    assert not (tmp_path / "out").exists()


def test_a_row_of_zeros_has_a_scale_that_divides(base, kept, kind, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    (file,) = [f for f in (tmp_path / "base").glob("*.safetensors") if UP in load_file(f)]
    tensors = load_file(file)
    tensors[UP][3] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    assert export(kind, str(tmp_path / "base"), kept, tmp_path / "out") == 0
    found = tensors_of(tmp_path / "out")
    assert found[f"{UP}_scale"].float().gt(0).all()
    assert logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")).isfinite().all()


def test_what_can_t_be_quantised_is_refused_in_a_sentence(base, kept, tmp_path, capsys, monkeypatch):
    assert export("fp8", base, kept, tmp_path / "out", "--form", "compact") == 2
    assert "--quantize fp8 needs the dense form; the compact form takes int8." in capsys.readouterr().err
    assert export("int8", base, kept, tmp_path / "out", "--form", "mask") == 2
    assert "--quantize needs the form dense or compact; got --form mask" in capsys.readouterr().err
    with pytest.raises(UsageError, match="`quantize` must be one of int8, fp8, int4; got 'int3'"):
        save_pruned(base, load_mask(kept), tmp_path / "out", quantize="int3")
    model = tiny_llama()
    with pytest.raises(UsageError, match="reads a checkpoint's own files, and the model has none"):
        save_pruned(model, masked(model), tmp_path / "out", quantize="int8")
    monkeypatch.setattr(quantise, "installed", lambda module: False)
    assert export("int8", base, kept, tmp_path / "out") == 1
    assert "needs the package compressed-tensors: pip install 'compressed-tensors>=0.20'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A tiny Llama whose weights have a hundred and twenty-eight or two hundred and fifty-six inputs."""
    folder = tmp_path_factory.mktemp("wide") / "llama"
    tiny_llama(hidden_size=128, intermediate_size=256).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def four_bits(wide, corpus, tmp_path_factory):
    """Folders of a mask and of two exports: rounded to nearest, and with error feedback."""
    folder = tmp_path_factory.mktemp("four")
    assert console(["prune", "--model", wide, "--prune_method", "magnitude", "--save", str(folder)]) == 0
    assert export("int4", wide, folder, folder / "nearest") == 0
    text = ["--dataset", corpus, "--samples", "16", "--ctx_len", "32"]
    assert export("int4", wide, folder, folder / "feedback", *text) == 0
    return folder


@pytest.mark.parametrize("made", ["nearest", "feedback"])
def test_four_bits_are_read_by_transformers_and_stay_24(made, four_bits, wide, capsys):
    found, mask = tensors_of(four_bits / made), load_mask(four_bits).tensors
    original = hf.AutoModelForCausalLM.from_pretrained(wide)
    state = original.state_dict()
    stems = {name.removesuffix("weight") for name in mask}
    added = {stem + part for stem in stems for part in ("weight_packed", "weight_scale", "weight_shape")}
    assert found.keys() == (state.keys() - mask.keys()) | added
    assert all(torch.equal(found[name], state[name]) for name in state.keys() - mask.keys())
    whole = hf.CompressedTensorsConfig(dequantize=True)
    plain = hf.AutoModelForCausalLM.from_pretrained(four_bits / made, quantization_config=whole)
    for name, weight in plain.named_parameters():
        if name in mask:
            assert not weight[~mask[name]].view(torch.int16).any()
            scale = found[f"{name}_scale"]
            assert scale.shape == (len(weight), weight.shape[1] // 128)
            if made == "nearest":
                wanted = state[name].float() * mask[name]
                off = (weight.float() - wanted).abs() / scale.float().repeat_interleave(128, 1)
                assert off.max() <= 0.54  # bfloat16 rounds seven steps by 0.03
    entry = json.loads((four_bits / made / "config.json").read_text())["quantization_config"]
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    assert weights.items() <= entry["config_groups"]["group_0"]["weights"].items()
    assert entry["format"] == "pack-quantized"
    coded = hf.AutoModelForCausalLM.from_pretrained(four_bits / made)
    assert error(logits(coded), logits(plain)) < 0.02
    capsys.readouterr()
    assert console(["check", "--model", str(four_bits / made)]) == 0
    assert '"wrong_blocks": 0' in capsys.readouterr().out
    card = (four_bits / made / "README.md").read_text()
    assert "quantised to int4, one scale per group of neighbouring inputs" in card
    assert ("error feedback, 512 tokens of" in card) == (made == "feedback")


@pytest.mark.parametrize(("hidden", "inner", "group"), [(64, 256, 64), (192, 160, 32)])
def test_groups_are_as_large_as_all_weights_allow(hidden, inner, group, tmp_path):
    tiny_llama(hidden_size=hidden, intermediate_size=inner).save_pretrained(tmp_path / "dense")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    mask = masked(model)
    save_pruned(model, mask, tmp_path / "out", quantize="int4")
    whole = hf.CompressedTensorsConfig(dequantize=True)
    read = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=whole)
    found = tensors_of(tmp_path / "out")
    for name, kept in mask.tensors.items():
        weight, scale = read.get_parameter(name), found[f"{name}_scale"]
        assert scale.shape == (len(weight), weight.shape[1] // group)
        off = (weight - model.get_parameter(name) * kept).abs() / scale.repeat_interleave(group, 1)
        assert off.max() <= 0.54  # bfloat16 rounds seven steps by 0.03
        assert not weight[~kept].view(torch.int32).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_files_hold_the_weights_that_the_model_was_rounded_to(dtype, wide, four_bits, tmp_path):
    model = hf.AutoModelForCausalLM.from_pretrained(wide, dtype=dtype)
    mask = load_mask(four_bits)
    mask.info = {"weights_updated": "distilling"}
    pruned = {name: model.get_parameter(name).detach() * kept for name, kept in mask.tensors.items()}
    ids = torch.randint(1, 257, (8, 32), generator=torch.Generator().manual_seed(0))
    save_pruned(model, mask, tmp_path / "out", quantize="int4", windows=ids)
    whole = hf.CompressedTensorsConfig(dequantize=True)
    found = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=whole)
    for name, weight in model.named_parameters():
        # Scales are stored in bfloat16, as the files are.
        torch.testing.assert_close(
            found.get_parameter(name).to(dtype), weight, rtol=2**-7 if dtype.itemsize == 4 else 0, atol=0
        )
        if name in mask.tensors:
            assert not torch.equal(weight, pruned[name])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "were updated by distilling" in card
    assert "error feedback, 256 tokens" in card


def test_error_feedback_halves_the_error_of_the_outputs_where_inputs_go_together():
    torch.manual_seed(0)
    inputs = torch.randn(2000, 8) @ torch.randn(8, 256) + 0.3 * torch.randn(2000, 256)
    weight = torch.randn(64, 256)
    kept = top2_mask(weight)
    weight = weight * kept
    scale = weight.unflatten(1, (2, 128)).abs().amax(2) / 7.5
    nearest = (weight / scale.repeat_interleave(128, 1)).round().clamp(-8, 7) * scale.repeat_interleave(128, 1)
    spread, _ = spread_of(inputs.T @ inputs / len(inputs), rounding.DAMPING, "w")
    found = rounding.round_columns(weight.clone(), kept, scale, spread, 4)
    assert not found[~kept].any()
    assert error(inputs @ found.T, inputs @ weight.T) < 0.5 * error(inputs @ nearest.T, inputs @ weight.T)


def test_rounded_columns_are_the_greedy_minimum_of_the_output_error(monkeypatch):
    """Against a float64 loop that follows the definition: fix one column, solve for all that are left."""
    monkeypatch.setattr(rounding, "COLUMNS", 5)
    torch.manual_seed(0)
    inputs = torch.randn(64, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    weight, kept = torch.randn(3, 12), torch.rand(3, 12) > 0.5
    weight = weight * kept
    scale = torch.full((3, 3), 0.25)
    gram = inputs.T @ inputs / len(inputs)
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(12)
    spread, _ = spread_of(gram.float(), 0.01, "w")
    found = rounding.round_columns(weight.clone(), kept, scale, spread, 4)
    for row in range(3):
        values = weight[row].double()
        for j in range(12):
            code = (values[j] / 0.25).round().clamp(-8, 7) * 0.25 if kept[row, j] else torch.tensor(0.0)
            change, rest = float(code - values[j]), slice(j + 1, 12)
            values[j] = code
            values[rest] -= torch.linalg.solve(hessian[rest, rest], hessian[rest, j]) * change
        torch.testing.assert_close(found[row].double(), values, rtol=0, atol=1e-4)


def test_what_four_bits_do_not_take_is_one_sentence(base, kept, wide, tmp_path, corpus, capsys):
    assert export("int8", base, kept, tmp_path / "a", "--dataset", corpus) == 2
    assert "--dataset is for --quantize int4" in capsys.readouterr().err
    for flag, value in (("samples", "2"), ("ctx_len", "16"), ("seed", "1"), ("device", "cpu")):
        assert export("int4", base, kept, tmp_path / "a", f"--{flag}", value) == 2
        assert f"--{flag} is for --quantize int4 with --dataset" in capsys.readouterr().err
    assert export("int4", base, kept, tmp_path / "a", "--form", "compact") == 2
    assert "--quantize int4 needs the dense form" in capsys.readouterr().err
    tiny_llama(hidden_size=48, intermediate_size=64).save_pretrained(tmp_path / "narrow")
    byte_tokenizer().save_pretrained(tmp_path / "narrow")
    flags = ["prune", "--model", str(tmp_path / "narrow"), "--prune_method", "magnitude", "--save", str(tmp_path / "m")]
    assert console(flags) == 0
    assert export("int4", str(tmp_path / "narrow"), tmp_path / "m", tmp_path / "a") == 2
    assert "has 48 inputs, and with 4 bits their number must be a multiple of 32" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    model = hf.AutoModelForCausalLM.from_pretrained(wide)
    with pytest.raises(UsageError, match="`windows` are for `quantize=int4`"):
        save_pruned(model, masked(model), tmp_path / "a", windows=IDS)
