"""Edits of attention that leave the weights alone: gates on heads' outputs and a bias on the first token's scores."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin

from headwise.attention.layer import Attention, FirstBias, Places
from headwise.attention.seam import visiting
from headwise.segments import Segments
from headwise.vlm import VLM

PerHead = Float[Tensor, "*batch layer head"]
"""One number per head, for all examples or for each."""


@dataclass(frozen=True)
class Edits:
    """What is changed in every head; each part may carry gradients, of which every head gets its own.

    gates: each head's output times its gate, before o_proj (CAF, RAH-LoRA eq. 5); 0 drops the head, None = all 1. first_bias: added to
    each head's score of the first real token, log gamma (ZeroTuning); nothing happens where that token is outside a sliding window.
    None = all 0.
    """

    gates: PerHead | None = None
    first_bias: PerHead | None = None


def drop_heads(vlm: VLM, heads: Iterable[tuple[int, int]]) -> Edits:
    """Without these (layer, head). Raises ValueError if the model has no such head."""
    gates = torch.ones(vlm.num_layers, vlm.num_heads, device=vlm.device)
    for layer, head in heads:
        if not (0 <= layer < vlm.num_layers and 0 <= head < vlm.num_heads):
            raise ValueError(f"no head {head} in layer {layer}: the model has {vlm.num_layers} layers of {vlm.num_heads} heads, from 0")
        gates[layer, head] = 0
    return Edits(gates=gates)


@contextmanager
def editing(vlm: VLM, edits: Edits, segments: Segments) -> Iterator[None]:
    """The model with the edits inside the block, for the batch whose segments these are: forward passes, generation, or `observe`, which
    then sees the biased attention. With gradient checkpointing, which runs layers again, `backward` belongs inside the block too. Raises
    ValueError if a part is of another shape.
    """
    _check_shapes(vlm, edits, len(segments.first))
    with _edited(vlm, edits, lambda _attention: segments.first):
        yield


@contextmanager
def steering(vlm: VLM, edits: Edits) -> Iterator[None]:
    """The model with the same edits of every example inside the block, whatever is run, by Headwise or by plain transformers, over a cache
    too: each pass's attention mask says where the first real token is (without a mask it is the first). Afterwards the model is as it was.

    Raises ValueError if a part is of another shape, or has one for each example.
    """
    _check_shapes(vlm, edits, None)
    given = dict[str, Any]()
    prompted: list[nn.Module] = [module for module in vlm.base.modules() if isinstance(module, GenerationMixin)]
    parameters = {module: signature(module.forward) for module in prompted}

    def keep(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        own = parameters[module].bind_partial(*arguments, **options).arguments
        given["mask"], cache = own.get("attention_mask"), own.get("past_key_values")
        given["past"] = 0 if cache is None else cache.get_seq_length()

    def first(attention: Attention) -> Int[Tensor, " batch"]:
        if given["mask"] is None:
            place = torch.zeros(len(attention.query), dtype=torch.int64, device=attention.query.device)
            tokens = given["past"] + attention.query.shape[2]
        else:
            place, tokens = given["mask"].int().argmax(dim=1).to(attention.query.device), given["mask"].shape[1]
        return place - max(tokens - attention.key.shape[2], 0)  # a sliding window's cache lets go of the oldest keys

    # the model itself and, where generation goes past it (InstructBLIP), the language model inside
    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in parameters]
    try:
        with _edited(vlm, edits, first):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _check_shapes(vlm: VLM, edits: Edits, batch: int | None) -> None:
    shape = (vlm.num_layers, vlm.num_heads)
    allowed = [shape] if batch is None else [shape, (batch, *shape)]
    for name, part in (("gates", edits.gates), ("first_bias", edits.first_bias)):
        if part is not None and part.shape not in allowed:
            raise ValueError(f"{name} of shape {tuple(part.shape)}: {' or '.join(map(str, allowed))} is needed")


@contextmanager
def _edited(vlm: VLM, edits: Edits, first: Callable[[Attention], Int[Tensor, " batch"]]) -> Iterator[None]:
    """first: the place of each example's first real token among a layer's keys; below 0 it is not among them."""
    gates, first_bias = edits.gates, edits.first_bias
    is_zero = first_bias is None or not bool(first_bias.any())

    def gate(attention: Attention, output: Tensor) -> Tensor | None:
        if gates is None:
            return None
        own = gates[..., attention.layer, :].to(output.dtype)  # [head] or [batch, head]
        return output * (own if own.ndim == 1 else own[:, None])[..., None]

    def bias(attention: Attention) -> FirstBias:
        assert first_bias is not None
        place = first(attention)[:, None]
        own = first_bias[..., attention.layer, :].expand(len(attention.query), -1)
        return FirstBias(torch.where(place < 0, 0, own), Places(place.clamp_min(0), torch.ones_like(place, dtype=torch.bool)), is_zero)

    with visiting(vlm, gate, bias if first_bias is not None else None):
        yield
