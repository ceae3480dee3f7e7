"""Sums over entries of attention on a CPU, each entry computed and added up in the registers: no score is written to memory.

With torch's operators the scores of a block go to the cache and back for every step (product, exponential, sums), which takes two to three
times as long. Shapes: H query head, KV key-value head, R row, C column, D width; G = H / KV query heads share a KV head's keys.
"""

import ctypes
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple, no_type_check

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from numba import config, njit
from torch import Tensor
from torch.nn.functional import pad

from headwise.attention.layer import Part
from headwise.files import cache_folder

config.CACHE_DIR = config.CACHE_DIR or str(cache_folder() / "numba")  # pyright: ignore[reportAttributeAccessIssue] - set at import
"""Where compiled kernels are kept; beside this file, numba's own choice, may be read-only."""

TILE = 256
"""Columns that are worked on together: their scores for 4 rows, and 4 of their coordinates, fit into a CPU's first cache."""
ROWS, BLOCK = 4, 32
"""Rows whose scores are computed together, and rows that a tile of keys serves before the next one is read."""
LOWEST, SMALLEST = np.float32(-126.0), np.float32(2.0**-126)
"""The lowest power of 2 that is a normal number, and that number."""
SOFT = 1
"""`omp_pause_soft` of the OpenMP 5.0 specification."""
FAST = {"contract", "reassoc", "nsz", "arcp"}
"""What LLVM may do with sums: fuse and reorder them. It may not assume that nothing is infinite."""


class Tiled(NamedTuple):
    """A `Part` as the kernels take it: powers of 2 for those of e, a multiple of 4 coordinates, keys in tiles that are filled up with 0.

    closed: where the last keys, from `start` on, are closed to a row.
    """

    query: Float32[np.ndarray, "head row width"]
    key: Float32[np.ndarray, "kv_head tile width place"]
    lse: Float32[np.ndarray, "head row"]
    closed: Bool[np.ndarray, "row closed_key"]
    start: int


@no_type_check
@njit(fastmath=FAST, nogil=True, inline="always")
def _exp2(scores: Any, powers: Any, bits: Any, twos: Any) -> None:
    """powers = 2^scores: the whole part goes into the bits of the exponent, the rest, in [-1/2, 1/2], through a polynomial (3e-7)."""
    for c in range(TILE):
        x = LOWEST if scores[c] < LOWEST else scores[c]  # so that what is no number stays none
        whole = np.floor(x + np.float32(0.5))
        part = x - whole
        tail = np.float32(0.0096181291) + part * (np.float32(0.0013333558) + part * np.float32(0.00015403530))
        tail = np.float32(0.69314718) + part * (np.float32(0.24022651) + part * (np.float32(0.055504109) + part * tail))
        powers[c] = np.float32(1) + part * tail
        bits[c] = (np.int32(whole) + np.int32(127)) << np.int32(23)
    for c in range(TILE):
        powers[c] = np.float32(0) if scores[c] < LOWEST else powers[c] * twos[c]


@no_type_check
@njit(fastmath=FAST, nogil=True, inline="always")
def _scores(query: Any, row: int, lse: Any, key: Any, scores: Any) -> None:
    """scores[i] = q_i k - lse_i of four rows from `row` on (the last one again where there are fewer) over a tile of columns."""
    last = len(query) - 1
    i, j, m, n = row, min(row + 1, last), min(row + 2, last), min(row + 3, last)
    a, b, e, f = scores[0], scores[1], scores[2], scores[3]
    for c in range(TILE):
        a[c], b[c], e[c], f[c] = -lse[i], -lse[j], -lse[m], -lse[n]
    for d in range(0, query.shape[1], 4):
        a0, a1, a2, a3 = query[i, d], query[i, d + 1], query[i, d + 2], query[i, d + 3]
        b0, b1, b2, b3 = query[j, d], query[j, d + 1], query[j, d + 2], query[j, d + 3]
        e0, e1, e2, e3 = query[m, d], query[m, d + 1], query[m, d + 2], query[m, d + 3]
        f0, f1, f2, f3 = query[n, d], query[n, d + 1], query[n, d + 2], query[n, d + 3]
        for c in range(TILE):
            k0, k1, k2, k3 = key[d, c], key[d + 1, c], key[d + 2, c], key[d + 3, c]
            a[c] += a0 * k0 + a1 * k1 + a2 * k2 + a3 * k3
            b[c] += b0 * k0 + b1 * k1 + b2 * k2 + b3 * k3
            e[c] += e0 * k0 + e1 * k1 + e2 * k2 + e3 * k3
            f[c] += f0 * k0 + f1 * k1 + f2 * k2 + f3 * k3


