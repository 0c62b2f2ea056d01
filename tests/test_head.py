"""Which models have an LM head that makes their logits alone, and what is computed of its inputs."""

import pytest
import torch
import transformers as hf
from conftest import tiny_llama

from proxsparse.learning.head import last_states, plain_head

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
OTHERS = {
    "capped": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8)),
    "scaled": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZES, logit_scale=0.5, pad_token_id=0, eos_token_id=0)),
    "divided": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, logits_scaling=8.0)),
}


def test_a_plain_head_makes_the_logits_of_the_last_states():
    model, ids = tiny_llama().eval(), torch.arange(1, 9)[None]
    head = plain_head(model)
    torch.testing.assert_close(head(last_states(model, model, input_ids=ids)), model(input_ids=ids).logits)
    assert not model.model._forward_hooks


@pytest.mark.parametrize("kind", OTHERS)
def test_logits_that_are_capped_or_scaled_stay_whole(kind):
    assert plain_head(OTHERS[kind]().train()) is None
