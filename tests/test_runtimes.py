"""What 2:4 kernels take of a checkpoint, and what a server needs next to it."""

import json

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from safetensors.torch import load_file, save_file
from test_compact import magnitudes
from test_prunable import build

from proxsparse.__main__ import main as console
from proxsparse.deploy.dense import save_pruned
from proxsparse.deploy.runtimes import TARGETS, TORCHAO_CONFIG, dense_weights
from proxsparse.errors import UsageError
from proxsparse.mask import Mask, load_mask

DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def pruned(tmp_path):
    """A tiny Llama in bfloat16, pruned: hidden size 64, MLP 96, keys and values of 32 outputs."""
    model = tiny_llama(hidden_size=64, intermediate_size=96).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    save_pruned(str(tmp_path / "base"), Mask(magnitudes(model)), tmp_path / "pruned")
    return tmp_path / "pruned"


def test_torch_s_own_shapes_decide(pruned):
    assert TARGETS["cutlass"][torch.bfloat16] == (32, 64)
    assert TARGETS["cusparselt"][torch.bfloat16] == (16, 16)
    assert dense_weights(str(pruned), "torchao") == (14, [])
    assert dense_weights(str(pruned), "cusparselt") == (14, [])
    sparse, dense = dense_weights(str(pruned), "cutlass")
    assert sparse == 12
    assert dense[0] == f"{DOWN}: has shape (64, 96), not multiples of (32, 64)"


def test_a_minus_zero_that_makes_a_third_non_zero_is_found(pruned):
    tensors = load_file(pruned / "model.safetensors")
    tensors[DOWN][tensors[DOWN] == 0] = -0.0
    save_file(tensors, pruned / "model.safetensors", metadata={"format": "pt"})
    sparse, dense = dense_weights(str(pruned), "torchao")
    assert sparse == 13
    assert dense == [f"{DOWN}: has -0.0 among its zeros, which counts as a third non-zero of a block: export the "
                     "model again"]  # fmt: skip


def test_other_dtypes_layers_and_dense_weights_stay_dense(pruned, tmp_path):
    save_pruned(tiny_llama(), Mask(magnitudes(tiny_llama())), tmp_path / "wide")
    assert (
        "is float32, and the kernel takes float16 or bfloat16" in dense_weights(str(tmp_path / "wide"), "cutlass")[1][0]
    )
    gpt2 = build("gpt2").to(torch.bfloat16)
    save_pruned(gpt2, Mask(magnitudes(gpt2)), tmp_path / "gpt2")
    assert "is part of Conv1D, not of a linear layer" in dense_weights(str(tmp_path / "gpt2"), "torchao")[1][0]
    tensors = load_file(pruned / "model.safetensors")
    tensors[DOWN][0, :4] = 1
    save_file(tensors, pruned / "model.safetensors", metadata={"format": "pt"})
    assert dense_weights(str(pruned), "torchao")[1] == [f"{DOWN}: is not 2:4"]
    with pytest.raises(UsageError, match="`target` must be one of torchao, cusparselt, cutlass; got 'tensorrt'"):
        dense_weights(str(pruned), "tensorrt")


def test_the_check_lists_them_and_still_passes(pruned, capsys):
    assert console(["check", "--model", str(pruned), "--target", "cutlass"]) == 0
    shown = capsys.readouterr().out
    assert "cutlass can take 12 of 14 weights" in shown
    assert f"  {DOWN}: has shape (64, 96)" in shown
    assert json.loads(shown.splitlines()[-1])["dense_weights"] == 2


def test_the_export_for_vllm_is_the_dense_one_with_torchao_s_configuration(checkpoint, mask, tmp_path):
    flags = ["--model", checkpoint, "--mask", str(mask)]
    assert console(["export", *flags, "--to", str(tmp_path / "plain")]) == 0
    assert console(["export", *flags, "--runtime", "vllm-torchao", "--to", str(tmp_path / "served")]) == 0
    served = tmp_path / "served"
    assert (served / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert (served / "config.json").read_bytes() == (tmp_path / "plain" / "config.json").read_bytes()
    assert json.loads((served / "torchao_config.json").read_text()) == TORCHAO_CONFIG
    notes = (served / "SERVING.md").read_text()
    assert f"vllm serve {served} --dtype bfloat16 --quantization torchao" in notes
    assert f'{{"quantization_config_file": "{served}/torchao_config.json"}}' in notes
    assert console(["check", "--model", str(served), "--base", checkpoint]) == 0


def test_torchao_reads_its_configuration():
    pytest.importorskip("torchao")
    from torchao.core.config import config_from_dict
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow
    from torchao.quantization.quantize_.workflows import Float8PackingFormat

    sparse = Float8PackingFormat.SPARSE_2D_DATA_2D_METADATA
    wanted = Float8DynamicActivationFloat8WeightConfig(packing_format=sparse, granularity=PerRow())
    assert config_from_dict(TORCHAO_CONFIG) == wanted


def test_what_vllm_would_damage_is_refused_in_a_sentence(checkpoint, mask, tmp_path, capsys):
    part = load_mask(mask)
    del part.tensors[DOWN]
    from proxsparse.mask import save_mask

    save_mask(part, tmp_path / "part.safetensors")

    def export(mask, *more):
        flags = ["--model", checkpoint, "--mask", str(mask), "--to", str(tmp_path / "out"), *more]
        code = console(["export", *flags, "--runtime", "vllm-torchao"])
        return code, capsys.readouterr().err

    code, error = export(tmp_path / "part.safetensors")
    assert code == 2
    assert "model.layers.0.mlp.down_proj is not in the mask" in error
    for more in (["--form", "compact"], ["--form", "mask"]):
        code, error = export(mask, *more)
        assert code == 2
        assert f"--runtime vllm-torchao needs the plain dense form; got {' '.join(more)}" in error
    assert not (tmp_path / "out").exists()
