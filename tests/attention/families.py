"""Small text-only models of every family that Headwise knows, and of one that it refuses, built from their configurations."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from headwise.vlm import FAMILIES, VLM
from headwise.vlm.families import TEXT_ONLY
from tests.tiny import text_config, tokenizer

SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)
EXTRA: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    "qwen3": {},
    "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": False},
    "gemma2": {"sliding_window": 8},
}


def family(model_type: str, kv_heads: int = 3, **changes: object) -> VLM:
    own = text_config()
    values = {name: getattr(own, name) for name in SHARED} | {"num_key_value_heads": kv_heads, "initializer_range": 0.2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(values | EXTRA[model_type] | changes))
    return VLM(AutoModelForCausalLM.from_config(config).eval(), tokenizer(), FAMILIES.get(model_type, TEXT_ONLY))
