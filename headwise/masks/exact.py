"""Exact masks: the data set knows the pixels of every object, so nothing has to be segmented."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa

from headwise.examples import CAPTION, OBJECTS, OBJECTS_FILE, BadExample, Example, check_bad_share, open_image
from headwise.files import read_table
from headwise.masks.quality import MaskQuality, bounding_box, rejection
from headwise.masks.rle import decode
from headwise.masks.table import MASKS

SOURCE = "exact"
NO_OBJECT = "no object is meant: the example has no phrase and is no caption"
Row = dict[str, object]


def exact_masks(folder: Path, examples: Sequence[Example], quality: MaskQuality) -> tuple[pl.DataFrame, dict[str, str]]:
    """The examples' objects as rows of masks.parquet, sorted by example and object, and the bad examples with their reasons.

    An object is key if its phrase is the example's; for a caption without a phrase, which is about the whole image, every object is. Any
    other example without a phrase is about no object ("Is there a red circle?" - "no"). Bad is an example whose image is missing or
    broken, has no objects, none of the phrase, or a mask of another size; the image is opened for its size.
    Raises ValueError if the data set has no objects.parquet, or more than `max_bad_share` of the examples is bad.
    """
    objects = _objects_by_image(folder)
    rows: list[Row] = []
    bad: dict[str, str] = {}
    described: dict[str, list[Row] | str] = {}
    for example in sorted(examples, key=lambda example: example.id):
        try:
            if example.image is None:
                raise BadExample("no image, so no objects")
            if example.image not in described:
                described[example.image] = _describe_or_reason(folder, example, objects[example.image], quality)
            rows += _example_rows(example, described[example.image])
        except BadExample as error:
            bad[example.id] = str(error)
    check_bad_share(bad, len(examples), quality.max_bad_share)
    frame = pl.from_arrow(pa.Table.from_pylist(rows, schema=MASKS))
    assert isinstance(frame, pl.DataFrame)
    return frame, bad


def _objects_by_image(folder: Path) -> defaultdict[str, list[Row]]:
    if not (folder / OBJECTS_FILE).is_file():
        raise ValueError(f"{folder}: no {OBJECTS_FILE}, so this data set has no exact masks")
    objects: defaultdict[str, list[Row]] = defaultdict(list)
    for row in read_table(folder / OBJECTS_FILE, OBJECTS).sort("image", "object").iter_rows(named=True):
        objects[row["image"]].append(row)
    return objects


def _describe_or_reason(folder: Path, example: Example, objects: list[Row], quality: MaskQuality) -> list[Row] | str:
    """The image's objects, or why they cannot be used: an image is read once, and each of its examples is told."""
    try:
        width, height = open_image(folder, example).size
        if not objects:
            raise BadExample(f"{example.image}: {OBJECTS_FILE} has no object of this image")
        return [_describe(row, height, width, quality) for row in objects]
    except BadExample as error:
        return str(error)


def _describe(row: Row, height: int, width: int, quality: MaskQuality) -> Row:
    name = f"{row['image']}: object {row['object']} ({row['phrase']})"
    if (row["height"], row["width"]) != (height, width):
        raise BadExample(f"{name}: the mask is {row['height']} x {row['width']}, the image {height} x {width} (height x width)")
    try:
        mask = decode(str(row["rle"]), height, width)
    except ValueError as error:
        raise BadExample(f"{name}: {error}") from error
    area = float(mask.mean())
    found = {"box": bounding_box(mask), "area": area, "predicted_iou": None, "source": SOURCE, "reason": rejection(area, quality)}
    return {**{key: row[key] for key in ("object", "phrase", "height", "width", "rle")}, **found}


def _example_rows(example: Example, objects: list[Row] | str) -> list[Row]:
    if isinstance(objects, str):
        raise BadExample(objects)
    own: Row = {"example_id": example.id, "image": example.image}
    if example.phrase is None and example.task != CAPTION:
        size = {name: objects[0][name] for name in ("height", "width")}
        return [{**own, **size, "key": False, "source": SOURCE, "reason": NO_OBJECT}]
    rows = [{**row, **own, "key": example.phrase in (None, row["phrase"])} for row in objects]
    if not any(row["key"] for row in rows):
        raise BadExample(f"{example.image}: no object is {example.phrase!r}, the image has {sorted({str(row['phrase']) for row in rows})}")
    return rows
