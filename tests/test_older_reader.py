"""Exports are read by a stack built on transformers 4, as vLLM, sglang and converters are: the same logits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from safetensors.torch import load_file
from test_checkpoint import as_the_hub_has_it, run
from test_prunable import build

from proxsparse.model.loading import load_model

pytestmark = pytest.mark.slow

READER = ("transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1")
READ = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

assert __version__.startswith("4.57"), __version__
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("The quick brown fox").input_ids])
    with torch.no_grad():
        save_file({"logits": model(ids).logits.float(), "ids": ids}, folder + "/read.safetensors")
"""


@pytest.fixture(scope="session")
def reader():
    """A folder with transformers 4.57 and what it needs in other versions than ours; kept from session to session."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "proxsparse-tests"
    folder = cache / READER[0].replace("==", "-")
    if not folder.is_dir():
        scratch = cache / f"{folder.name}.{os.getpid()}"
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(scratch), *READER]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        except (OSError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"transformers 4.57 can't be installed here: {error}")
        if done.returncode:
            pytest.skip(f"transformers 4.57 can't be installed here: {done.stderr.strip()[-200:]}")
        scratch.rename(folder)
    return folder


def llama3():
    return tiny_llama(rope_parameters={"rope_theta": 500000.0, "rope_type": "default"})


MODELS = {
    "llama3": llama3,
    "qwen3": lambda: build("qwen3", vocab_size=257, rope_parameters={"rope_theta": 1e6, "rope_type": "default"}),
    "gemma3": lambda: build("gemma3", vocab_size=257),
    "gpt2": lambda: build("gpt2", vocab_size=257),
    "mixtral": lambda: build("mixtral", vocab_size=257),
}


def version_4(folder):
    """The files as such a repository has them: fields of the configuration and the tokenizer's class of version 4."""
    as_the_hub_has_it(folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def test_transformers_4_reads_what_is_saved_and_gives_the_same_logits(reader, corpus, tmp_path):
    saved = []
    for kind, make in MODELS.items():
        base, mask = tmp_path / kind / "base", tmp_path / kind / "mask"
        make().save_pretrained(base)
        byte_tokenizer().save_pretrained(base)
        version_4(base)
        run("prune", "--model", base, "--prune_method", "magnitude", "--save", mask)
        for way in ("export", "apply", "prune"):
            out = tmp_path / kind / way
            command = {
                "export": ["--mask", mask, "--to", out],
                "apply": ["--mask", mask, "--save", out, "--no_eval"],
                "prune": ["--prune_method", "sparsegpt", "--dataset", corpus, "--ctx_len", 32, "--nsamples", 4,
                          "--save_model", out],
            }[way]  # fmt: skip
            run(way, "--model", base, *command)
            saved.append(out)
    paths = {"PYTHONPATH": str(reader), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", READ, *map(str, saved)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=os.environ | paths)
    assert done.returncode == 0, done.stderr[-2000:]
    for out in saved:
        theirs, model = load_file(out / "read.safetensors"), load_model(str(out)).eval()
        assert theirs["ids"].tolist() == [byte_tokenizer()("The quick brown fox").input_ids]
        with torch.no_grad():
            ours = model(theirs["ids"]).logits
        torch.testing.assert_close(ours, theirs["logits"], rtol=1e-4, atol=1e-4, msg=lambda text, o=out: f"{o}: {text}")
