"""What bench measures: decoding with a cache of fixed size is decoding, and what can't be recorded is said."""

import argparse

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from transformers import MistralConfig, MistralForCausalLM

from proxsparse.__main__ import main
from proxsparse.commands.bench import StaticDecoding, decode, work_of
from proxsparse.errors import UsageError


def fed(model, work):
    """The tokens that a model is fed."""
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    work()
    hook.remove()
    return torch.cat(seen, dim=1)[0].tolist()


def mistral(window=None):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 257}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": window, "initializer_range": 0.2}
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**sizes, **heads)).eval()


@pytest.mark.parametrize("make", [tiny_llama, mistral, lambda: mistral(window=5)], ids=["llama", "mistral", "window"])
def test_decoding_with_a_cache_of_fixed_size_feeds_the_same_tokens_again_and_again(make):
    model, first = make().eval(), torch.tensor([[7]])
    want = fed(model, lambda: decode(model, first, 12))
    assert len(set(want)) > 2
    decoding = StaticDecoding(model, first, 12)
    for _ in range(3):  # as before a recording
        decoding.step()
    for _ in range(2):
        assert fed(model, lambda: decoding.run(decoding.step)) == want


def test_no_length_of_a_cache_is_a_number_that_a_graph_would_freeze():
    decoding = StaticDecoding(mistral(window=5), torch.tensor([[7]]), 12)
    decoding.step()
    assert all(isinstance(layer.get_seq_length(), torch.Tensor) for layer in decoding.cache.layers)


def arguments_for(model, graph, monkeypatch):
    """What attention is called with in prefill, where the GPU is said to be recording."""
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def attention(*args, attn_mask=None, is_causal=False, **kwargs):
        seen.append((attn_mask, is_causal))
        return real(*args, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: graph)
    monkeypatch.setattr("proxsparse.commands.bench.recorded", lambda work: work)
    given = argparse.Namespace(graph=graph, prompt=8, tokens=4)
    with torch.no_grad():
        work_of("prefill", model, torch.arange(1, 9)[None], given)[1]()
    return seen


@pytest.mark.parametrize("graph", [False, True])
def test_a_recorded_prefill_computes_attention_as_one_that_is_not(graph, monkeypatch):
    model = tiny_llama(attn_implementation="sdpa").eval()
    found = arguments_for(model, graph, monkeypatch)
    assert found == [(None, True)] * 2


def test_a_graph_needs_a_cache_of_keys_and_values():
    class Recurrent(torch.nn.Module):
        def forward(self, input_ids, state=None):
            return input_ids

    with pytest.raises(UsageError, match="a cache of keys and values, which Recurrent has not"):
        work_of("decode", Recurrent(), torch.ones(1, 8), argparse.Namespace(graph=True, prompt=8, tokens=4))


def test_graphs_need_a_gpu(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert main(["bench", "--model", str(tmp_path), "--graph", "--device", "cpu"]) == 2
    assert "--graph is for CUDA graphs, which need a GPU; the model is on cpu" in capsys.readouterr().err
