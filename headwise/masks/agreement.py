"""How well masks agree with the truth, where both are known."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from scipy.optimize import linear_sum_assignment

from headwise.examples import CAPTION, EXAMPLES, INDEX, OBJECTS, OBJECTS_FILE
from headwise.files import read_table
from headwise.masks.exact import SOURCE
from headwise.masks.rle import ious, run_ends, union
from headwise.masks.table import read_masks, written_shards

MATCH = 0.5
"""IoU from which a mask counts as the object's, as COCO's first threshold."""


@dataclass(frozen=True)
class Agreement:
    """Usable key masks against the exact ones, example by example.

    The masks of an example are paired with its objects so that the sum of IoUs is highest. `mean_iou` is over all objects, one that got no
    mask counting 0; `precision` is the share of masks, `recall` that of objects, whose pair has an IoU of at least MATCH. `union_iou` is
    the mean over examples of the IoU of all masks together with all objects together, which is what heads are scored by.
    """

    examples: int
    objects: int
    masks: int
    mean_iou: float | None
    precision: float | None
    recall: float | None
    union_iou: float | None


def agreement(masks: pl.DataFrame, truth: pl.DataFrame) -> Agreement:
    """Compare two tables of masks.parquet on the examples of which the truth has a usable key object; a share of nothing is None."""
    found, real = (_by_example(table) for table in (masks, truth))
    pairs: list[np.ndarray] = []
    unions: list[float] = []
    for example_id, (height, width, objects) in real.items():
        _, _, own = found.get(example_id, (height, width, ()))
        overlaps = ious(own, objects, height, width)
        pairs.append(overlaps[linear_sum_assignment(overlaps, maximize=True)])
        together = ious([union(own, height, width)], [union(objects, height, width)], height, width) if own else np.zeros((1, 1))
        unions.append(float(together[0, 0]))
    num_objects = sum(len(objects) for _, _, objects in real.values())
    num_masks = sum(len(found[example_id][2]) for example_id in real if example_id in found)
    overlap = np.concatenate(pairs) if pairs else np.zeros(0)
    matched = int((overlap >= MATCH).sum())
    return Agreement(
        examples=len(real),
        objects=num_objects,
        masks=num_masks,
        mean_iou=_share(float(overlap.sum()), num_objects),
        precision=_share(matched, num_masks),
        recall=_share(matched, num_objects),
        union_iou=_share(sum(unions), len(unions)),
    )


def read_agreement(data: Path) -> Agreement | None:
    """The agreement of the generated masks in `data/masks` with the data set's own; None where either is missing."""
    shards = written_shards(data / "masks")
    if not shards or not (data / "images" / OBJECTS_FILE).is_file():
        return None
    masks = read_masks(shards)
    return None if SOURCE in masks["source"].unique() else agreement(masks, _truth(data / "images", masks))


def _truth(images: Path, masks: pl.DataFrame) -> pl.DataFrame:
    """The exact masks of the same examples, as `ExactMasks` would give them, without opening an image: its size is known."""
    examples = read_table(images / INDEX, EXAMPLES).select(pl.col("id").alias("example_id"), "image", "task", named="phrase")
    sizes = masks.select("example_id", "height", "width").unique("example_id")
    objects = read_table(images / OBJECTS_FILE, OBJECTS).filter(
        pl.struct("rle", "height", "width").map_elements(_fills, return_dtype=pl.Boolean)
    )
    own = examples.join(sizes, on="example_id").join(objects, on=["image", "height", "width"])
    captions = pl.col("named").is_null() & (pl.col("task") == CAPTION)
    return own.with_columns(key=captions | (pl.col("named") == pl.col("phrase")).fill_null(False), reason=pl.lit(None, pl.String))


def _fills(row: Mapping[str, object]) -> bool:
    try:
        run_ends(str(row["rle"]), int(str(row["height"])), int(str(row["width"])))
    except ValueError:
        return False
    return True


def _by_example(table: pl.DataFrame) -> dict[str, tuple[int, int, tuple[str, ...]]]:
    """Height, width and the usable key masks of each example, each once: an object may have several names."""
    usable = table.filter(pl.col("key") & pl.col("reason").is_null()).unique(["example_id", "rle"], keep="first", maintain_order=True)
    groups = usable.group_by("example_id", maintain_order=True).agg(pl.col("height", "width").first(), "rle")
    return {row["example_id"]: (row["height"], row["width"], tuple(row["rle"])) for row in groups.iter_rows(named=True)}


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None
