"""Exact masks from COCO: its instance annotations, and expressions that refer to them in the manner of RefCOCO."""

import json
from collections import defaultdict
from collections.abc import Collection
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import pyarrow as pa
from pycocotools import mask as coco
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from headwise.examples import OBJECTS
from headwise.masks import rle

Coordinate = Annotated[float, Field(gt=-1e5, lt=1e5, allow_inf_nan=False)]
"""In pixels; pycocotools ends the process on far larger ones."""
INSTANCES, REFERENCES = "instances.json", "refs.json"


class Image(BaseModel):
    """An image of the annotations."""

    id: int
    file_name: str
    height: Annotated[int, Field(gt=0)]
    width: Annotated[int, Field(gt=0)]


class Category(BaseModel):
    """What an instance is called."""

    id: int
    name: str


class RunLengths(BaseModel):
    """A mask as run lengths, as numbers or packed into text."""

    size: tuple[int, int]
    counts: list[Annotated[int, Field(ge=0, lt=1 << 31)]] | str


class Instance(BaseModel):
    """An object: its polygons (x and y in turn, pixels) or run lengths."""

    id: int
    image_id: int
    category_id: int
    segmentation: list[list[Coordinate]] | RunLengths
    iscrowd: bool = False


class Instances(BaseModel):
    """The parts of a COCO file that masks need."""

    images: list[Image]
    categories: list[Category]
    annotations: list[Instance]


class Sentence(BaseModel):
    """A referring expression."""

    sent: str


class Reference(BaseModel):
    """The expressions for one instance, as in RefCOCO's refs (there a pickle, which is not read: write it as JSON)."""

    ann_id: int
    sentences: list[Sentence]


def read_coco(folder: Path, wanted: Collection[str]) -> pl.DataFrame:
    """The rows of objects.parquet from the folder's instances.json: an object per instance, named by its category.

    With a refs.json beside it, an object per expression and nothing else. Crowds are no objects. Only images whose `file_name` is wanted
    are looked at.
    Raises ValueError naming the file and what is wrong in it.
    """
    path = folder / INSTANCES
    content: Instances = _read(path, Instances)
    images, categories = {image.id: image for image in content.images}, {category.id: category.name for category in content.categories}
    phrases = _phrases(folder / REFERENCES, content)
    rows: list[dict[str, object]] = []
    for instance in content.annotations:
        if instance.image_id not in images or instance.category_id not in categories:
            raise ValueError(f"{path}: annotation {instance.id} is of an image or a category that the file does not have")
        image = images[instance.image_id]
        if image.file_name not in wanted or instance.iscrowd:
            continue
        mask = _mask(instance, image, path)
        named = [categories[instance.category_id]] if phrases is None else dict.fromkeys(phrases[instance.id])
        rows += [{"image": image.file_name, "phrase": phrase, **mask} for phrase in named]
    numbers: defaultdict[object, count[int]] = defaultdict(count)
    rows = [{**row, "object": next(numbers[row["image"]])} for row in rows]
    frame = pl.from_arrow(pa.Table.from_pylist(rows, schema=OBJECTS))
    assert isinstance(frame, pl.DataFrame)
    return frame


def _phrases(path: Path, content: Instances) -> defaultdict[int, list[str]] | None:
    """The expressions of each instance; None where the folder has no such file."""
    if not path.is_file():
        return None
    known = {instance.id for instance in content.annotations}
    phrases: defaultdict[int, list[str]] = defaultdict(list)
    references: list[Reference] = _read(path, list[Reference])
    for reference in references:
        if reference.ann_id not in known:
            raise ValueError(f"{path}: a reference to annotation {reference.ann_id}, which {INSTANCES} does not have")
        phrases[reference.ann_id] += [sentence.sent for sentence in reference.sentences]
    return phrases


def _read(path: Path, type_: Any) -> Any:
    try:
        return TypeAdapter(type_).validate_python(json.loads(path.read_bytes()))
    except ValidationError as error:
        deepest = max(error.errors(), key=lambda wrong: len(wrong["loc"]))  # a mask is one of several forms, and this is the one meant
        raise ValueError(
            ": ".join([str(path), *([".".join(map(str, deepest["loc"]))] if deepest["loc"] else []), deepest["msg"]])
        ) from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path}: not JSON ({error})") from error


def _mask(instance: Instance, image: Image, path: Path) -> dict[str, object]:
    """The instance's height, width and packed run lengths; polygons are filled by pycocotools, as COCO's own evaluation does, and one of
    fewer than three points is an empty mask. What does not fit the image is for the masks step to say, which leaves out that image alone.
    """
    given = instance.segmentation
    if isinstance(given, RunLengths):
        height, width = given.size
        if isinstance(given.counts, str):
            return {"height": height, "width": width, "rle": given.counts}
        if sum(given.counts) != height * width:
            raise ValueError(f"{path}: annotation {instance.id}: the runs fill {sum(given.counts)} pixels, the mask has {height} x {width}")
        lengths: Any = given.model_dump()
        packed: Any = coco.frPyObjects(lengths, height, width)
    else:
        height, width = image.height, image.width
        parts: Any = [part for part in given if len(part) >= 6 and len(part) % 2 == 0]
        if not parts:
            return {"height": height, "width": width, "rle": rle.encode(np.zeros((height, width), dtype=bool))}
        packed = coco.merge(coco.frPyObjects(parts, height, width))
    return {"height": height, "width": width, "rle": packed["counts"].decode("ascii")}
