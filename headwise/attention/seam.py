"""The seam: while a visitor is on, the decoder's attention shows it each layer's queries and keys and takes an output back if it gives one.

A function registered with transformers' AttentionInterface computes the layer's output with the kernel that the model uses by itself.
Shapes: B batch, H query head, KV key-value head, Q query, K key, D width, R chosen row, C chosen column.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from headwise.attention.kernels import attend
from headwise.vlm import VLM

NAME = "headwise"
"""The attention implementation's name in transformers."""

LOWEST = torch.finfo(torch.float32).min
"""The score of what is masked: finite, so that a row of padding, which may attend to nothing, becomes uniform and not NaN."""

BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
"""How much of a block of attention scores is held at once: about what a CPU's cache takes, enough work for a GPU."""


@dataclass(frozen=True)
class Places:
    """Some positions of each example, filled up with 0 where an example has fewer; `real` tells which count."""

    index: Int[Tensor, "batch place"]
    real: Bool[Tensor, "batch place"]

    @classmethod
    def of(cls, segment: Bool[Tensor, "batch token"]) -> "Places":
        """Where the segment is, in order."""
        number = segment.sum(1, keepdim=True)
        index = (~segment).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(number.max())]
        real = torch.arange(index.shape[1], device=index.device) < number
        return cls(index.masked_fill(~real, 0), real)

    def blocks(self, size: int) -> tuple["Places", ...]:
        """The same places, `size` at a time."""
        return _blocks(self, size)


@lru_cache(maxsize=64)  # the layers of a pass read the same rows
def _blocks(places: Places, size: int) -> tuple[Places, ...]:
    starts = range(0, places.index.shape[1], size)
    return tuple(Places(places.index[:, at : at + size], places.real[:, at : at + size]) for at in starts)


@dataclass(frozen=True)
class FirstBias:
    """What is added to the scores of one key, the first real token of each example: log gamma in ZeroTuning (arXiv 2505.11739)."""

    bias: Float[Tensor, "batch head"]
    first: Int[Tensor, "batch"]


