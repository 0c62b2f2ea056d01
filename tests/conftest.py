"""Tiny models and texts: seconds on a CPU, no network."""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # run GPU kernels on the CPU, where triton is installed

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# The same examples every time, so that no one's build fails by chance; --hypothesis-profile default draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

TEXT = (
    "The quick brown fox jumps over the lazy dog. A journey of a thousand miles begins with a single step. "
    "Some weights matter more than others, and which ones they are depends on what flows through them. "
)


def slow(*values):
    """A case that runs with the slow tests, where others like it are fast ones."""
    return pytest.param(*values, marks=pytest.mark.slow)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def _on_gpu(kernel):
    """A kernel that takes tensors of the CPU too: they are moved to the GPU, and what it wrote is moved back."""

    def call(*args):
        moved: dict[int, tuple] = {}
        for tensor in args:
            if isinstance(tensor, torch.Tensor) and not tensor.is_cuda:
                moved.setdefault(tensor.data_ptr(), (tensor, tensor.cuda()))
        own = [moved.get(a.data_ptr(), (a, a))[1] if isinstance(a, torch.Tensor) else a for a in args]
        result = kernel(*own)
        for tensor, there in moved.values():
            tensor.copy_(there)
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.cpu() if moved else t, result)

    return call


def pytest_collection_modifyitems(items):
    """Tests that need no kernels come first. Of two processes that share the tests, one starts in the middle of the
    list and compiles the kernels. The other finds them compiled when it is through with the first ones."""
    without = {f"test_{name}" for name in ["checkpoint", "cli", "flags", "settings", "text"]}
    items.sort(key=lambda item: item.path.stem not in without)


@pytest.fixture(autouse=True)
def triton_takes_tensors_of_the_cpu(monkeypatch):
    """As its interpreter does, so that the same tests run where there is a GPU."""
    if not torch.cuda.is_available():
        return
    from proxsparse.operator.kernels import triton, triton_adafactor, triton_products

    kernels = {
        triton: ("prox_",), triton_products: ("top2_product_", "survey_"),
        triton_adafactor: ("square_sums", "update_square_sum", "apply_"),
    }  # fmt: skip
    for module, names in kernels.items():
        for name in names:
            monkeypatch.setattr(module, name, _on_gpu(getattr(module, name)))


@pytest.fixture(scope="session")
def python():
    """A program that does what python does, at once: see warm.py."""
    if sys.platform != "linux":  # others have no sockets that keep messages whole
        yield sys.executable
        return
    with tempfile.TemporaryDirectory() as folder:
        address, program = Path(folder, "socket"), Path(folder, "python")
        warm = str(Path(__file__).with_name("warm.py"))
        program.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-ES", warm, str(address)])} "$@"\n')
        program.chmod(0o755)
        command = [sys.executable, warm, "--serve", str(address)]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        try:
            while not address.exists():
                assert server.poll() is None, "the server of warm.py has ended"
                time.sleep(0.1)
            yield str(program)
        finally:
            server.kill()
            server.communicate()


@pytest.fixture(scope="session")
def torchrun(python):
    """Function that runs a script of this folder in several processes, and returns the finished torchrun."""

    def run(processes, script, *arguments, **environment):
        command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += [str(Path(__file__).with_name(script)), *map(str, arguments)]
        given = os.environ | environment | {"PYTHON_EXEC": python, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=given, timeout=280)

    return run


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model():
    return tiny_llama()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tokenizer):
    """A tiny Llama on disk."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def mask(checkpoint, tmp_path_factory):
    """Folder with the magnitude mask of the tiny Llama on disk."""
    from proxsparse.__main__ import main

    folder = tmp_path_factory.mktemp("mask")
    assert main(["prune", "--model", checkpoint, "--prune_method", "magnitude", "--save", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of sixteen small documents."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(16):
        (folder / f"{i:02}.txt").write_text(f"Document {i}. " + TEXT * 3)
    return str(folder)
