"""The trainable parameters that the Head Impact paper gives for r = 8 on q, k, v of four layers, on models of the published shapes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from headwise.calibration.lora import lora_parameters, target_modules, target_pattern
from headwise.vlm import VLM, Family
from tests import tiny

SIGLIP = {"num_hidden_layers": 8, "hidden_size": 1152, "intermediate_size": 512, "num_attention_heads": 16}
LAYERS = (2, 5, 6, 7)
"""Also numbers of layers of the vision towers below."""


def qwen2_vl_2b() -> PreTrainedModel:
    text = {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 64}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config={"depth": 8, "hidden_size": 1536}))


def paligemma2_3b() -> PreTrainedModel:
    text = {"model_type": "gemma2", "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4}
    text |= {"head_dim": 256, "vocab_size": 64}
    vision = {"model_type": "siglip_vision_model", "projection_dim": 2304, **SIGLIP}
    return PaliGemmaForConditionalGeneration(PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=2304))


def smolvlm_2b() -> PreTrainedModel:
    text = {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "vocab_size": 64}
    return Idefics3ForConditionalGeneration(Idefics3Config(text_config=text, vision_config=SIGLIP))


@pytest.mark.parametrize(
    ("build", "decoder", "published"),
    [
        (qwen2_vl_2b, "model.language_model", 212_992),
        (paligemma2_3b, "model.language_model", 352_256),
        (smolvlm_2b, "model.text_model", 393_216),
    ],
)
def test_the_published_counts(build, decoder, published):
    with torch.device("meta"):
        vlm = VLM(build(), tiny.tokenizer(), Family(decoder=decoder))
    assert lora_parameters(8, target_modules(vlm, LAYERS)) == published
    with torch.device("meta"):
        adapted = get_peft_model(vlm.base, LoraConfig(r=8, target_modules=target_pattern(vlm, LAYERS)))
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert sum(parameter.numel() for parameter in trained.values()) == published
    assert all(f".{decoder}.layers." in name for name in trained)


def test_bare_suffixes_would_also_hit_the_vision_tower():
    with torch.device("meta"):
        config = LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj"], layers_to_transform=list(LAYERS))
        adapted = get_peft_model(paligemma2_3b(), config)
    assert sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad) > 352_256
