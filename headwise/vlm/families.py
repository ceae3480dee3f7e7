"""Model families as a table of data, and a model with its processor."""

from dataclasses import dataclass
from functools import reduce

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


@dataclass(frozen=True)
class Family:
    """What differs between model families.

    decoder: path of the language model's decoder inside the model. image_token: the configuration's field with the id of the visual
    token, None for text alone.
    """

    decoder: str
    image_token: str | None = None


TEXT_ONLY = Family(decoder="model")
FAMILIES: dict[str, Family] = {
    "fast_vlm": Family(decoder="model.language_model", image_token="image_token_id"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), TEXT_ONLY),
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
    def end_id(self) -> int:
        """The end-of-turn token."""
        found = self.tokenizer.eos_token_id
        assert isinstance(found, int)
        return found

    @property
    def decoder(self) -> nn.Module:
        """The language model's decoder: the module with `.layers`."""
        return reduce(getattr, self.family.decoder.split("."), self.base)

    @property
    def visual_id(self) -> int | None:
        """The visual token; None for text alone."""
        return getattr(self.base.config, self.family.image_token) if self.family.image_token else None

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
