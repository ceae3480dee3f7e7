"""Exact masks: the data set knows the pixels of every object, so nothing has to be segmented."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from headwise.examples import CAPTION, OBJECTS, OBJECTS_FILE, BadExample, Example
from headwise.files import read_table
from headwise.masks.annotation import Bad, Pictured, Row, annotate, as_frame
from headwise.masks.quality import bounding_box, rejection
from headwise.masks.rle import decode
from headwise.masks.settings import MaskQuality
from headwise.masks.table import NO_OBJECT

SOURCE = "exact"
PHRASELESS = f"{NO_OBJECT}: the example has no phrase and is no caption"


class ExactMasks:
    """The objects of the images' examples, from objects.parquet.

    An object is key if its phrase is the example's; for a caption without a phrase, which is about the whole image, every object is. Any
    other example without a phrase is about no object ("Is there a red circle?" - "no"). Bad is an example whose image has no objects, none
    of the phrase, or a mask of another size.
    """

    def __init__(self, folder: Path, quality: MaskQuality) -> None:
        """Raises ValueError if the data set has no objects.parquet."""
        if not (folder / OBJECTS_FILE).is_file():
            raise ValueError(f"{folder}: no {OBJECTS_FILE}, so this data set has no exact masks")
        self.quality = quality
        self.objects: defaultdict[str, list[Row]] = defaultdict(list)
        for row in read_table(folder / OBJECTS_FILE, OBJECTS).sort("image", "object").iter_rows(named=True):
            self.objects[row["image"]].append(row)

    def __call__(self, window: Sequence[Pictured], bad: Bad) -> list[Row]:
        """The rows of these examples; the reasons of the bad ones go into `bad`."""
        rows: list[Row] = []
        for pictured in window:
            described = self._described(pictured)
            for example in pictured.examples:
                try:
                    rows += _example_rows(example, pictured, described)
                except BadExample as error:
                    bad[example.id] = str(error)
        return rows

    def _described(self, pictured: Pictured) -> list[Row] | str:
        """The image's objects, or why they cannot be used, which each of its examples is told."""
        image = str(pictured.examples[0].image)
        try:
            if not self.objects[image]:
                raise BadExample(f"{image}: {OBJECTS_FILE} has no object of this image")
            return [_describe(row, pictured, self.quality) for row in self.objects[image]]
        except BadExample as error:
            return str(error)


def exact_masks(folder: Path, examples: Sequence[Example], quality: MaskQuality) -> tuple[pl.DataFrame, Bad]:
    """The rows of masks.parquet for these examples, and the bad ones with their reasons. Raises ValueError without an objects.parquet."""
    bad: Bad = {}
    frame = as_frame(annotate(ExactMasks(folder, quality), folder, examples, 1, bad, lambda _done, _all: None))
    return frame, bad


def _describe(row: Row, pictured: Pictured, quality: MaskQuality) -> Row:
    name, height, width = f"{row['image']}: object {row['object']} ({row['phrase']})", pictured.height, pictured.width
    if (row["height"], row["width"]) != (height, width):
        raise BadExample(f"{name}: the mask is {row['height']} x {row['width']}, the image {height} x {width} (height x width)")
    try:
        mask = decode(str(row["rle"]), height, width)
    except ValueError as error:
        raise BadExample(f"{name}: {error}") from error
    area = float(mask.mean())
    found = {"box": bounding_box(mask), "area": area, "source": SOURCE, "reason": rejection(quality, area)}
    return {**{key: row[key] for key in ("object", "phrase", "rle")}, **found}


def _example_rows(example: Example, pictured: Pictured, objects: list[Row] | str) -> list[Row]:
    if isinstance(objects, str):
        raise BadExample(objects)
    if example.phrase is None and example.task != CAPTION:
        return [pictured.row(example, key=False, source=SOURCE, reason=PHRASELESS)]
    rows = [pictured.row(example, key=example.phrase in (None, row["phrase"]), **row) for row in objects]
    if not any(row["key"] for row in rows):
        raise BadExample(f"{example.image}: no object is {example.phrase!r}, the image has {sorted({str(row['phrase']) for row in rows})}")
    return rows
