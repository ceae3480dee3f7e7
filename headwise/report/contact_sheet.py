"""A contact sheet of masks: images with every object that was found in them, and what became of each."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Bool, UInt8
from matplotlib import colormaps
from PIL import Image

from headwise.examples import INDEX, BadExample, Example, open_image, read_examples
from headwise.masks.agreement import Agreement, read_agreement
from headwise.masks.rle import decode
from headwise.masks.table import read_masks, written_shards
from headwise.report.overlays import draw_outline
from headwise.report.records import Table, number, words

NUM_IMAGES = 24
SIDE = 320
"""The longer side of a picture in pixels."""
Colour = tuple[int, int, int]
COLOURS: list[Colour] = [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b, _ in colormaps["tab10"](range(10))]
"""Ten colours that are told apart by most eyes; the eleventh object has the first one's."""
DROPPED: Colour = (128, 128, 128)


@dataclass(frozen=True)
class Entry:
    """An object of a picture: its colour in CSS, its phrase, whether the answer is about it, and why it is not used, if it is not."""

    colour: str
    phrase: str
    key: bool
    reason: str | None


@dataclass(frozen=True)
class Sheet:
    """A picture with masks, as a path relative to the page, and what it is about."""

    picture: str
    question: str
    answer: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class MasksSection:
    """The sheets, the sentence that counts the masks, and their agreement with the truth where that is known."""

    sentence: str
    sheets: list[Sheet]
    agreement: Table | None


def masks_section(data: Path, folder: Path) -> MasksSection | None:
    """Random images of the masks step, one example each, drawn with a fixed seed; None where there are no masks."""
    if not (shards := written_shards(data / "masks")) or not (data / "images" / INDEX).is_file():
        return None
    masks = read_masks(shards)
    if masks.is_empty():
        return None
    found = read_agreement(data)
    return MasksSection(_sentence(masks), _sheets(data / "images", masks, folder), agreement_table(found) if found else None)


def agreement_table(found: Agreement) -> Table:
    """The agreement as pairs of words and values."""
    rows = tuple((words(name), number(value)) for name, value in asdict(found).items())
    return Table("Key masks against the exact ones of the data", (), rows)


def _sentence(masks: pl.DataFrame) -> str:
    objects = masks.filter(pl.col("object").is_not_null())
    usable, asked = objects["reason"].null_count(), masks["example_id"].n_unique()
    without = masks.filter(pl.col("object").is_null())["example_id"].n_unique()
    return (
        f"{asked} examples about {masks['image'].n_unique()} images have {len(objects)} objects, counted example by example (masks: "
        f"{', '.join(masks['source'].unique().sort())}); {usable} are usable, and {without} examples are about no object that was found. "
        "Below are images drawn at random with a fixed seed, one example each: filled is what the answer is about, outlined the rest, grey "
        "what is not used."
    )


def _sheets(images: Path, masks: pl.DataFrame, folder: Path) -> list[Sheet]:
    examples = {example.id: example for example in read_examples(images)}
    own = masks.sort("image", "example_id").group_by("image", maintain_order=True).agg(pl.col("example_id").unique(maintain_order=True))
    draw = random.Random(0)
    ids = [draw.choice(example_ids) for example_ids in own["example_id"].to_list()]
    draw.shuffle(ids)
    sheets: list[Sheet] = []
    for example_id in ids:
        rows = masks.filter(pl.col("example_id") == example_id).sort("object", nulls_last=True)
        try:
            image = open_image(images, examples[example_id])
        except BadExample:
            continue
        sheets.append(_draw(examples[example_id], image, rows.to_dicts(), folder / f"{len(sheets):02}.jpg"))
        if len(sheets) == NUM_IMAGES:
            break
    return sheets


def _draw(example: Example, image: Image.Image, rows: Sequence[dict[str, object]], path: Path) -> Sheet:
    scale = SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    picture = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
    entries: list[Entry] = []
    for place, row in enumerate(rows):
        colour = COLOURS[place % len(COLOURS)] if row["reason"] is None else DROPPED
        if row["rle"] is not None:
            mask = Image.fromarray(decode(str(row["rle"]), int(str(row["height"])), int(str(row["width"]))))
            picture = _laid(picture, np.asarray(mask.resize(size, Image.Resampling.NEAREST)), colour, filled=bool(row["key"]))
        reason = None if row["reason"] is None else str(row["reason"])
        entries.append(Entry("#" + "".join(f"{part:02x}" for part in colour), str(row["phrase"] or "no object"), bool(row["key"]), reason))
    Image.fromarray(picture).save(path, quality=88, subsampling=0)
    answer = example.answers[0] if example.answers else ""
    return Sheet(f"{path.parent.name}/{path.name}", example.question, answer, tuple(entries))


def _laid(
    picture: UInt8[np.ndarray, "rows columns 3"], mask: Bool[np.ndarray, "rows columns"], colour: Colour, *, filled: bool
) -> UInt8[np.ndarray, "rows columns 3"]:
    """The picture with the mask's outline in this colour, and half of the colour inside it."""
    laid = picture.copy()
    if filled:
        laid[mask] = picture[mask] // 2 + np.array(colour, dtype=np.uint8) // 2
    return draw_outline(laid, mask, colour)
