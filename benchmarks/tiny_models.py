"""A tiny model of every decoder that transformers knows, from its configuration class: two layers, width 32.

``tiny_config`` lowers every size it finds in a configuration, and in the ones inside of it. Where sizes depend on one
another, OVERRIDES says how.
"""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 257

_NAMES = {
    VOCABULARY: "vocab_size unpadded_vocab_size decoder_vocab_size n_words vocab_size_per_layer_input",
    32: "hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim input_embedding_size "
    "output_embedding_size expert_ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size lru_width "
    "moe_shared_expert_intermediate_size shared_intermediate_size attention_hidden_size adapter_in_dim "
    "adapter_input_size hidden_size_global router_hidden_size",
    64: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size n_inner dff dim_ff d_inner "
    "feed_forward_size intermediate_size_mlp dense_intermediate_size sliding_window rel_extent",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_blocks num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_k "
    "moe_topk moe_top_k mamba_expand expand",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts linear_num_key_heads linear_num_value_heads zero_expert_num",
    8: "head_dim dim_head d_head attention_head_size kv_channels global_head_dim qk_rope_head_dim qk_nope_head_dim "
    "v_head_dim rotary_dim time_step_rank mamba_dt_rank linear_key_head_dim linear_value_head_dim "
    "hidden_size_per_layer_input index_head_dim",
    256: "max_position_embeddings n_positions max_seq_len context_length n_ctx max_target_positions model_max_length",
    1: "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_group",
    16: "q_lora_rank kv_lora_rank qk_head_dim state_size mamba_d_state ssm_state_size chunk_size mamba_chunk_size",
    0: "pad_token_id bos_token_id eos_token_id",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type")
MAY_BE_NONE = ("num_key_value_heads", "head_dim", "pad_token_id", "bos_token_id", "eos_token_id")

_SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_WIDE = {"attention_hidden_size": 64, "attention_head_dim": 16}  # Zamba's shared attention sees twice the width
_CHUNKS = {"local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16, "num_buckets": 8}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 1},
    "bailing_hybrid": {"first_k_dense_replace": 1},
    "bamba": _SSM | {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "deepseek_v3": {"first_k_dense_replace": 1},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 1},
    "falcon_h1": _SSM | {"mamba_d_ssm": 64},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n": {"text_config": {"num_kv_shared_layers": 0}},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _SSM,
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"moe_layers": [1]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": _CHUNKS
    | {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2} | _WIDE,
    "zamba2": _WIDE,
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(kind: str) -> PretrainedConfig:
    """Configuration of a tiny model.

    Args:
        kind: model type, one of KINDS.
    """
    make = CONFIG_MAPPING[kind]
    return make(**_merged(_sizes(make()), OVERRIDES.get(kind, {})))


def tiny_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model with random weights."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def _sizes(config: PretrainedConfig) -> dict[str, Any]:
    """Arguments that make a configuration tiny; one layer per kind of layer, and at least two."""
    found: dict[str, Any] = {}
    present = vars(config)
    for name, value in present.items():
        if isinstance(value, PretrainedConfig):
            found[name] = _sizes(value)
        elif name in SIZES and isinstance(value, int | float | None) and not isinstance(value, bool):
            found |= {name: SIZES[name]} if value is not None or name in MAY_BE_NONE else {}
    if "kv_lora_rank" in found:  # multi-head latent attention has as many keys as queries
        found["num_key_value_heads"] = found["num_attention_heads"]
    if present.get("is_decoder") is False:
        found["is_decoder"] = True
    lists = {name: list(dict.fromkeys(present[name])) for name in PER_LAYER if _is_per_layer(present.get(name))}
    if lists:
        layers = max(2, *map(len, lists.values()))
        found |= {name: (kinds * layers)[:layers] for name, kinds in lists.items()}
        if "num_hidden_layers" in found:
            found["num_hidden_layers"] = layers
    return found


def _is_per_layer(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


def _merged(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    merged = low | high
    for name in low.keys() & high.keys():
        if isinstance(low[name], dict) and isinstance(high[name], dict):
            merged[name] = _merged(low[name], high[name])
    return merged
