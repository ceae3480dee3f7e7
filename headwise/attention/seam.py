"""The seam: while a visitor is on, the decoder's attention shows it each layer's queries and keys and takes an output back if it gives one.

A function registered with transformers' AttentionInterface computes the layer's output with SDPA, as the model does by itself.
Shapes: B batch, H query head, G query heads per KV head, Q query, K key, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from headwise.vlm import VLM

NAME = "headwise"
"""The attention implementation's name in transformers."""

ROW_BLOCK = 128
"""Query rows per block: what is held at once is batch x heads x 128 x keys in fp32."""


@dataclass(frozen=True)
class Rows:
    """Attention probabilities of a block of query rows, and the layer's keys after their rotation."""

    start: int
    probabilities: Float[Tensor, "batch head query key"]
    keys: Float[Tensor, "batch kv_head key width"]


@dataclass(frozen=True)
class Attention:
    """What one decoder layer computes its attention from. mask: bool = may attend, float = added to the scores, None = see `causal`."""

    layer: int
    query: Float[Tensor, "batch head query width"]
    key: Float[Tensor, "batch kv_head key width"]
    value: Float[Tensor, "batch kv_head key value_width"]
    mask: Tensor | None
    scaling: float
    causal: bool

    def rows(self, block: int = ROW_BLOCK) -> Iterator[Rows]:
        """`softmax(q k^T * scaling + mask)` in fp32, block by block of query rows. Grouped keys are not repeated: the query heads of a
        group are further rows of the same product.
        """
        B, H, Q, D = self.query.shape
        KV, K = self.key.shape[1:3]
        keys = self.key.float()
        grouped = self.query.view(B, KV, H // KV, Q, D)
        for start in range(0, Q, block):
            q_BHGQD = grouped[:, :, :, start : start + block].float()
            scores = (q_BHGQD.reshape(B, KV, -1, D) @ keys.transpose(2, 3)).view(B, H, -1, K) * self.scaling
            yield Rows(start, self._masked(scores, start).softmax(dim=-1), keys)

    def _masked(self, scores: Float[Tensor, "batch head query key"], start: int) -> Float[Tensor, "batch head query key"]:
        stop = start + scores.shape[2]
        lowest = torch.finfo(scores.dtype).min  # finite: a padding row, which may attend to nothing, becomes uniform and not NaN
        if self.mask is not None:
            mask = self.mask[:, :, start:stop]
            return scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
        if not self.causal:
            return scores
        later = torch.arange(scores.shape[3], device=scores.device) > torch.arange(start, stop, device=scores.device)[:, None]
        return scores.masked_fill(later, lowest)


Visitor = Callable[[Attention, Float[Tensor, "batch query head value_width"]], Tensor | None]
"""Called once per layer with the layer's output; what it returns, unless None, takes the output's place."""

_visitor: ContextVar[Visitor | None] = ContextVar("visitor", default=None)


def visited_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA, shown to the visitor of this context. Raises ValueError on attention that is more than a softmax of scaled, masked scores."""
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise ValueError(f"{type(module).__name__} changes its attention scores by {unknown[0]}, which Headwise does not read")
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    visitor = _visitor.get()
    if visitor is None:
        return output, None
    is_causal = kwargs["is_causal"] if kwargs.get("is_causal") is not None else getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    assert not causal or query.shape[2] == key.shape[2], "a causal step over a cache comes with a mask"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    replaced = visitor(Attention(getattr(module, "layer_idx"), query, key, value, attention_mask, scale, causal), output)  # noqa: B009
    return output if replaced is None else replaced, None


AttentionInterface.register(NAME, visited_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without it the mask is built for another kernel


@contextmanager
def visiting(vlm: VLM, visitor: Visitor) -> Iterator[None]:
    """Show the decoder's attention to the visitor inside the block; afterwards the model's own implementation is back.

    Raises ValueError on a family that caps its attention scores: SDPA cannot compute its output.
    """
    cap = getattr(vlm.text_config, "attn_logit_softcapping", None)
    if cap is not None:
        raise ValueError(f"{vlm.text_config.model_type} caps its attention scores at {cap:g} (attn_logit_softcapping); SDPA cannot do that")
    before = vlm.text_config._attn_implementation  # pyright: ignore[reportPrivateUsage] - there is no public one
    assert before is not None
    set_implementation(vlm, NAME)
    token = _visitor.set(visitor)
    try:
        yield
    finally:
        _visitor.reset(token)
        set_implementation(vlm, before)


def set_implementation(vlm: VLM, name: str) -> None:
    """Choose the decoder's attention implementation and leave the vision tower's."""
    nested = vlm.text_config is not vlm.base.config
    vlm.base.set_attn_implementation({"text_config": name} if nested else name)
