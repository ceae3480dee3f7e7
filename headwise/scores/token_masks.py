"""The visual tokens that an example's objects cover: what a head that looks at them should look at."""

from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache, reduce

import numpy as np
import polars as pl
from jaxtyping import Bool

from headwise.masks.rle import decode
from headwise.scores.head_impact import HeadImpact
from headwise.segments import Grid, coverage

ROUNDING = 1e-9
"""What a cell's coverage may lack through rounding and still count as reaching the threshold."""
Pixels = tuple[int, int, tuple[str, ...]]


def token_masks(masks: pl.DataFrame, grids: Mapping[str, Grid], settings: HeadImpact) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The token mask (bool, one per visual token) of each example whose grid is given, sorted by id; and why the others have none.

    A token is in the mask if the objects cover at least `mask_threshold` of its cell, together. An object that is smaller than the cells
    may reach that in none: such an example is left out.
    """
    found: dict[str, np.ndarray] = {}
    left_out: dict[str, str] = {}
    usable, dropped = _pixels_by_example(masks, settings.mask_object)
    for example_id, grid in sorted(grids.items()):
        if 0 in grid:
            left_out[example_id] = "the model saw no image"
        elif example_id not in usable:
            left_out[example_id] = dropped.get(example_id, "it has no row in masks.parquet")
        else:
            tokens = _covered_tokens(usable[example_id], grid, settings.mask_threshold)
            if tokens.any():
                found[example_id] = tokens
            else:
                share = f"mask_threshold = {settings.mask_threshold:g}"
                left_out[example_id] = f"its objects cover no token of the {grid[0]} x {grid[1]} grid up to {share}"
    return found, left_out


def _pixels_by_example(masks: pl.DataFrame, which: str) -> tuple[dict[str, Pixels], dict[str, str]]:
    """The usable objects' run lengths of each example; the reason where every object in question was dropped."""
    counts: defaultdict[str, list[str]] = defaultdict(list)
    sizes: dict[str, tuple[int, int]] = {}
    dropped: dict[str, str] = {}
    for row in masks.filter(pl.col("key") if which == "key" else pl.lit(True)).sort("example_id", "object").iter_rows(named=True):
        if row["reason"] is not None:
            dropped.setdefault(row["example_id"], f"object {row['object']} ({row['phrase']}): {row['reason']}")
            continue
        sizes[row["example_id"]] = (row["height"], row["width"])
        counts[row["example_id"]].append(row["rle"])
    return {example_id: (*sizes[example_id], tuple(rles)) for example_id, rles in counts.items()}, dropped


@lru_cache(maxsize=256)
def _covered_tokens(pixels: Pixels, grid: Grid, mask_threshold: float) -> Bool[np.ndarray, "visual"]:
    """The questions about one image mostly share their masks, and follow each other: each mask is laid on the grid once."""
    height, width, rles = pixels
    mask = reduce(np.logical_or, (decode(counts, height, width) for counts in rles))
    covered = coverage(mask, grid)
    return covered >= mask_threshold - ROUNDING if mask_threshold > 0 else covered > 0
