"""The seam: while a visitor is on, the decoder's attention shows it each layer's queries and keys and takes an output back if it gives one.

A function registered with transformers' AttentionInterface computes the layer's output with the kernel that SDPA chooses, which is the
model's own unless it was loaded with another implementation.
Shapes: B batch, H query head, KV key-value head, Q query, K key, D width, R chosen row, C chosen column.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from headwise.attention.kernels import attend
from headwise.attention.layer import Attention, FirstBias, forget_masks, take
from headwise.vlm import VLM

NAME = "headwise"
"""The attention implementation's name in transformers."""

Output = Float[Tensor, "batch query head value_width"]
Visitor = Callable[[Attention, Output], Tensor | None]
"""Called once per layer with the layer's output; what it returns, unless None, takes the output's place."""

Bias = Callable[[Attention], FirstBias]
"""From what a layer computes its attention from to what is added to its scores."""


@dataclass(frozen=True)
class _Visit:
    """The thread that a model is visited from, its visitors from the outermost on, and the bias, if there is one."""

    thread: int
    visitors: tuple[Visitor, ...]
    bias: Bias | None


_visits: dict[int, _Visit] = {}
"""By the identity of the language model's configuration, which all its layers hold: a layer finds its visitors from any thread, as it has
to where autograd runs checkpointed layers again in a thread of its own."""


def visited_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The layer's output, shown to the model's visitors. Raises ValueError on attention that is more than a softmax of scaled,
    capped and masked scores.
    """
    if unknown := [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise ValueError(f"{type(module).__name__} changes its attention scores by {unknown[0]}, which Headwise does not read")
    if dropout:
        raise ValueError(f"{type(module).__name__} drops attention at random (dropout {dropout:g}): call eval(), or set it to 0")
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ValueError(f"an attention mask of {attention_mask.dtype} in four dimensions: give one of ones and zeros per token")
    is_causal = kwargs["is_causal"] if kwargs.get("is_causal") is not None else getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    assert not causal or query.shape[2] == key.shape[2], "a causal step over a cache comes with a mask"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = getattr(module, "layer_idx")  # noqa: B009
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as SDPA itself would; what is read of it stays in fp32
        query, key, value = (heads.to(torch.get_autocast_dtype(device)) for heads in (query, key, value))
    visit = _visits[id(module.config)]
    with torch.autocast(device, enabled=False):
        attention, output = _computed(Attention(layer, query, key, value, attention_mask, scale, causal, softcap), module)
        with _exact_products():
            if visit.bias is not None:
                attention, output = _biased(attention, output, visit.bias(attention))
            for visitor in visit.visitors:
                replaced = visitor(attention, output)
                output = output if replaced is None else replaced
    return output, None


AttentionInterface.register(NAME, visited_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without it the mask is built for another kernel


def _computed(attention: Attention, module: nn.Module) -> tuple[Attention, Output]:
    """The layer's output, and the attention with what its kernel told of the rows."""
    plain = (attention.query, attention.key, attention.value, attention.mask)
    found = attend(*plain, attention.scaling, attention.causal) if attention.softcap is None else _capped(attention)
    if found is None:
        output, _ = sdpa_attention_forward(module, *plain, scaling=attention.scaling, is_causal=attention.causal)
        return attention, output
    return replace(attention, known_lse=found[1]), found[0].transpose(1, 2).contiguous()


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products of fp32 in fp32, also where the model's may be faster: an entry is the exponential of a score less the kernel's exact
    log-sum-exp.
    """
    backends: tuple[Any, Any] = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _capped(attention: Attention) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp block by block: no fused kernel of torch caps scores outside a compiled `flex_attention`."""
    group = attention.query.shape[1] // attention.key.shape[1]
    value = attention.value.repeat_interleave(group, dim=1)
    outputs, sums = list[Tensor](), list[Tensor]()
    every = attention.entries(attention.every_row(), with_lse=False)
    for block in every.blocks(all_heads=True):
        scores = every.scores(block)
        outputs.append(scores.softmax(dim=-1).to(value.dtype) @ value)
        sums.append(scores.detach().logsumexp(dim=-1))
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


def _biased(attention: Attention, output: Output, bias: FirstBias) -> tuple[Attention, Output]:
    """With a0 the attention to the first token and gamma = exp(bias): `o' = (o + (gamma-1) a0 v0) / (1 + (gamma-1) a0)`, which is what
    adding the bias to its score gives, on any kernel. Gradients through a0 are multiplied by gamma - 1, so at 0 they need not be followed.
    """
    source = attention if not bias.is_zero else replace(attention, query=attention.query.detach(), key=attention.key.detach())
    a0 = source.probabilities(attention.every_row(), bias.first)[..., 0]
    group = attention.query.shape[1] // attention.value.shape[1]
    v0 = take(attention.value, bias.first.index).to(a0.dtype).repeat_interleave(group, dim=1)
    gain = torch.expm1(bias.bias.to(a0.dtype))[:, :, None] * a0
    share = gain.transpose(1, 2)[..., None]
    changed = (output.to(a0.dtype) + share * v0.transpose(1, 2)) / (1 + share)
    lse = source.lse(attention.every_row()) + torch.log1p(gain)
    return replace(attention, first_bias=bias, known_lse=lse), changed.to(output.dtype)


@contextmanager
def visiting(vlm: VLM, visitor: Visitor, bias: Bias | None = None) -> Iterator[None]:
    """Show the decoder's attention to the visitor inside the block, after those of the blocks around it, with the first token's scores
    biased if so asked; afterwards the model's own implementation is back.

    Raises ValueError inside another bias, while another thread visits the model, and on a compiled model: its attention is a fixed program
    that no visitor reaches.
    """
    if any(isinstance(module, OptimizedModule) or getattr(module, "_compiled_call_impl", None) for module in vlm.model.modules()):
        raise ValueError("the model is compiled (torch.compile), so its attention cannot be read or edited: load it without")
    key = id(vlm.text_config)
    outer = _visits.get(key)
    if outer is not None and outer.thread != get_ident():
        raise ValueError("another thread reads or edits this model's attention: wait for it, or load the model again for this one")
    if outer is not None and outer.bias is not None and bias is not None:
        raise ValueError("the scores of the first token are biased already: add the two biases and set their sum")
    if outer is not None:
        _visits[key] = _Visit(outer.thread, (*outer.visitors, visitor), bias or outer.bias)
        try:
            yield
        finally:
            _visits[key] = outer
        return
    before = vlm.text_config._attn_implementation  # pyright: ignore[reportPrivateUsage] - there is no public one
    assert before is not None
    _visits[key] = _Visit(get_ident(), (visitor,), bias)
    try:
        set_implementation(vlm, NAME)
        yield
    finally:
        set_implementation(vlm, before)
        del _visits[key]
        forget_masks()


def set_implementation(vlm: VLM, name: str) -> None:
    """Choose the decoder's attention implementation and leave the vision tower's."""
    nested = vlm.text_config is not vlm.base.config
    vlm.base.set_attn_implementation({"text_config": name} if nested else name)
