"""The seam: while a visitor is on, the decoder's attention shows it each layer's queries and keys and takes an output back if it gives one.

A function registered with transformers' AttentionInterface computes the layer's output with the kernel that the model uses by itself.
Shapes: B batch, H query head, KV key-value head, Q query, K key, D width, R chosen row, C chosen column.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
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

_visitors: ContextVar[tuple[Visitor, ...]] = ContextVar("visitors", default=())
_first_bias: ContextVar[Callable[[int, Tensor], FirstBias] | None] = ContextVar("first_bias", default=None)


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
    """The layer's output, shown to the visitors of this context. Raises ValueError on attention that is more than a softmax of scaled,
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
    with torch.autocast(device, enabled=False):
        attention, output = _computed(Attention(layer, query, key, value, attention_mask, scale, causal, softcap), module)
        for visitor in _visitors.get():
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
    else:
        output, attention = found[0].transpose(1, 2).contiguous(), replace(attention, known_lse=found[1])
    bias = _first_bias.get()
    return (attention, output) if bias is None else _biased(attention, output, bias(attention.layer, attention.query))


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
    source = attention if bool(bias.bias.any()) else replace(attention, query=attention.query.detach(), key=attention.key.detach())
    a0 = source.probabilities(attention.every_row(), bias.first)[..., 0]
    group = attention.query.shape[1] // attention.value.shape[1]
    v0 = take(attention.value, bias.first.index).to(a0.dtype).repeat_interleave(group, dim=1)
    gain = torch.expm1(bias.bias.to(a0.dtype))[:, :, None] * a0
    share = gain.transpose(1, 2)[..., None]
    changed = (output.to(a0.dtype) + share * v0.transpose(1, 2)) / (1 + share)
    lse = source.lse + torch.log1p(gain)
    return replace(attention, first_bias=bias, known_lse=lse), changed.to(output.dtype)


@contextmanager
def visiting(vlm: VLM, visitor: Visitor, bias: Callable[[int, Tensor], FirstBias] | None = None) -> Iterator[None]:
    """Show the decoder's attention to the visitor inside the block, after those of the blocks around it, with the first token's scores
    biased if so asked; afterwards the model's own implementation is back.

    bias: from a layer and its queries to what is added. Raises ValueError inside another bias, while another thread visits the model, and
    on a compiled model: its attention is a fixed program that no visitor reaches.
    """
    if any(isinstance(module, OptimizedModule) or getattr(module, "_compiled_call_impl", None) for module in vlm.model.modules()):
        raise ValueError("the model is compiled (torch.compile), so its attention cannot be read or edited: load it without")
    if bias is not None and _first_bias.get() is not None:
        raise ValueError("the scores of the first token are biased already: add the two biases and set their sum")
    before = vlm.text_config._attn_implementation  # pyright: ignore[reportPrivateUsage] - there is no public one
    assert before is not None
    if before == NAME and not _visitors.get():
        raise ValueError("another thread reads or edits this model's attention: wait for it, or load the model again for this one")
    set_implementation(vlm, NAME)
    visitors = _visitors.set((*_visitors.get(), visitor))
    biases = _first_bias.set(bias or _first_bias.get())
    try:
        yield
    finally:
        _visitors.reset(visitors)
        _first_bias.reset(biases)
        set_implementation(vlm, before)
        forget_masks()


def set_implementation(vlm: VLM, name: str) -> None:
    """Choose the decoder's attention implementation and leave the vision tower's."""
    nested = vlm.text_config is not vlm.base.config
    vlm.base.set_attn_implementation({"text_config": name} if nested else name)
