"""Model families as a table of data, and a model with its processor."""

from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from headwise.vlm import layouts
from headwise.vlm.layouts import Geometry


@dataclass(frozen=True)
class Family:
    """What differs between model families.

    decoder: path of the language model's decoder inside the model. layout: where the image tokens lie; None for text alone.
    num_image_tokens, prompt_end: where no chat template says it, the processor's field with the number of image tokens before the
    question, and what follows the question. answer_type: the token type of the answer, where tokens have types.
    shares_image: whether what the decoder makes of the image may serve several questions: it may not if the question is before it, or
    read by it, or if positions cannot be told from a cache.
    """

    decoder: str = "model.language_model"
    layout: Geometry | None = None
    num_image_tokens: str | None = None
    prompt_end: str = ""
    answer_type: int = 0
    shares_image: bool = True


TEXT_ONLY = Family(decoder="model")
QWEN_VL = Family(layout=layouts.merged_grid, shares_image=False)
FAMILIES: dict[str, Family] = {
    "fast_vlm": Family(layout=layouts.patch_grid),
    "llava": Family(layout=layouts.patch_grid),
    "llava_next": Family(layout=layouts.any_resolution),
    "llava_onevision": Family(layout=layouts.any_resolution),
    "qwen2_vl": QWEN_VL,
    "qwen2_5_vl": QWEN_VL,
    "qwen3_vl": QWEN_VL,
    "paligemma": Family(layout=layouts.tower_grid, num_image_tokens="image_seq_length", prompt_end="\n", answer_type=1, shares_image=False),
    "smolvlm": Family(decoder="model.text_model", layout=layouts.split_tiles),
    "idefics3": Family(decoder="model.text_model", layout=layouts.split_tiles),
    "internvl": Family(layout=layouts.canvas_tiles),
    "gemma3": Family(layout=layouts.pooled_grid, shares_image=False),
    "instructblip": Family(decoder="language_model.model", layout=layouts.queries, num_image_tokens="num_query_tokens", shares_image=False),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text"), TEXT_ONLY),
}
"""Families by transformers' model_type."""


@dataclass(frozen=True)
class VLM:
    """A model with its processor (for text alone: its tokenizer); an adapter, if any, is already on the model."""

    model: PreTrainedModel | PeftModel
    processor: ProcessorMixin | PreTrainedTokenizerBase
    family: Family

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, with the adapter's layers inside where there is one."""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        assert isinstance(model, PreTrainedModel)
        return model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's tokenizer."""
        return self.processor.tokenizer if isinstance(self.processor, ProcessorMixin) else self.processor

    @property
    def has_template(self) -> bool:
        """Whether a chat template writes the prompts."""
        return bool(self.processor.chat_template)

    @cached_property
    def end_id(self) -> int:
        """The end-of-turn token: what the chat template writes after an answer if that is a special token, else the end of the text."""
        tokenizer: Any = self.tokenizer
        answer, after = "the answer", list[int]()
        if self.has_template:
            turns = [("user", "a question"), ("assistant", answer)]
            messages: Any = [
                {"role": role, "content": [{"type": "text", "text": text}] if self.family.layout else text} for role, text in turns
            ]
            written = str(self.processor.apply_chat_template(messages, tokenize=False))
            after = tokenizer(written.rpartition(answer)[2].strip(), add_special_tokens=False)["input_ids"][:1]
        found = after[0] if after and tokenizer.decode(after) in tokenizer.get_added_vocab() else tokenizer.eos_token_id
        assert isinstance(found, int)
        return found

    @property
    def decoder(self) -> nn.Module:
        """The language model's decoder: the module with `.layers`."""
        return reduce(getattr, self.family.decoder.split("."), self.base)

    @property
    def visual_id(self) -> int | None:
        """The visual token; None for text alone."""
        return self.base.config.image_token_id if self.family.layout else None

    @property
    def text_config(self) -> PreTrainedConfig:
        """The language model's configuration."""
        return self.base.config.get_text_config()

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.text_config.num_hidden_layers

    @property
    def num_heads(self) -> int:
        """Query heads in a layer."""
        return self.text_config.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads in a layer; each serves num_heads / num_kv_heads query heads."""
        return getattr(self.text_config, "num_key_value_heads", None) or self.num_heads

    @property
    def device(self) -> torch.device:
        """Where the decoder's weights are."""
        return next(self.decoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the decoder's weights."""
        return next(self.decoder.parameters()).dtype
