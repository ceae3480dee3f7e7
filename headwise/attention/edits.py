"""Edits of attention that leave the weights alone: gates on heads' outputs and a bias on the first token's scores."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

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
    shape, batch = (vlm.num_layers, vlm.num_heads), len(segments.first)
    for name, part in (("gates", edits.gates), ("first_bias", edits.first_bias)):
        if part is not None and part.shape not in (shape, (batch, *shape)):
            raise ValueError(f"{name} of shape {tuple(part.shape)}: {shape} or {(batch, *shape)} is needed")
    gates, first_bias = edits.gates, edits.first_bias
    first = Places(segments.first[:, None], torch.ones_like(segments.first[:, None], dtype=torch.bool))
    is_zero = first_bias is None or not bool(first_bias.any())

    def gate(attention: Attention, output: Tensor) -> Tensor | None:
        if gates is None:
            return None
        own = gates[..., attention.layer, :].to(output.dtype)  # [head] or [batch, head]
        return output * (own if own.ndim == 1 else own[:, None])[..., None]

    def bias(layer: int, query: Tensor) -> FirstBias:
        assert first_bias is not None
        return FirstBias(first_bias[..., layer, :].expand(len(query), -1), first, is_zero)

    with visiting(vlm, gate, bias if first_bias is not None else None):
        yield
