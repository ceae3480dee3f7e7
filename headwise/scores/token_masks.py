"""The visual tokens that an example's objects cover: what a head that looks at them should look at."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import itemgetter

import numpy as np
import polars as pl
from jaxtyping import Bool

from headwise.layout import Layout, layout_name
from headwise.masks.rle import decode
from headwise.scores.head_impact import HeadImpact
from headwise.segments import coverage

ROUNDING = 1e-9
"""What a cell's coverage may lack through rounding and still count as reaching the threshold."""
NO_PLACE = "no place: the model's visual tokens are queries of a Q-Former, which lie nowhere in the image, so masks cannot be laid on them"
Pixels = tuple[int, int, tuple[str, ...]]
"""Height, width, and the run lengths of objects that are taken together."""


@dataclass(frozen=True)
class Target:
    """What a head should look at in one example: the image that is asked about, and the visual tokens that its objects cover."""

    image: str
    tokens: Bool[np.ndarray, "visual"]


@dataclass(frozen=True)
class Targets:
    """The examples that can be scored, sorted by id, and the reasons of the others, which begin with their cause and a colon.

    left_out: there is nothing to look at, as may well be: the question is about no object, its objects are smaller than the cells or were
    dropped by the masks step, the model saw no image, or its visual tokens have no place in it. bad: there should be a mask, but it is
    missing or unreadable.
    """

    examples: dict[str, Target]
    left_out: dict[str, str]
    bad: dict[str, str]

    @property
    def num_images(self) -> int:
        """Different images among the examples that can be scored."""
        return len({target.image for target in self.examples.values()})


def token_masks(masks: pl.DataFrame, layouts: Mapping[str, Layout | None], settings: HeadImpact) -> Targets:
    """The token mask of each example whose layout is given.

    A token is in the mask if the objects cover at least `mask_threshold` of its cell, together. An object that is smaller than the cells
    may reach that in none: with a threshold of one half some per cent of the questions are about such objects.
    """
    found = Targets({}, {}, {})
    usable, dropped = _pixels_by_example(masks, settings.mask_object)
    for example_id, layout in sorted(layouts.items(), key=itemgetter(0)):
        if layout is None:
            found.left_out[example_id] = "no image: the model saw none"
        elif not layout:
            found.left_out[example_id] = NO_PLACE
        elif example_id in usable:
            _lay(found, example_id, *usable[example_id], layout, settings.mask_threshold)
        elif example_id in dropped:
            found.left_out[example_id] = dropped[example_id]
        else:
            found.bad[example_id] = "missing mask: the example has no row in masks.parquet"
    return found


def _lay(found: Targets, example_id: str, image: str, pixels: Pixels, layout: Layout, mask_threshold: float) -> None:
    """Add the example's tokens, or why it has none."""
    try:
        tokens = _covered_tokens(pixels, layout, mask_threshold)
    except ValueError as error:
        found.bad[example_id] = f"unreadable mask: {error}"
        return
    if tokens.any():
        found.examples[example_id] = Target(image, tokens)
    else:
        share = f"mask_threshold = {mask_threshold:g}"
        found.left_out[example_id] = f"too small for the grid: the objects cover no token of {layout_name(layout)} up to {share}"


def _pixels_by_example(masks: pl.DataFrame, which: str) -> tuple[dict[str, tuple[str, Pixels]], dict[str, str]]:
    """The image and the usable objects' run lengths of each example; the reason where there is no object, or every one was dropped."""
    counts: defaultdict[str, list[str]] = defaultdict(list)
    places: dict[str, tuple[str, int, int]] = {}
    dropped: dict[str, str] = {}
    wanted = pl.col("key") | pl.col("object").is_null() if which == "key" else pl.lit(True)
    for row in masks.filter(wanted).sort("example_id", "object").iter_rows(named=True):
        if row["reason"] is None:
            places[row["example_id"]] = (row["image"], row["height"], row["width"])
            counts[row["example_id"]].append(row["rle"])
        else:
            reason = (
                row["reason"] if row["object"] is None else f"no usable mask: object {row['object']} ({row['phrase']}): {row['reason']}"
            )
            dropped.setdefault(row["example_id"], reason)
    return {i: (places[i][0], (*places[i][1:], tuple(rles))) for i, rles in counts.items()}, dropped


@lru_cache(maxsize=256)
def _covered_tokens(pixels: Pixels, layout: Layout, mask_threshold: float) -> Bool[np.ndarray, "visual"]:
    """The questions about one image mostly share their masks, and follow each other: each mask is laid on the layout once."""
    height, width, rles = pixels
    mask = reduce(np.logical_or, (decode(counts, height, width) for counts in rles))
    covered = coverage(mask, layout)
    return covered >= mask_threshold - ROUNDING if mask_threshold > 0 else covered > 0
