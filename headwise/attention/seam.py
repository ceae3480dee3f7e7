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
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from headwise.vlm import VLM

NAME = "headwise"
"""The attention implementation's name in transformers."""

BLOCK_BYTES = 8 << 20
"""How much of a block of attention probabilities is held at once."""


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
    lse: Float[Tensor, "batch head query"]

    def probabilities(self, rows: "Places", keys: "Places | None" = None) -> Float[Tensor, "batch head row key"]:
        """`exp(q k^T * scaling + mask - lse)` in fp32 at these rows and keys (None: all keys); 0 where a place is filled up.

        With the log-sum-exp of its row an entry needs no other entry (Dao et al. 2022, arXiv 2205.14135, alg. 1).
        """
        B, H, _, D = self.query.shape
        KV = self.key.shape[1]
        q_BHRD, k_BKVKD = _take(self.query, rows.index), self.key if keys is None else _take(self.key, keys.index)
        R, K = q_BHRD.shape[2], k_BKVKD.shape[2]
        lse = self.lse.gather(2, rows.index[:, None].expand(-1, H, -1)).masked_fill(~rows.real[:, None], torch.inf)
        q = (q_BHRD.float() * self.scaling).reshape(B * KV, -1, D)
        k = k_BKVKD.float().reshape(B * KV, K, D)
        scores = torch.baddbmm(-lse.reshape(B * KV, -1, 1), q, k.transpose(1, 2)).view(B, H, R, K)
        return self._masked_at(scores, rows, keys).exp_()

    def _masked_at(self, scores: Float[Tensor, "batch head row key"], rows: "Places", keys: "Places | None"):
        if self.mask is not None:
            mask = self.mask.expand(len(scores), *self.mask.shape[1:])
            mask = torch.stack([own[:, places] for own, places in zip(mask, rows.index, strict=True)])
            if keys is not None:
                mask = torch.stack([own[:, :, places] for own, places in zip(mask, keys.index, strict=True)])
            scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)
        elif self.causal:
            at = torch.arange(self.key.shape[2], device=scores.device)[None] if keys is None else keys.index
            scores = scores.masked_fill_((at[:, None] > rows.index[:, :, None])[:, None], -torch.inf)
        return scores if keys is None else scores.masked_fill_(~keys.real[:, None, None], -torch.inf)

    def rows(self, block: int = 16) -> Iterator[Rows]:
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


@dataclass(frozen=True)
class Places:
    """The positions of a segment's tokens, one row per example, filled up with 0 where an example has fewer; `real` tells which count."""

    index: Int[Tensor, "batch place"]
    real: Bool[Tensor, "batch place"]

    @classmethod
    def of(cls, segment: Bool[Tensor, "batch token"]) -> "Places":
        """Where the segment is, in order."""
        number = segment.sum(1, keepdim=True)
        index = (~segment).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(number.max())]
        real = torch.arange(index.shape[1], device=index.device) < number
        return cls(index.masked_fill(~real, 0), real)

    def blocks(self, size: int) -> Iterator["Places"]:
        """The same places, `size` at a time."""
        for start in range(0, self.index.shape[1], size):
            yield Places(self.index[:, start : start + size], self.real[:, start : start + size])


def _take(heads: Float[Tensor, "batch head token width"], index: Int[Tensor, "batch place"]) -> Float[Tensor, "batch head place width"]:
    if len(heads) == 1:
        return heads.index_select(2, index[0])
    return heads.gather(2, index[:, None, :, None].expand(-1, heads.shape[1], -1, heads.shape[3]))


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, causal: bool
) -> tuple[Float[Tensor, "batch query head width"], Float[Tensor, "batch head query"]] | None:
    """SDPA's fused CPU kernel with the log-sum-exp of each row, which the public function drops; None where it would not be chosen."""
    if query.device.type != "cpu" or value.shape[-1] != query.shape[-1]:
        return None
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output, lse = kernel(query, key, value, 0.0, causal, attn_mask=mask, scale=scaling)
    return output.transpose(1, 2).contiguous(), lse


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
    visitor = _visitor.get()
    if visitor is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    is_causal = kwargs["is_causal"] if kwargs.get("is_causal") is not None else getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    assert not causal or query.shape[2] == key.shape[2], "a causal step over a cache comes with a mask"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    found = attend(query, key, value, attention_mask, scale, causal)
    assert found is not None
    output, lse = found
    replaced = visitor(Attention(getattr(module, "layer_idx"), query, key, value, attention_mask, scale, causal, lse), output)  # noqa: B009
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
