"""What bench measures: decoding with a cache of fixed size is decoding, and what can't be recorded is said."""

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama
from transformers import MistralConfig, MistralForCausalLM

from proxsparse.__main__ import main
from proxsparse.commands.bench import StaticDecoding, decode
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


def test_decoding_with_a_cache_of_fixed_size_feeds_the_same_tokens_again_and_again():
    model, first = tiny_llama().eval(), torch.tensor([[7]])
    want = fed(model, lambda: decode(model, first, 9))
    assert len(set(want)) > 2
    decoding = StaticDecoding(model, first, 9)
    decoding.step()  # as before a recording
    for _ in range(2):
        assert fed(model, lambda: decoding.run(decoding.step)) == want


def test_a_window_that_would_move_is_refused():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 257}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 8}
    model = MistralForCausalLM(MistralConfig(**sizes, **heads)).eval()
    StaticDecoding(model, torch.tensor([[7]]), 8)
    with pytest.raises(UsageError, match="With --graph at most 7 --tokens, this model's window; got 8"):
        StaticDecoding(model, torch.tensor([[7]]), 9)


def test_graphs_need_a_gpu(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert main(["bench", "--model", str(tmp_path), "--graph", "--device", "cpu"]) == 2
    assert "--graph is for CUDA graphs, which need a GPU; the model is on cpu" in capsys.readouterr().err
