"""Entries of one layer's attention, computed block by block from queries, keys and the log-sum-exp of each row.

Shapes: B batch, H query head, KV key-value head, G query heads per KV head, R row, C column, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MASKED = torch.finfo(torch.float32).min
"""The score of what is masked: finite, so that the softmax of a row of padding, which may attend to nothing, is not NaN."""

GPU_BLOCK = 256 << 20
BLOCK_BYTES = {"cpu": 4 << 20}
"""How much of the scores is held at once: about what a CPU's cache takes, enough work for a GPU."""
BLOCK_COLUMNS = 1024
"""Keys in a block, unless whole rows are needed."""


@dataclass(frozen=True)
class Closed:
    """Where rows may not attend, from the first such key on. everywhere: no real row may attend to any real key."""

    start: int
    places: Bool[Tensor, "batch 1 row key"]
    everywhere: bool


@dataclass(frozen=True)
class Block:
    """Which examples, KV heads with their query heads, rows and columns of some entries are computed together."""

    examples: slice
    kv_heads: slice
    heads: slice
    rows: slice
    columns: slice


@dataclass(frozen=True)
class Entries:
    """Some rows and keys of a layer's attention, from which blocks of it are computed in fp32 (or fp64).

    With the log-sum-exp of its row an entry needs no other entry: `exp(score - lse)` (Dao et al. 2022, arXiv 2205.14135, alg. 1). Grouped
    keys are not repeated, unless they are few: the query heads of a group are further rows of the same product. bias: for each head, and at
    which keys it is added.
    """

    query: Float[Tensor, "batch kv_head group row width"]
    key: Float[Tensor, "batch kv_head key width"]
    lse: Float[Tensor, "batch kv_head group row"] | None
    scaling: float
    softcap: float | None
    bias: tuple[Float[Tensor, "batch head"], Bool[Tensor, "batch key"]] | None
    closed: Closed | None

    def blocks(self, *, whole_rows: bool = False, all_heads: bool = False) -> Iterator[Block]:
        """Blocks of about `BLOCK_BYTES` that cover the entries: of one KV head if that fills them, of more if not."""
        B, KV, G, R, _ = self.query.shape
        C = self.key.shape[2]
        most = BLOCK_BYTES.get(self.query.device.type, GPU_BLOCK) // self.query.element_size()
        columns = C if whole_rows or all_heads or self.query.device.type != "cpu" else min(C, BLOCK_COLUMNS)
        kv_heads = KV if all_heads else min(max(most // (G * R * columns), 1), KV)
        examples = B if all_heads else min(max(most // (KV * G * R * columns), 1), B)
        rows = max(most // (examples * kv_heads * G * columns), 1)
        steps = ((B, examples), (KV, kv_heads), (R, rows), (C, columns))
        for parts in product(*([slice(at, min(at + step, size)) for at in range(0, size, step)] for size, step in steps)):
            own, kv, r, c = parts
            yield Block(own, kv, slice(kv.start * G, kv.stop * G), r, c)

    def scores(self, block: Block) -> Float[Tensor, "batch head row key"]:
        """`q k^T * scaling`, capped, biased and masked, minus the log-sum-exp if it is known."""
        q = self.query[block.examples, block.kv_heads, :, block.rows]
        k = self.key[block.examples, block.kv_heads, block.columns]
        B, KV, G, R, D = q.shape
        few_keys = k.shape[2] < R
        if few_keys:  # a key for each of its query heads is less to copy than the queries of a group under one another
            k = k.repeat_interleave(G, dim=1)
        products, rows = (B * KV * G, R) if few_keys else (B * KV, G * R)
        q, k = q.reshape(products, rows, D), k.reshape(products, -1, D).transpose(1, 2)
        lse = q.new_zeros(()) if self.lse is None else self.lse[block.examples, block.kv_heads, :, block.rows].reshape(products, rows, 1)
        if self.softcap is None:
            scores = torch.baddbmm(lse, q, k, beta=-1, alpha=self.scaling)
        else:
            scores = self.softcap * torch.tanh(torch.baddbmm(lse, q, k, beta=0, alpha=self.scaling / self.softcap)) - lse
        scores = scores.view(B, KV * G, R, -1)
        if self.bias is not None:
            bias, is_first = self.bias
            scores = scores + bias[block.examples, block.heads, None, None] * is_first[block.examples, None, None, block.columns]
        if self.closed is not None and block.columns.stop > self.closed.start:
            start = max(block.columns.start, self.closed.start)
            columns = slice(start - self.closed.start, block.columns.stop - self.closed.start)
            closed = self.closed.places[block.examples, :, block.rows, columns]
            scores[..., start - block.columns.start :].masked_fill_(closed, MASKED)
        return scores

    def probabilities(self, block: Block) -> Float[Tensor, "batch head row key"]:
        """`exp(score - lse)`."""
        assert self.lse is not None
        return self.scores(block).exp_()
