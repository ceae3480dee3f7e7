"""What one decoder layer computes its attention from, and any part of that attention, computed when it is asked for."""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headwise.attention.entries import Block, Closed, Entries

FUSED_KEYS, FUSED_ENTRIES = 128, 1 << 18
"""From how many keys, and entries of an example over all heads, on the compiled sums of `fused` are faster than blocks."""


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


@dataclass(frozen=True)
class FirstBias:
    """What is added to the scores of one key, the first real token of each example: log gamma in ZeroTuning (arXiv 2505.11739).

    is_zero: whether it is 0 everywhere, which may still carry gradients.
    """

    bias: Float[Tensor, "batch head"]
    first: Places
    is_zero: bool


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
    mask: Bool[Tensor, "#batch 1 query key"] | None
    scaling: float
    causal: bool
    softcap: float | None = None
    first_bias: FirstBias | None = None
    known_lse: Float[Tensor, "batch head query"] | None = None

    @property
    def tracked(self) -> bool:
        """Whether gradients flow to queries or keys."""
        return torch.is_grad_enabled() and (self.query.requires_grad or self.key.requires_grad)

    def lse(self, rows: Places) -> Float[Tensor, "batch head row"]:
        """log sum_j exp(score_ij) of these rows; with gradients where queries or keys have them, which no kernel gives."""
        if self.known_lse is not None and not self.tracked:
            return self.known_lse.gather(2, rows.index[:, None].expand(-1, self.query.shape[1], -1))
        every = self.entries(rows, with_lse=False)

        def of_rows(block: Block) -> Tensor:
            return every.scores(block).logsumexp(dim=-1)

        again: Any = partial(checkpoint, of_rows, use_reentrant=False, preserve_rng_state=False) if self.tracked else of_rows
        return torch.cat([again(block) for block in every.blocks(all_heads=True)], dim=2)

    def every_row(self) -> Places:
        """All queries."""
        return _every(len(self.query), self.query.shape[2], self.query.device)

    def closed(self, rows: Places, keys: Places | None = None) -> Closed | None:
        """Where a row may not attend to a key (None: all keys); None if each real row may attend to every real key."""
        return _closed(self.mask, self.causal, rows, keys, self.key.shape[2])

    def entries(self, rows: Places, keys: Places | None = None, *, with_lse: bool = True) -> Entries:
        """The attention of these rows to these keys (None: all keys), not computed yet. Rows that are filled up will be 0; a key that is
        filled up repeats the entry of position 0.
        """
        KV, columns = self.key.shape[1], self.key.shape[2]
        precise = torch.promote_types(self.query.dtype, torch.float32)
        query = take(self.query, rows.index).to(precise).unflatten(1, (KV, -1))
        key = (self.key if keys is None else take(self.key, keys.index)).to(precise)
        lse = self.lse(rows).masked_fill(~rows.real[:, None], torch.inf).unflatten(1, (KV, -1)) if with_lse else None
        bias = None
        if self.first_bias is not None:
            at = torch.arange(columns, device=key.device)[None] if keys is None else keys.index
            bias = (self.first_bias.bias.to(precise), at == self.first_bias.first.index)
        return Entries(query, key, lse, self.scaling, self.softcap, bias, self.closed(rows, keys))

    def probabilities(self, rows: Places, keys: Places | None = None) -> Float[Tensor, "batch head row key"]:
        """All of these entries at once, in fp32."""
        entries = self.entries(rows, keys)
        return torch.cat([entries.probabilities(block) for block in entries.blocks(all_heads=True)], dim=2)

    def column_sums(self, rows: Places, keys: Places) -> Float[Tensor, "batch head key"]:
        """sum_i A[i, j] over the rows, at these keys; 0 at keys that are filled up."""
        total = self.query.new_zeros(*self.query.shape[:2], keys.index.shape[1], dtype=torch.float32)
        closed = self.closed(rows, keys)
        if not total.numel() or not rows.index.numel() or (closed and closed.everywhere):
            return total
        if self.is_for_fused(rows, keys.index.shape[1]):
            from headwise.attention.fused import column_sums  # compiled when first imported

            for example in range(len(total)):
                part = self.part(example, rows, keys)
                total[example, :, : part.key.shape[1]] = column_sums(part)
        else:
            entries = self.entries(rows, keys)
            for block in entries.blocks():
                total[block.examples, block.heads, block.columns] += entries.probabilities(block).sum(2)
        return total.masked_fill_(~keys.real[:, None], 0)  # a key that is filled up may have had any score

    @property
    def is_plain(self) -> bool:
        """Whether `fused` can compute it: on a CPU, without cap, bias or gradients."""
        plain = self.softcap is None and self.first_bias is None and self.query.dtype != torch.float64
        return self.query.device.type == "cpu" and plain and not self.tracked

    def is_for_fused(self, rows: Places, num_keys: int) -> bool:
        """Whether these entries are for `fused`, and enough to be worth its start."""
        many = num_keys >= FUSED_KEYS and self.query.shape[1] * rows.index.shape[1] * num_keys >= FUSED_ENTRIES
        return self.is_plain and many

    def part(self, example: int, rows: Places, keys: Places | None = None) -> "Part":
        """What `fused` takes of one example."""
        at = rows.index[example][rows.real[example]]
        key, closed = self.key[example], self.closed(rows, keys)
        if keys is not None:
            key = _rows(key, keys.index[example][keys.real[example]])
        last = torch.zeros(len(at), 0, dtype=torch.bool)
        if closed is not None:
            last = closed.places[example, 0, : len(at), : max(key.shape[1] - closed.start, 0)]
        return Part(_rows(self.query[example], at), key, self.lse(rows)[example, :, : len(at)], last, self.scaling)


class Part(NamedTuple):
    """The attention of one example's rows to some keys, not computed yet. closed: where the last keys are closed to a row."""

    query: Float[Tensor, "head row width"]
    key: Float[Tensor, "kv_head key width"]
    lse: Float[Tensor, "head row"]
    closed: Bool[Tensor, "row closed_key"]
    scaling: float


def _rows(tensor: Tensor, at: Int[Tensor, "place"]) -> Tensor:
    """Places of the second axis, on a CPU without a copy where they follow one another (a GPU would have to be waited for to know)."""
    if at.is_cpu and len(at) and int(at[-1]) - int(at[0]) == len(at) - 1:
        return tensor[:, int(at[0]) : int(at[-1]) + 1]
    return tensor.index_select(1, at)


@lru_cache(maxsize=1)
def _every(examples: int, queries: int, device: torch.device) -> Places:
    index = torch.arange(queries, device=device).expand(examples, -1)
    return Places(index, torch.ones_like(index, dtype=torch.bool))


@lru_cache(maxsize=12)  # the layers of a pass share their masks
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
        return _rows(heads[0], index[0])[None]
    return heads.gather(2, index[:, None, :, None].expand(-1, heads.shape[1], -1, heads.shape[3]))


def forget_masks() -> None:
    """Let go of what was kept of the rows and masks of the last passes."""
    _every.cache_clear()
    _closed.cache_clear()
