"""Small real models built in memory from configurations, with seeded random weights: a vision-language model and a text-only one."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    TimmWrapperConfig,
)

from headwise.vlm import FAMILIES, VLM

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, WIDTH = 4, 6, 3, 48
PIXELS, STRIDE = 96, 32
GRID = (PIXELS // STRIDE, PIXELS // STRIDE)

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "user assistant What colour is the large circle? It is red.",
    "How many squares are in the picture? There are three squares.",
    "Describe the image. A blue triangle above a green star, on a plain background.",
]


def byte_pairs(special: Sequence[str]) -> Tokenizer:
    """Byte-level BPE over a few sentences."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=317 + len(special), special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    return core


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A small vocabulary; as in SmolLM2, the end-of-turn token also pads."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_pairs(["<|im_start|>", "<|im_end|>", "<image>"]),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        extra_special_tokens=["<image>"],
        chat_template=TEMPLATE,
    )


def token_id(token: str) -> int:
    found = tokenizer().convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def text_config(num_kv_heads: int = NUM_KV_HEADS) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=num_kv_heads,
        head_dim=WIDTH // NUM_HEADS,
        max_position_embeddings=256,
        initializer_range=0.2,  # wide enough for attention that is far from uniform
        tie_word_embeddings=True,
        bos_token_id=token_id("<|im_start|>"),
        eos_token_id=token_id("<|im_end|>"),
        pad_token_id=token_id("<|im_end|>"),
    )


def processor() -> LlavaProcessor:
    images = CLIPImageProcessor(size={"height": PIXELS, "width": PIXELS}, do_center_crop=False)
    return LlavaProcessor(
        images, tokenizer(), patch_size=STRIDE, vision_feature_select_strategy="full", chat_template=TEMPLATE, image_token="<image>"
    )


def new_tiny_vlm(seed: int = 0, num_kv_heads: int = NUM_KV_HEADS) -> VLM:
    """A fresh FastVLM of 4 layers, 6 query and 3 KV heads, a 3 x 3 grid: for tests that change its weights."""
    torch.manual_seed(seed)
    vision = TimmWrapperConfig(architecture="test_efficientnet", do_pooling=False, hidden_size=256)
    config = FastVlmConfig(
        vision_config=vision,
        text_config=text_config(num_kv_heads),
        image_token_index=token_id("<image>"),
        image_seq_length=GRID[0] * GRID[1],
    )
    model = FastVlmForConditionalGeneration(config)
    _normalise(model.model.vision_tower)
    return VLM(model.eval(), processor(), FAMILIES["fast_vlm"])


def _normalise(tower: nn.Module) -> None:
    """Set the batch norms' statistics on seeded pictures: random convolutions alone shrink every feature to nothing."""
    norms = [module for module in tower.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    pictures = processor().image_processor([image(seed) for seed in range(8)], return_tensors="pt")
    with torch.no_grad():
        tower.train()(**pictures)


def new_tiny_lm(seed: int = 0) -> VLM:
    """A fresh text-only Llama of the same size: for tests that change its weights."""
    torch.manual_seed(seed)
    return VLM(LlamaForCausalLM(text_config()).eval(), tokenizer(), FAMILIES["llama"])


@cache
def tiny_vlm() -> VLM:
    """The shared small vision-language model; leave its weights as they are."""
    return new_tiny_vlm()


@cache
def tiny_lm() -> VLM:
    """The shared small language model; leave its weights as they are."""
    return new_tiny_lm()


def save(vlm: VLM, folder: Path) -> Path:
    """Write the model as a plain transformers folder."""
    vlm.base.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


def image(seed: int, size: tuple[int, int] = (120, 90)) -> Image.Image:
    """A seeded picture of width x height pixels: coarse coloured blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)
