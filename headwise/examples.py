"""Examples and the data sets that hold them: one Parquet index beside a folder of images, and the objects' exact masks where known."""

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
import polars as pl
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError

from headwise.files import read_table, write_table

EXAMPLES = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.string()),
        ("sha256", pa.string()),
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("phrase", pa.string()),
        ("task", pa.string()),
        ("split", pa.string()),
    ]
)
"""index.parquet: one row per question; `phrase` names the key object, the one that the answer is about."""

OBJECTS = pa.schema(
    [
        ("image", pa.string()),
        ("object", pa.int32()),
        ("phrase", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("rle", pa.string()),
    ]
)
"""objects.parquet: the exact mask of every object as COCO RLE (ascii counts, column-major)."""

BAD = pa.schema([("example_id", pa.string()), ("reason", pa.string())])
"""bad.parquet: the examples that a step left out, and why."""

CAPTION = "caption"
"""The task of an open description; every other task is a closed question."""

INDEX, OBJECTS_FILE = "index.parquet", "objects.parquet"


class BadExample(ValueError):
    """One example cannot be used; the step records it with this reason and goes on."""


@dataclass(frozen=True)
class Example:
    """One question about one image (`image` is None for text alone). A caption is the question of task `caption`."""

    id: str
    image: str | None
    sha256: str | None
    question: str
    answers: tuple[str, ...]
    phrase: str | None
    task: str
    split: str


def write_examples(examples: Sequence[Example], folder: Path) -> None:
    """Write `index.parquet`. Raises ValueError on ids given twice."""
    ids = [example.id for example in examples]
    if len(set(ids)) < len(ids):
        twice = sorted({i for i in ids if ids.count(i) > 1})
        raise ValueError(f"{folder / INDEX}: {len(twice)} ids occur more than once, the first is {twice[0]!r}")
    rows = [{name: getattr(example, name) for name in EXAMPLES.names} for example in examples]
    write_table(pa.Table.from_pylist(rows, schema=EXAMPLES), folder / INDEX, EXAMPLES)


def read_examples(folder: Path, split: str | None = None) -> list[Example]:
    """The examples of a data set, or of one split, in the order of the index.

    Raises ValueError if there is no index, or the split has no example.
    """
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder}: no {INDEX} here; `headwise data --help` shows how to make a data set from a folder of images")
    frame = read_table(folder / INDEX, EXAMPLES)
    if split is not None:
        found = frame["split"].unique().sort().to_list()
        frame = frame.filter(pl.col("split") == split)
        if frame.is_empty():
            raise ValueError(f"{folder}: no example in split {split!r}; the splits here are {found}")
    return [Example(answers=tuple(row.pop("answers")), **row) for row in frame.iter_rows(named=True)]


def image_path(folder: Path, image: str) -> Path:
    """The image's path inside the data set. Raises BadExample if it points outside the folder."""
    relative = PurePosixPath(image)
    path = folder / relative
    if relative.is_absolute() or ".." in relative.parts or not path.resolve().is_relative_to(folder.resolve()):
        raise BadExample(f"{image}: the path leaves the data folder")
    return path


def open_image(folder: Path, example: Example) -> Image.Image:
    """The example's image in RGB, upright. Raises BadExample if it is missing, empty, broken, animated, or not the bytes of the index."""
    assert example.image is not None
    content = read_image(folder, example.image)
    if example.sha256 and hashlib.sha256(content).hexdigest() != example.sha256:
        raise BadExample(f"{example.image}: the bytes differ from the sha256 in the index")
    return decode_image(content, example.image)


def read_image(folder: Path, image: str) -> bytes:
    """The bytes of an image of the data set. Raises BadExample if its path leaves the folder or it cannot be read."""
    try:
        return image_path(folder, image).read_bytes()
    except OSError as error:
        raise BadExample(f"{image}: cannot be read ({error.strerror})") from error


def decode_image(content: bytes, name: str) -> Image.Image:
    """Decode to RGB, upright: grayscale, palette, alpha (on white), CMYK and 16-bit images too; of a phone's MPO (one scene, several
    pictures in one JPEG) the first picture. Raises BadExample with the reason.
    """
    if not content:
        raise BadExample(f"{name}: the file is empty")
    try:
        with warnings.catch_warnings():  # between 89 and 179 million pixels Pillow warns, and goes on; above, it refuses
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(content))
        if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
            raise BadExample(f"{name}: an animation of {frames} frames; give one frame")
        image = ImageOps.exif_transpose(image)
        return to_rgb(image)
    except UnidentifiedImageError as error:  # its own words name the buffer in memory
        raise BadExample(f"{name}: not a readable image (of no format that is known)") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadExample(f"{name}: not a readable image ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Transparent pixels on white, 16-bit values scaled."""
    if image.mode in ("I", "I;16", "I;16B", "I;16L"):  # Pillow clips 16-bit values at 255 instead of scaling them
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def write_bad(bad: Mapping[str, str], folder: Path) -> None:
    """Write `bad.parquet`, sorted by example id."""
    rows = [{"example_id": i, "reason": bad[i]} for i in sorted(bad)]
    write_table(pa.Table.from_pylist(rows, schema=BAD), folder / "bad.parquet", BAD)


def causes(reasons: Iterable[str]) -> dict[str, int]:
    """How many reasons there are of each cause, which stands before the colon, the commonest first."""
    return dict(Counter(reason.partition(":")[0] for reason in sorted(reasons)).most_common())


def check_bad_share(bad: Mapping[str, str], total: int, max_bad_share: float) -> None:
    """Raises ValueError if more than the stated share of the examples was bad, or if none is left."""
    if bad and (len(bad) > max_bad_share * total or len(bad) == total):
        first = min(bad)
        share = f"max_bad_share = {max_bad_share:g}"
        raise ValueError(f"{len(bad)} of {total} examples are bad, more than {share} allows; the first is {first}: {bad[first]}")