@no_type_check
@njit(fastmath=FAST, nogil=True, cache=True)
def _add_columns(part: Any, total: Any, thread: int, num_threads: int) -> None:
    """total[h, tile] = sum of A[h, :, tile], for every num_threads-th tile of a KV head."""
    query, key, lse, closed, start = part
    (H, R, _), (KV, tiles) = query.shape, key.shape[:2]
    scores, powers = np.empty((ROWS, TILE), np.float32), np.empty(TILE, np.float32)
    bits = np.empty(TILE, np.int32)
    twos, sums = bits.view(np.float32), np.empty(TILE, np.float32)
    for task in range(thread, KV * tiles, num_threads):
        kv, tile = task // tiles, task % tiles
        for h in range(kv * (H // KV), (kv + 1) * (H // KV)):
            sums[:] = 0
            for row in range(0, R, ROWS):
                _scores(query[h], row, lse[h], key[kv, tile], scores)
                for i in range(min(ROWS, R - row)):
                    _exp2(scores[i], powers, bits, twos)
                    _close(powers, closed[row + i], start, tile)
                    for c in range(TILE):
                        sums[c] += powers[c]
            total[h, tile] = sums


@no_type_check
@njit(fastmath=FAST, nogil=True, inline="always")
def _close(powers: Any, closed: Any, start: int, tile: int) -> None:
    """0 where the row may not attend; `closed` begins at column `start`, beyond its end everything is closed."""
    for c in range(max(start - tile * TILE, 0), TILE):
        at = tile * TILE + c - start
        if at >= len(closed) or closed[at]:
            powers[c] = 0


@no_type_check
@njit(fastmath=FAST, nogil=True, cache=True)
def _add_rows(part: Any, visual: Any, keys: Any, elsewhere: Any, highest: Any, thread: int, num_threads: int) -> None:
    """keys += A, elsewhere += A / its sum outside `visual`, there, highest += its maximum in it, for every num_threads-th block of rows."""
    query, key, lse, closed, start = part
    (H, R, _), (KV, tiles) = query.shape, key.shape[:2]
    scores, bits = np.empty((ROWS, TILE), np.float32), np.empty(TILE, np.int32)
    twos, powers = bits.view(np.float32), np.empty((BLOCK, tiles, TILE), np.float32)
    shares, tops = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    num_shown = visual.sum(axis=1)
    blocks = (R + BLOCK - 1) // BLOCK
    for task in range(thread, H * blocks, num_threads):
        h, first = task // blocks, task % blocks * BLOCK
        size = min(BLOCK, R - first)
        for tile in range(tiles):
            for row in range(0, size, ROWS):
                _scores(query[h], first + row, lse[h], key[h // (H // KV), tile], scores)
                for i in range(ROWS):
                    _exp2(scores[i], powers[row + i, tile], bits, twos)
        for i in range(size):
            shares[:] = 0
            tops[:] = 0
            for tile in range(tiles):
                own, shown = powers[i, tile], visual[tile]
                _close(own, closed[first + i], start, tile)
                if num_shown[tile] < TILE:
                    for c in range(TILE):
                        shares[c] += own[c] * (np.float32(1) - shown[c])
                if num_shown[tile] > 0:
                    for c in range(TILE):
                        tops[c] = max(tops[c], own[c] * shown[c])
            share = shares.sum()
            highest[h] += tops.max() + lse[h, first + i] * np.float32(0)  # no number if the row has one that is none
            weight = np.float32(1) / max(share, SMALLEST)
            for tile in range(tiles):
                own, shown, mine, theirs = powers[i, tile], visual[tile], keys[h, tile], elsewhere[h, tile]
                for c in range(TILE):
                    mine[c] += own[c]
                if num_shown[tile] < TILE:
                    for c in range(TILE):
                        theirs[c] += own[c] * (np.float32(1) - shown[c]) * weight


def column_sums(part: Part) -> Float[Tensor, "head key"]:
    """sum_i exp(q_i k_j * scaling - lse_i), but for the last keys where closed[i] says so."""
    tiled = _tiled(part)
    total = np.empty((len(part.query), *tiled.key.shape[1::2]), np.float32)
    _in_threads(lambda thread, threads: _add_columns(tiled, total, thread, threads))
    return _columns(total, part)


def row_sums(part: Part, visual: Bool[Tensor, "key"]) -> tuple[Float[Tensor, "head key"], Float[Tensor, "head key"], Float[Tensor, "head"]]:
    """With A as in `column_sums`: sum_i A[i, j]; at keys that are not visual, sum_i A[i, j] / (sum of A[i, j] over these keys), else 0;
    sum_i of the highest A[i, j] over the visual keys.
    """
    tiled = _tiled(part)
    shown = _tiles(visual.float()).numpy()
    keys, elsewhere = np.zeros((2, torch.get_num_threads(), len(part.query), *shown.shape), np.float32)
    highest = np.zeros(keys.shape[:2], np.float32)
    _in_threads(lambda own, threads: _add_rows(tiled, shown, keys[own], elsewhere[own], highest[own], own, threads))
    return _columns(keys.sum(0), part), _columns(elsewhere.sum(0), part), torch.from_numpy(highest.sum(0))


def _tiled(part: Part) -> Tiled:
    KV, C, D = part.key.shape
    fill, size = -D % 4, -C % TILE + C
    query = pad(part.query.float() * (part.scaling * math.log2(math.e)), (0, fill)).contiguous()
    tiles = torch.zeros(KV, size // TILE, D + fill, TILE)
    whole = C // TILE * TILE
    tiles[:, : whole // TILE, :D] = part.key[:, :whole].unflatten(1, (-1, TILE)).transpose(2, 3)
    if whole < C:
        tiles[:, -1, :D, : C - whole] = part.key[:, whole:].transpose(1, 2)
    lse = part.lse * math.log2(math.e)
    closed = part.closed.contiguous().numpy()
    return Tiled(query.numpy(), tiles.numpy(), lse.contiguous().numpy(), closed, C - closed.shape[1])


def _tiles(columns: Float[Tensor, "*other column"]) -> Float[Tensor, "*other tile place"]:
    """The columns in tiles, the last one filled up with 0."""
    return pad(columns, (0, -columns.shape[-1] % TILE)).unflatten(-1, (-1, TILE))


def _columns(tiles: Float32[np.ndarray, "head tile place"], part: Part) -> Float[Tensor, "head key"]:
    return torch.from_numpy(tiles).flatten(1)[:, : part.key.shape[1]]


def _in_threads(kernel: Callable[[int, int], None]) -> None:
    """The kernel's share for each of torch's threads, with the number of the thread and of all."""
    threads = torch.get_num_threads()
    _rest()
    others = [_pool(threads).submit(kernel, thread, threads) for thread in range(1, threads)]
    kernel(0, threads)
    for other in others:
        other.result()


def _rest() -> None:
    """Let torch's own threads go: they spin for milliseconds after each operator, on the cores that ours need. The next operator starts
    them again (GNU OpenMP, which torch brings on Linux; elsewhere they stay).
    """
    if (pause := _pause()) is not None:
        pause(SOFT)


@cache
def _pause() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL("libgomp.so.1").omp_pause_resource_all
    except (OSError, AttributeError):
        return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(threads - 1, 1))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # the threads stay with the parent
