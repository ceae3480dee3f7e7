"""From examples to rows of masks.parquet, a few images at a time, whoever makes the masks."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
from PIL import Image

from headwise.examples import BadExample, Example, open_image
from headwise.masks.table import MASKS

LONGEST_SIDE = 2048
"""Pixels; no model here looks at more than 1,024, and 64 photographs of 100 megapixels would not fit into memory."""
Row = dict[str, object]
Bad = dict[str, str]
"""The reasons of the examples that cannot be used, by id."""


@dataclass(frozen=True)
class Pictured:
    """An image and the examples about it. `height` and `width` are its own; `image` is smaller where its longest side exceeds
    LONGEST_SIDE.
    """

    image: Image.Image
    height: int
    width: int
    examples: tuple[Example, ...]

    def row(self, example: Example, **values: object) -> Row:
        """A row of masks.parquet; what is not given is null."""
        same: Row = {"example_id": example.id, "image": example.image, "height": self.height, "width": self.width}
        return {**dict.fromkeys(MASKS.names), **same, **values}


Annotator = Callable[[Sequence[Pictured], Bad], list[Row]]
"""Gives the rows of some images' examples, in their order; an example that cannot be used becomes an entry of Bad instead."""


def annotate(
    annotator: Annotator, folder: Path, examples: Sequence[Example], at_once: int, bad: Bad, show: Callable[[int, int], object]
) -> Iterator[pa.Table]:
    """Tables in the order of image, example and object; `at_once` images are in memory together, and `show` hears (done, all) of them."""
    images = by_image(examples, bad)
    for start in range(0, len(images), at_once):
        show(start, len(images))
        window = [opened for own in images[start : start + at_once] if (opened := _open(folder, own, bad))]
        yield pa.Table.from_pylist(annotator(window, bad), schema=MASKS)
    show(len(images), len(images))


def by_image(examples: Sequence[Example], bad: Bad) -> list[tuple[Example, ...]]:
    """The examples of each image, sorted; those without an image are noted as bad."""
    images: defaultdict[str, list[Example]] = defaultdict(list)
    for example in sorted(examples, key=lambda example: example.id):
        if example.image is None:
            bad[example.id] = "no image, so no objects"
        else:
            images[example.image].append(example)
    return [tuple(own) for _, own in sorted(images.items())]


def shard_examples(examples: Sequence[Example], shard: int, num_shards: int) -> list[Example]:
    """The examples of every `num_shards`-th image; those without an image are in the first shard, which says that they are bad."""
    bad: dict[str, str] = {}
    chosen = [example for own in by_image(examples, bad)[shard::num_shards] for example in own]
    return chosen + [example for example in examples if example.id in bad and shard == 0]


def _open(folder: Path, examples: tuple[Example, ...], bad: Bad) -> Pictured | None:
    try:
        image = open_image(folder, examples[0])
    except BadExample as error:
        bad.update({example.id: str(error) for example in examples})
        return None
    width, height = image.size
    if (scale := LONGEST_SIDE / max(image.size)) < 1:
        image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX, reducing_gap=1.0)
    return Pictured(image, height, width, examples)


def as_frame(tables: Iterator[pa.Table]) -> pl.DataFrame:
    """The tables as one."""
    frame = pl.from_arrow(pa.concat_tables([MASKS.empty_table(), *tables]))
    assert isinstance(frame, pl.DataFrame)
    return frame
