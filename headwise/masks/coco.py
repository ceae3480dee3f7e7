"""Exact masks from COCO: its instance annotations, and expressions that refer to them in the manner of RefCOCO."""

import json
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import pyarrow as pa
from pycocotools import mask as coco
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from headwise.examples import OBJECTS
from headwise.masks import rle

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
    counts: list[int] | str


class Instance(BaseModel):
    """An object: its polygons (x and y in turn, pixels) or run lengths."""

    id: int
    image_id: int
    category_id: int
    segmentation: list[list[float]] | RunLengths


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

    With a refs.json beside it, an object per expression and nothing else. Only images whose `file_name` is wanted are looked at.
    Raises ValueError naming the file and what is wrong in it.
    """
    path = folder / INSTANCES
    content: Instances = _read(path, Instances)
    images, categories = {image.id: image for image in content.images}, {category.id: category.name for category in content.categories}
    phrases = _phrases(folder / REFERENCES, content) or {
        instance.id: [categories.get(instance.category_id, "")] for instance in content.annotations
    }
    numbers: defaultdict[str, int] = defaultdict(int)
    rows: list[dict[str, object]] = []
    for instance in content.annotations:
        if instance.image_id not in images or instance.category_id not in categories:
            raise ValueError(f"{path}: annotation {instance.id} is of an image or a category that the file does not have")
        image = images[instance.image_id]
        if image.file_name not in wanted:
            continue
        counts = _counts(instance, image, path)
        for phrase in phrases.get(instance.id, ()):
            own = {"image": image.file_name, "object": numbers[image.file_name], "phrase": phrase, "rle": counts}
            rows.append({**own, "height": image.height, "width": image.width})
            numbers[image.file_name] += 1
    frame = pl.from_arrow(pa.Table.from_pylist(rows, schema=OBJECTS))
    assert isinstance(frame, pl.DataFrame)
    return frame


def _phrases(path: Path, content: Instances) -> dict[int, list[str]]:
    """The expressions of each instance; empty where the folder has none."""
    if not path.is_file():
        return {}
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
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']} ({error.error_count()} mistakes in all)") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path}: not JSON ({error})") from error


def _counts(instance: Instance, image: Image, path: Path) -> str:
    """The instance's mask as packed run lengths; polygons are filled by pycocotools, as COCO's own evaluation does."""
    given = instance.segmentation
    size = [image.height, image.width]
    try:
        if isinstance(given, RunLengths) and list(given.size) != size:
            raise ValueError(f"the mask is {given.size[0]} x {given.size[1]}, the image {size[0]} x {size[1]} (height x width)")
        if isinstance(given, RunLengths) and isinstance(given.counts, str):
            rle.run_ends(given.counts, *size)
            return given.counts
        packed: Any = given.model_dump() if isinstance(given, RunLengths) else [part for part in given if len(part) >= 6]
        if not packed:
            raise ValueError("no polygon of three points")
        merged = coco.frPyObjects(packed, *size)
        counts = (coco.merge(merged) if isinstance(merged, list) else merged)["counts"].decode()  # pyright: ignore[reportAttributeAccessIssue]
        rle.run_ends(counts, *size)
    except ValueError as error:
        raise ValueError(f"{path}: annotation {instance.id}: {error}") from error
    return counts
