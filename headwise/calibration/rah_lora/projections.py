"""The part of each attention projection that belongs to a head."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.calibration.rah_lora.targets import Head
from headwise.calibration.rah_lora.updates import Factors
from headwise.vlm import VLM

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj"]
SHARED: tuple[Projection, ...] = ("k_proj", "v_proj")
"""Projections that the query heads of a group share."""
AVERAGED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
QUANTISED = "; if the model is quantised, load it in bfloat16 or float32"


@dataclass(frozen=True)
class Projections:
    """The attention projections of a model, head by head."""

    vlm: VLM

    @property
    def group(self) -> int:
        """Query heads to a key-value head."""
        return self.vlm.num_heads // self.vlm.num_kv_heads

    def path(self, layer: int, name: Projection) -> str:
        """The module's full path."""
        return f"{self.vlm.family.decoder}.layers.{layer}.self_attn.{name}"

    def module(self, layer: int, name: Projection) -> nn.Linear:
        """The linear map. Raises ValueError if it is none, or its weights are quantised and cannot be averaged."""
        path = self.path(layer, name)
        try:
            module = self.vlm.base.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"{path}: there is no such projection in {self.vlm.base.config.model_type}") from error
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{path}: {type(module).__name__} is no linear map whose weights RAH-LoRA could average{QUANTISED}")
        if module.weight.dtype not in AVERAGED:
            raise ValueError(f"{path}: weights of {module.weight.dtype} cannot be averaged{QUANTISED}")
        return module

    def weight(self, head: Head, name: Projection) -> Float[Tensor, "out in"]:
        """The head's part of the weight, in fp32: rows of queries, of its group's keys and values, columns of the output."""
        layer, number = head
        weight, at = self.module(layer, name).weight.detach(), self._slice(number, name)
        return (weight[:, at] if name == "o_proj" else weight[at]).float()

    def values(self, head: Head) -> Float[Tensor, "width in"]:
        """What the head makes of an input, as a linear map; where its value projection has a bias, of the input and a 1."""
        weight, bias = self.weight(head, "v_proj"), dict(self.module(head[0], "v_proj").named_parameters()).get("bias")
        if bias is None:
            return weight
        return torch.cat([weight, bias.detach().float()[self._slice(head[1], "v_proj")][:, None]], dim=1)

    def placed(self, head: Head, name: Projection, change: Factors) -> Factors:
        """Factors of the head's part as factors of the whole projection."""
        layer, number = head
        out, in_ = self.module(layer, name).weight.shape
        at, rank = self._slice(number, name), change.up.shape[1]
        if name == "o_proj":
            down = change.down.new_zeros(rank, in_)
            down[:, at] = change.down
            return Factors(change.up, down)
        up = change.up.new_zeros(out, rank)
        up[at] = change.up
        return Factors(up, change.down)

    def restricted(self, head: Head, name: Projection, change: Factors) -> Factors:
        """Of factors of the whole projection what changes the head's part."""
        at = self._slice(head[1], name)
        up, down = change.up.clone(), change.down.clone()
        outside = torch.ones(down.shape[1] if name == "o_proj" else len(up), dtype=torch.bool)
        outside[at] = False
        if name == "o_proj":
            down[:, outside] = 0
        else:
            up[outside] = 0
        return Factors(up, down)

    def _slice(self, number: int, name: Projection) -> slice:
        place = number // self.group if name in SHARED else number
        parts = self.vlm.num_kv_heads if name in SHARED else self.vlm.num_heads
        weight = self.module(0, name).weight
        width = weight.shape[1 if name == "o_proj" else 0] // parts
        return slice(place * width, (place + 1) * width)
