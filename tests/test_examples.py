"""The examples run, here on a tiny model."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_of_deploying_prunes_tunes_quantises_and_writes(checkpoint, corpus, tmp_path, capsys):
    pytest.importorskip("loguru", reason="compressed-tensors needs it")
    pytest.importorskip("compressed_tensors", reason="an extra: pip install 'proxsparse[quantize]'")
    found = example("deploy").main(str(tmp_path), checkpoint, corpus, samples=4, ctx_len=64)
    assert list(found) == ["dense", "pruned", "tuned", "int8"]
    assert found["pruned"] != found["tuned"]
    assert abs(found["int8"] / found["tuned"] - 1) < 0.05
    assert capsys.readouterr().out.count("blocks, 0 weights not 2:4") == 3
    assert "updated by fine-tuning" in (tmp_path / "tuned" / "README.md").read_text()
