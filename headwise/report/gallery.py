"""Random examples for the page: each one's image with the exact mask, and the attention of the best and of the worst heads over it."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.compute as pc
from jaxtyping import Bool, UInt8
from PIL import Image

from headwise.attention.schema import ATTENTION, PART
from headwise.examples import INDEX, BadExample, Example, open_image, read_examples
from headwise.files import read_table
from headwise.masks.rle import decode
from headwise.masks.table import read_masks, written_shards
from headwise.report.overlays import Head, draw_outline, mean_map, paint_attention, share_inside

SIDE = 320
"""The longer side of a picture in pixels: small enough for 150 of them on one page, sharp on a phone."""


@dataclass(frozen=True)
class Subject:
    """An example as it is shown: its image and the mask of what its answer is about, both at the picture's size.

    `area` is the mask's share of the image at its own size.
    """

    example: Example
    image: UInt8[np.ndarray, "rows columns 3"]
    mask: Bool[np.ndarray, "rows columns"]
    phrase: str
    area: float


@dataclass(frozen=True)
class Overlay:
    """The three pictures of one example, as paths relative to the page, and how much of each map falls on the mask.

    `top_share` and `bottom_share` are the parts of the map's sum that lie on the mask, `area` is the mask's part of the image
    (what a map spread evenly would give); all in [0, 1].
    """

    question: str
    answer: str
    phrase: str
    area: float
    mask: str
    top: str
    top_share: float
    bottom: str
    bottom_share: float


def draw_gallery(data: Path, folder: Path, top: Sequence[Head], bottom: Sequence[Head], num: int) -> list[Overlay]:
    """Draw `num` random calibration examples that have an image, a usable key mask and attention, in the order of their ids.

    The draw is seeded: the same artefacts give the same examples. Writes three JPEG files each into `folder`.
    """
    parts = sorted((data / "attention").glob(f"shard=*/{PART}"))
    masks = _key_masks(data / "masks")
    examples = _calibration_examples(data / "images")
    ids = sorted(_observed(parts) & examples.keys() & masks.keys())
    random.Random(0).shuffle(ids)
    readable = _subjects(data / "images", [(examples[example_id], masks[example_id]) for example_id in ids])
    subjects = {subject.example.id: subject for subject in islice(readable, num)}
    if not subjects:
        return []
    attention = _attention(parts, list(subjects), [*top, *bottom])
    rows = {str(example_id): rows for (example_id,), rows in attention.group_by("example_id")}
    overlays: list[Overlay] = []
    for n, (example_id, subject) in enumerate(sorted(subjects.items(), key=itemgetter(0))):
        top_map, bottom_map = (mean_map(rows[example_id], heads, subject.image.shape[:2]) for heads in (top, bottom))
        overlays.append(_draw(subject, top_map, bottom_map, folder / f"{n:02}"))
    return overlays


def _calibration_examples(folder: Path) -> dict[str, Example]:
    if not (folder / INDEX).is_file():
        return {}
    return {example.id: example for example in read_examples(folder) if example.image and example.split == "calibration"}


def _key_masks(folder: Path) -> dict[str, pl.DataFrame]:
    """Per example, the usable masks of what the answer is about."""
    if not (shards := written_shards(folder)):
        return {}
    usable = read_masks(shards).filter(pl.col("key") & pl.col("reason").is_null() & pl.col("rle").is_not_null())
    return {str(example_id): rows for (example_id,), rows in usable.group_by("example_id", maintain_order=True)}


def _observed(parts: Sequence[Path]) -> set[str]:
    """The examples with attention that has its place on the image; of what may be gigabytes one head's row of each is held."""
    first = (pc.field("layer") == 0) & (pc.field("head") == 0)
    frames = [read_table(part, ATTENTION, ["example_id", "views"], first) for part in parts]
    return {example_id for frame in frames for example_id in frame.filter(pl.col("views").list.len() > 0)["example_id"]}


def _attention(parts: Sequence[Path], ids: Sequence[str], heads: Sequence[Head]) -> pl.DataFrame:
    """The rows of some examples and layers, each once."""
    columns = ["example_id", "layer", "head", "views", "map", "map_max"]
    wanted = pc.field("example_id").isin(ids) & pc.field("layer").isin(sorted({layer for layer, _ in heads}))
    found = [frame for part in parts if len(frame := read_table(part, ATTENTION, columns, wanted))]
    return pl.concat(found).unique(["example_id", "layer", "head"], keep="first", maintain_order=True)


def _subjects(folder: Path, examples: Sequence[tuple[Example, pl.DataFrame]]) -> Iterator[Subject]:
    """The examples whose image can be read; those whose image cannot are in the table of examples left out."""
    for example, masks in examples:
        try:
            image = open_image(folder, example)
        except BadExample:
            continue
        scale = SIDE / max(image.size)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        mask = np.any([decode(rle, height, width) for rle, height, width in masks.select("rle", "height", "width").iter_rows()], axis=0)
        yield Subject(
            example=example,
            image=np.asarray(image.resize(size, Image.Resampling.LANCZOS)),
            mask=np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)),
            phrase=", ".join(masks["phrase"].unique(maintain_order=True)),
            area=float(mask.mean()),
        )


def _draw(subject: Subject, top: np.ndarray, bottom: np.ndarray, path: Path) -> Overlay:
    pictures = {
        "mask": draw_outline(subject.image, subject.mask),
        "top": paint_attention(subject.image, top, subject.mask),
        "bottom": paint_attention(subject.image, bottom, subject.mask),
    }
    files = {name: path.with_name(f"{path.name}-{name}.jpg") for name in pictures}
    for name, picture in pictures.items():
        Image.fromarray(picture).save(files[name], quality=88, subsampling=0)
    return Overlay(
        question=subject.example.question,
        answer=subject.example.answers[0] if subject.example.answers else "",
        phrase=subject.phrase,
        area=subject.area,
        top_share=share_inside(top, subject.mask),
        bottom_share=share_inside(bottom, subject.mask),
        **{name: f"{path.parent.name}/{file.name}" for name, file in files.items()},
    )