@dataclass(frozen=True)
class Attention:
    """What one decoder layer computes its attention from.

    mask: where a query may attend, None = see `causal`. softcap: scores are c * tanh(score / c) (Gemma 2). known_lse: the kernel's
    log-sum-exp of each row, None if it gave none.
    """

    layer: int
    query: Float[Tensor, "batch head query width"]
    key: Float[Tensor, "batch kv_head key width"]
    value: Float[Tensor, "batch kv_head key value_width"]
    mask: Bool[Tensor, "#batch #head query key"] | None
    scaling: float
    causal: bool
    softcap: float | None = None
    first_bias: FirstBias | None = None
    known_lse: Float[Tensor, "batch head query"] | None = None

    @cached_property
    def lse(self) -> Float[Tensor, "batch head query"]:
        """log sum_j exp(score_ij) of every row, in fp32; with gradients where queries or keys have them, which no kernel gives."""
        tracked = torch.is_grad_enabled() and (self.query.requires_grad or self.key.requires_grad)
        if self.known_lse is not None and not tracked:
            return self.known_lse

        def of_rows(rows: Places) -> Tensor:
            return torch.logsumexp(self.scores(rows), dim=-1)

        blocks = self.every_row().blocks(self.block_rows(self.key.shape[2]))
        return torch.cat([checkpoint(of_rows, rows, use_reentrant=False) if tracked else of_rows(rows) for rows in blocks], dim=2)

    def every_row(self) -> Places:
        """All queries."""
        index = torch.arange(self.query.shape[2], device=self.query.device).expand(len(self.query), -1)
        return Places(index, torch.ones_like(index, dtype=torch.bool))

    def block_rows(self, keys: int) -> int:
        """How many rows of this many keys are held at once."""
        return max(1, BLOCK_BYTES[self.query.device.type] // (4 * self.query.shape[0] * self.query.shape[1] * max(1, keys)))

    def probabilities(self, rows: Places, keys: Places | None = None) -> Float[Tensor, "batch head row key"]:
        """`exp(score - lse)` in fp32 at these rows and keys (None: all keys); 0 in rows that are filled up.

        With the log-sum-exp of its row an entry needs no other entry (Dao et al. 2022, arXiv 2205.14135, alg. 1). A key that is filled
        up repeats the entry of position 0.
        """
        lse = self.lse.gather(2, rows.index[:, None].expand(-1, self.query.shape[1], -1))
        return self.scores(rows, keys, lse.masked_fill(~rows.real[:, None], torch.inf)).exp_()

    def scores(
        self, rows: Places, keys: Places | None = None, less: Float[Tensor, "batch head row"] | None = None
    ) -> Float[Tensor, "batch head row key"]:
        """`q k^T * scaling` in fp32 (or fp64), capped, biased and masked, minus `less`. Grouped keys are not repeated: the query heads of
        a group are further rows of the same product.
        """
        B, H, _, D = self.query.shape
        KV = self.key.shape[1]
        precise = torch.promote_types(self.query.dtype, torch.float32)
        q = (take(self.query, rows.index).to(precise) * self.scaling).reshape(B * KV, -1, D)
        k = (self.key if keys is None else take(self.key, keys.index)).to(precise).reshape(B * KV, -1, D).transpose(1, 2)
        start = None if less is None else -less.reshape(B * KV, -1, 1)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(torch.bmm(q, k) / self.softcap)
            scores = scores if start is None else scores + start
        else:
            scores = torch.bmm(q, k) if start is None else torch.baddbmm(start, q, k)
        scores = scores.view(B, H, rows.index.shape[1], k.shape[2])
        if self.first_bias is not None:
            at = torch.arange(k.shape[2], device=k.device)[None] if keys is None else keys.index
            is_first = (at == self.first_bias.first[:, None])[:, None, None]
            scores = scores + is_first * self.first_bias.bias[:, :, None, None]
        closed = self.closed(rows, keys)
        if closed is not None:
            scores[..., closed.start :].masked_fill_(closed.places, LOWEST)
        return scores

    def closed(self, rows: Places, keys: Places | None) -> "Closed | None":
        """Where a row may not attend to a key; None if each real row may attend to every real key."""
        return _closed(self.mask, self.causal, rows, keys, self.key.shape[2])


@dataclass(frozen=True)
class Closed:
    """Where rows may not attend, from the first such key on. everywhere: no real row may attend to any real key."""

    start: int
    places: Bool[Tensor, "batch #head row key"]
    everywhere: bool


@lru_cache(maxsize=1024)  # the layers of a pass share their masks
def _closed(mask: Tensor | None, causal: bool, rows: Places, keys: Places | None, num_keys: int) -> Closed | None:
    every = torch.arange(num_keys, device=rows.index.device)[None]
    if mask is not None:
        mask = mask.expand(len(rows.index), *mask.shape[1:])
        columns = every.expand(len(rows.index), -1) if keys is None else keys.index
        closed = ~torch.stack([own[:, r[:, None], c] for own, r, c in zip(mask, rows.index, columns, strict=True)])
    elif causal:
        closed = ((every if keys is None else keys.index)[:, None] > rows.index[:, :, None])[:, None]
    else:
        return None
    counts = rows.real[:, None, :, None] if keys is None else rows.real[:, None, :, None] & keys.real[:, None, None]
    if not bool((closed & counts).any()):
        return None
    start = int(closed.any(dim=(0, 1, 2)).to(torch.uint8).argmax())
    return Closed(start, closed[..., start:].contiguous(), everywhere=not bool((~closed & counts).any()))


def take(heads: Float[Tensor, "batch head token width"], index: Int[Tensor, "batch place"]) -> Float[Tensor, "batch head place width"]:
    """Each example's tokens at its places."""
    if len(heads) == 1:
        return heads.index_select(2, index[0])
    return heads.gather(2, index[:, None, :, None].expand(-1, heads.shape[1], -1, heads.shape[3]))


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
    for rows in attention.every_row().blocks(attention.block_rows(attention.key.shape[2])):
        scores = attention.scores(rows)
        outputs.append(scores.softmax(dim=-1).to(value.dtype) @ value)
        sums.append(scores.detach().logsumexp(dim=-1))
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


def _biased(attention: Attention, output: Output, bias: FirstBias) -> tuple[Attention, Output]:
    """With a0 the attention to the first token and gamma = exp(bias): `o' = (o + (gamma-1) a0 v0) / (1 + (gamma-1) a0)`, which is what
    adding the bias to its score gives, on any kernel. Gradients through a0 are multiplied by gamma - 1, so at 0 they need not be followed.
    """
    first = Places(bias.first[:, None], torch.ones_like(bias.first[:, None], dtype=torch.bool))
    source = attention if bool(bias.bias.any()) else replace(attention, query=attention.query.detach(), key=attention.key.detach())
    a0 = source.probabilities(attention.every_row(), first)[..., 0]
    group = attention.query.shape[1] // attention.value.shape[1]
    v0 = take(attention.value, first.index).to(a0.dtype).repeat_interleave(group, dim=1)
    gain = torch.expm1(bias.bias.to(a0.dtype))[:, :, None] * a0
    share = gain.transpose(1, 2)[..., None]
    changed = (output.to(a0.dtype) + share * v0.transpose(1, 2)) / (1 + share)
    lse = source.lse + torch.log1p(gain.detach())
    return replace(attention, first_bias=bias, known_lse=lse), changed.to(output.dtype)


@contextmanager
def visiting(vlm: VLM, visitor: Visitor, bias: Callable[[int, Tensor], FirstBias] | None = None) -> Iterator[None]:
    """Show the decoder's attention to the visitor inside the block, after those of the blocks around it, with the first token's scores
    biased if so asked; afterwards the model's own implementation is back.

    bias: from a layer and its queries to what is added. Raises ValueError inside another bias, and on a compiled model: its attention
    is a fixed program that no visitor reaches.
    """
    if any(isinstance(module, OptimizedModule) or getattr(module, "_compiled_call_impl", None) for module in vlm.model.modules()):
        raise ValueError("the model is compiled (torch.compile), so its attention cannot be read or edited: load it without")
    if bias is not None and _first_bias.get() is not None:
        raise ValueError("the scores of the first token are biased already: add the two biases and set their sum")
    before = vlm.text_config._attn_implementation  # pyright: ignore[reportPrivateUsage] - there is no public one
    assert before is not None
    set_implementation(vlm, NAME)
    visitors = _visitors.set((*_visitors.get(), visitor))
    biases = _first_bias.set(bias or _first_bias.get())
    try:
        yield
    finally:
        _visitors.reset(visitors)
        _first_bias.reset(biases)
        set_implementation(vlm, before)
        _closed.cache_clear()
        _blocks.cache_clear()


def set_implementation(vlm: VLM, name: str) -> None:
    """Choose the decoder's attention implementation and leave the vision tower's."""
    nested = vlm.text_config is not vlm.base.config
    vlm.base.set_attn_implementation({"text_config": name} if nested else name)
