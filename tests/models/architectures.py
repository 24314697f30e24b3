"""Tiny random models of the causal architectures that transformers has, by the name of their configuration."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "n_embed", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_inner", "n_inner"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "head_dim", "v_head_dim", "mamba_d_head"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "state_size", "mamba_d_state", "rotary_dim"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_intermediate_size"), 32),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 512),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 16),  # shorter than the prompts of the tests
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "mamba_n_heads": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
"""Tried on every configuration that has the key."""
_LEFT_AT_NONE = ("sliding_window", "q_lora_rank", "d_inner")
"""Keys that some architectures have at None, and must."""

_LATENT_ATTENTION = {"head_dim": 8, "num_key_value_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), _LATENT_ATTENTION),
    "cohere": {"logit_scale": 0.25},
    "falcon": {"alibi": True, "multi_query": False, "num_key_value_heads": ..., "head_dim": ...},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma4_text": {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "llama4_text": {"intermediate_size_mlp": 64, "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "longcat_flash": {**_LATENT_ATTENTION, "num_layers": 1},
    "mamba2": {"num_heads": 8, "n_groups": 1, "expand": 2},
    "qwen3_5_text": {"num_hidden_layers": 4},
    "qwen3_next": {"num_hidden_layers": 4},
}
"""What single architectures need besides; `...` leaves a key at its default."""

ALWAYS = {
    "llama": "fast",
    "mistral": "fast",
    "gemma2": "plain",
    "gemma3_text": "fast",
    "gemma4_text": "fast",
    "gpt_oss": "plain",
    "llama4_text": "plain",
    "cohere": "plain",
    "granite": "plain",
    "glm4_moe": "fast",
    "nemotron": "fast",
    "falcon": "plain",
    "mamba": "plain",
    "jamba": "plain",
    "gptj": "fast",
    "mpt": "plain",
    "qwen3_next": "plain",
}
"""Architectures that are always tried, and the way that each is read."""


def tiny(kind: str, vocab_size: int, **more: Any) -> PreTrainedModel:
    """Make a small model with weights large enough that each of its parts changes the result."""
    base = CONFIG_MAPPING[kind]()
    defaults = base.to_dict()
    known = {*defaults, *getattr(base, "attribute_map", {})}
    fitting = {
        key: value
        for key, value in {"vocab_size": vocab_size, **SIZES}.items()
        if key in known
        and not isinstance(defaults.get(key), list)
        and not (key in _LEFT_AT_NONE and defaults.get(key, 1) is None)
    }
    values = {key: value for key, value in {**fitting, **OWN.get(kind, {}), **more}.items() if value is not ...}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**values), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.5 if "embed" in name else 0.1)
    return model.eval()


FAST = [
    "afmoe",
    "apertus",
    "arcee",
    "aria_text",
    "biogpt",
    "bitnet",
    "codegen",
    "ctrl",
    "cwm",
    "deepseek_v2",
    "deepseek_v3",
    "diffllama",
    "dots1",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone_moe",
    "flex_olmo",
    "gemma",
    "gemma3_text",
    "gemma4_text",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt-sw3",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gpt_neox_japanese",
    "gptj",
    "granitemoe",
    "granitemoeshared",
    "helium",
    "hrm_text",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hy_v3",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "jais2",
    "kolibri1",
    "laguna",
    "lfm2",
    "llama",
    "longcat_flash",
    "mellum",
    "minimax_m2",
    "minimax_m3_vl_text",
    "ministral",
    "ministral3",
    "mistral",
    "mixtral",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "solar_open",
    "stablelm",
    "starcoder2",
    "xglm",
    "youtu",
]
"""Architectures that are read the fast path."""
PLAIN = [
    "bailing_hybrid",
    "bamba",
    "beam",
    "bloom",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "doge",
    "falcon",
    "falcon_h1",
    "falcon_mamba",
    "flint",
    "gemma2",
    "gpt_bigcode",
    "gpt_oss",
    "granite",
    "granite_swa",
    "granitemoe_swa",
    "granitemoehybrid",
    "hy_v4",
    "inkling2_text",
    "inkling_text",
    "jamba",
    "jetmoe",
    "lfm3",
    "llama4_text",
    "mamba",
    "mamba2",
    "mimo_v2_flash",
    "minicpm3",
    "minimax",
    "modernbert-decoder",
    "mpt",
    "nanochat",
    "nemotron_h",
    "olmo_hybrid",
    "openai-gpt",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
    "qwen4_exp_text",
    "recurrent_gemma",
    "vaultgemma",
    "xlstm",
]
"""Architectures that are read the plain path."""
