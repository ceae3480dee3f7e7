"""Scaled dot-product attention with the log-sum-exp of each row of scores, which torch's public function computes and drops.

Shapes: B batch, H query head, KV key-value head, Q query, K key, D width.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

Attended = tuple[Float[Tensor, "batch head query width"], Float[Tensor, "batch head query"]]
ATEN = torch.ops.aten
NUM_ALIGNED = 8
"""CUDA's kernels take widths and rows of a mask in multiples of this."""


def attend(
    query: Float[Tensor, "batch head query width"],
    key: Float[Tensor, "batch kv_head key width"],
    value: Float[Tensor, "batch kv_head key value_width"],
    mask: Bool[Tensor, "#batch #head query key"] | None,
    scaling: float,
    causal: bool,
) -> Attended | None:
    """`softmax(q k^T * scaling + mask) v` and `logsumexp(q k^T * scaling + mask)` from the fused kernel that SDPA would choose.

    The output is SDPA's to the last bit: it is the same kernel on the same inputs. None where SDPA has no fused kernel for these inputs.
    """
    if value.shape[-1] != query.shape[-1]:
        return None
    if query.is_cuda and mask is not None:  # as transformers does: with a mask CUDA's kernels know no grouped heads
        key, value = (heads.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for heads in (key, value))
    added = None if mask is None else additive(mask, query.dtype)
    choice = ATEN._fused_sdp_choice(query, key, value, added, 0.0, causal, scale=scaling, enable_gqa=True)
    kernel = KERNELS.get((query.device.type, choice))
    return None if kernel is None else kernel(query, key, value, added, scaling, causal)


def additive(mask: Bool[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """0 where a query may attend, minus infinity elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def _flash_cpu(query: Tensor, key: Tensor, value: Tensor, added: Tensor | None, scaling: float, causal: bool) -> Attended:
    return ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, attn_mask=added, scale=scaling)


def _flash_cuda(query: Tensor, key: Tensor, value: Tensor, added: Tensor | None, scaling: float, causal: bool) -> Attended:
    width = -query.shape[-1] % NUM_ALIGNED
    padded = [pad(heads, (0, width)) if width else heads for heads in (query, key, value)]
    output, lse, *_ = ATEN._scaled_dot_product_flash_attention(*padded, 0.0, causal, False, scale=scaling)
    return output[..., : value.shape[-1]], lse[..., : query.shape[2]]


def _efficient_cuda(query: Tensor, key: Tensor, value: Tensor, added: Tensor | None, scaling: float, causal: bool) -> Attended:
    if added is not None:
        keys = added.shape[-1]
        added = pad(added, (0, -keys % NUM_ALIGNED))[..., :keys].expand(*query.shape[:2], -1, -1)
    output, lse, *_ = ATEN._scaled_dot_product_efficient_attention(query, key, value, added, True, 0.0, causal, scale=scaling)
    return output, lse[..., : query.shape[2]]


def _cudnn_cuda(query: Tensor, key: Tensor, value: Tensor, added: Tensor | None, scaling: float, causal: bool) -> Attended:
    """What torch prefers on Hopper and Blackwell."""
    output, lse, *_ = ATEN._scaled_dot_product_cudnn_attention(query, key, value, added, True, 0.0, causal, False, scale=scaling)
    return output, lse[..., 0] if lse.ndim == 4 else lse


KERNELS: dict[tuple[str, int], Callable[[Tensor, Tensor, Tensor, Tensor | None, float, bool], Attended]] = {
    ("cpu", 1): _flash_cpu,
    ("cuda", 1): _flash_cuda,
    ("cuda", 2): _efficient_cuda,
    ("cuda", 3): _cudnn_cuda,
}
"""By device and `torch.nn.attention.SDPBackend`."""
