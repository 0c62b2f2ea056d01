"""The one rule of what is pruned, on every architecture."""

import re

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from proxsparse.errors import UsageError
from proxsparse.model.prunable import find_prunable

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MOE = SIZES | {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

# name -> (configuration class, sizes, last parts of the names pruned in a block)
FAMILIES = {
    "llama": (hf.LlamaConfig, SIZES, SEVEN),
    "mistral": (hf.MistralConfig, SIZES, SEVEN),
    "qwen2": (hf.Qwen2Config, SIZES, SEVEN),
    "qwen3": (hf.Qwen3Config, SIZES | {"head_dim": 8}, SEVEN),
    "gemma2": (hf.Gemma2Config, SIZES | {"head_dim": 8}, SEVEN),
    "gemma3": (hf.Gemma3TextConfig, SIZES | {"head_dim": 8}, SEVEN),
    "olmo2": (hf.Olmo2Config, SIZES, SEVEN),
    "phi3": (hf.Phi3Config, SIZES, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "opt": (
        hf.OPTConfig,
        SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32},
        {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    ),
    "gpt2": (
        hf.GPT2Config,
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        {"c_attn", "c_proj", "c_fc"},
    ),
    "gpt_neox": (
        hf.GPTNeoXConfig,
        SIZES,
        {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    ),
    "mixtral": (hf.MixtralConfig, MOE, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "qwen3_moe": (
        hf.Qwen3MoeConfig,
        MOE | {"head_dim": 8},
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
    ),
}  # fmt: skip


def build(family: str, **changes):
    kind, sizes, _ = FAMILIES[family]
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(kind(**(sizes | changes)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_the_blocks_and_nothing_else_is_pruned(family):
    model = build(family)
    targets = find_prunable(model)
    assert {t.name.removesuffix(".weight").split(".")[-1] for t in targets} == FAMILIES[family][2]
    assert {t.block for t in targets} == {0, 1}
    assert len({t.name for t in targets}) == len(targets)
    for target in targets:
        assert target.rows(target.weight).shape[-1] % 4 == 0
        assert target.weight is model.get_parameter(target.name)
        assert not any(part in target.kind for part in ("layers", "lm_head", "embed"))


def test_gpt2_blocks_run_along_the_input():
    model = build("gpt2")
    target = next(t for t in find_prunable(model) if t.name.endswith("c_fc.weight"))
    assert tuple(target.weight.shape) == (32, 128)  # Conv1D stores (in, out)
    assert tuple(target.rows(target.weight).shape) == (128, 32)


def test_a_width_without_blocks_of_four_is_named_and_can_be_left_out():
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**(SIZES | {"intermediate_size": 66})))
    with pytest.raises(
        UsageError, match="input width of model.layers.0.mlp.down_proj.weight is 66, not a multiple of 4"
    ):
        find_prunable(model)
    assert len(find_prunable(model, exclude="down_proj")) == 12


@pytest.mark.parametrize(("hidden", "inner", "multiple"), [(32, 66, 4), (48, 40, 16), (40, 48, 16)])
@pytest.mark.parametrize("architecture", [hf.LlamaForCausalLM, hf.MixtralForCausalLM])
def test_the_sentence_about_widths_says_what_leaves_all_of_them_out(architecture, hidden, inner, multiple):
    sizes = SIZES | {"hidden_size": hidden, "intermediate_size": inner, "head_dim": 8}
    model = architecture(architecture.config_class(**sizes))
    with pytest.raises(UsageError) as found:
        find_prunable(model, multiple=multiple)
    expression = re.search(r"`exclude=(.*)`", str(found.value))[1]
    left = {t.name for t in find_prunable(model, exclude=expression, multiple=multiple)}
    assert left == {t.name for t in find_prunable(model, multiple=1) if t.weight.shape[t.in_dim] % multiple == 0}


def test_where_no_weight_has_blocks_another_pattern_is_the_answer():
    with pytest.raises(UsageError, match="one of 14 such weights.*No weight has such blocks: use another pattern"):
        find_prunable(build("llama"), multiple=7)


def test_include_and_exclude_select():
    model = build("llama")
    assert {t.kind for t in find_prunable(model, include="mlp", exclude="gate")} == {"mlp.up_proj", "mlp.down_proj"}
    with pytest.raises(UsageError, match="No weight of LlamaForCausalLM is left to prune"):
        find_prunable(model, include="nothing")


def linears_of_blocks(model):
    """Names by a rule of its own: weights of nn.Linear below model.layers.N."""
    modules = dict(model.named_modules()).items()
    return {
        f"{n}.weight" for n, m in modules if isinstance(m, torch.nn.Linear) and re.match(r"model\.layers\.\d+\.", n)
    }


@settings(max_examples=30, deadline=None)
@given(
    layers=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([8, 12, 16]),
    width=st.integers(2, 9).map(lambda n: 4 * n),
    tied=st.booleans(),
    biased=st.booleans(),
    kinds=st.sets(st.sampled_from(sorted(SEVEN)), min_size=1, max_size=6),
)
def test_selected_and_left_out_are_all_linears_of_the_blocks(layers, heads, head_dim, width, tied, biased, kinds):
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 1}
    sizes |= {"head_dim": head_dim, "intermediate_size": width, "tie_word_embeddings": tied}
    sizes |= {"attention_bias": biased, "mlp_bias": biased}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**(SIZES | sizes)))
    pattern = rf"\.({'|'.join(sorted(kinds))})\."
    everything, selected, rest = (
        [t.name for t in find_prunable(model, **choice)] for choice in ({}, {"include": pattern}, {"exclude": pattern})
    )
    assert set(everything) == linears_of_blocks(model)
    assert [n for n in everything if n.split(".")[-2] in kinds] == selected
    assert [n for n in everything if n.split(".")[-2] not in kinds] == rest


def test_a_model_without_decoder_blocks_is_refused():
    model = hf.BertModel(hf.BertConfig(**(SIZES | {"num_key_value_heads": 4})))
    with pytest.raises(UsageError, match=r"has no decoder layers to prune|is left to prune"):
        find_prunable(model, include="decoder")
