"""masks.parquet: one row per example and object, whoever made the mask; an object that was dropped keeps its row with the reason."""

import re
from collections.abc import Iterable
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from headwise.examples import causes
from headwise.files import read_table

MASKS = pa.schema(
    [
        ("example_id", pa.string()),
        ("image", pa.string()),
        ("object", pa.int32()),
        ("phrase", pa.string()),
        ("key", pa.bool_()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("box", pa.list_(pa.float32())),
        ("rle", pa.string()),
        ("predicted_iou", pa.float32()),
        ("stability", pa.float32()),
        ("area", pa.float32()),
        ("source", pa.string()),
        ("reason", pa.string()),
    ]
)
"""`image`: its path in the data set, the unit of the statistics. `key`: the answer is about this object. `height` and `width` in pixels of
the image; `box` = [x0, y0, x1, y1] in pixels, x1 and y1 exclusive: around the mask where it is exact, else the box that was asked for;
`rle`: COCO run lengths in ascii, column-major; `predicted_iou` (the segmenter's own estimate) and `stability` are null where the mask is
exact; `area`: share of the image in [0, 1]; `source`: who made the mask; `reason`: why the mask is not to be used, null if it is. An
example without a key object, or whose objects are perhaps not all there, has a row about the object null, with that reason."""

MASKS_FILE = "masks.parquet"
NO_OBJECT = "no object is meant"
"""The cause where an example is about nothing in the image."""


def masks_writer(path: Path) -> pq.ParquetWriter:
    """A writer of row groups of this table."""
    return pq.ParquetWriter(path, MASKS, compression="zstd")


def written_shards(folder: Path) -> list[Path]:
    """The shards of masks in `data/masks`, in their order."""
    return sorted(path.parent for path in folder.glob(f"shard=*/{MASKS_FILE}"))


def read_masks(shards: Iterable[Path]) -> pl.DataFrame:
    """The masks of all shards, as one table. Raises ValueError naming a file that is missing or broken."""
    files = [folder / MASKS_FILE for folder in shards]
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ValueError(f"no masks in {missing[0]}: run the masks step for each shard of params.yaml")
    return pl.concat([read_table(file, MASKS) for file in files])


def plain_reason(reason: str) -> str:
    """The reason without the figures of its own mask, so that equal causes can be counted; the settings' values stay."""
    return re.sub(r"\b(covers|is|object) \d[\d.e+-]*", r"\1 …", reason)


def check_found(masks: pl.DataFrame) -> None:
    """Raises ValueError if objects were looked for and not one has a usable mask, with the likely cause."""
    reasons = masks.filter(~pl.col("reason").fill_null("").str.starts_with(NO_OBJECT))["reason"]
    if reasons.is_empty() or reasons.null_count():
        return
    counts = causes(map(plain_reason, reasons))
    commonest = next(iter(counts))
    likely = next((cause for start, cause in LIKELY.items() if commonest.startswith(start)), "see masks.quality")
    raise ValueError(f"no usable mask among {len(masks)} rows ({', '.join(f'{cause}: {n}' for cause, n in counts.items())}): {likely}")


LIKELY = {
    "nothing found": "most likely Florence-2's weights are newly initialised, or not those of its processor",
    "predicted_iou": "most likely SAM 2's weights are newly initialised; or the gates in masks.quality are too strict",
    "stability": "most likely SAM 2's weights are newly initialised; or the gates in masks.quality are too strict",
    "text too long": "give shorter questions, or phrases",
}
"""What the commonest reason of a run without any mask says."""
