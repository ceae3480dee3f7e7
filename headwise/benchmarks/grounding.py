"""Grounding by attention: the questions of RefCOCO, or of data whose objects' masks are known, and where the objects are."""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Bool
from PIL import Image

from headwise.benchmarks.benchmark import Benchmark
from headwise.benchmarks.coco import REFCOCO, read_refcoco
from headwise.evaluation.boxes import parse_box
from headwise.evaluation.judgement import READ_ONLY, ObjectMask, Questions
from headwise.examples import CAPTION, Example, read_examples
from headwise.masks.exact import exact_masks
from headwise.masks.quality import Bounds
from headwise.masks.rle import decode
from headwise.masks.settings import MaskQuality

NAME = "grounding"
WHAT = "What is in the image?"


def box_mask(box: Bounds, image: Image.Image) -> Bool[np.ndarray, "height width"]:
    """The pixels of a box, at least one."""
    x0, y0, x1, y1 = box
    mask = np.zeros((image.height, image.width), dtype=bool)
    top, left = int(y0 * image.height), int(x0 * image.width)
    mask[top : max(top + 1, round(y1 * image.height)), left : max(left + 1, round(x1 * image.width))] = True
    return mask


def read_grounding(folder: Path, images: Path, prompt: str) -> Questions:
    """RefCOCO's expressions, read as the answer to what is in the image: its boxes are not shown to the model."""
    examples: list[Example] = []
    boxes: dict[str, Bounds] = {}
    for one in read_refcoco(folder, images, "").examples:
        example_id = one.id.replace("refcoco/", f"{NAME}/", 1)
        if box := parse_box(one.answers[0]):
            boxes[example_id] = box
            examples.append(replace(one, id=example_id, question=WHAT + prompt, answers=(str(one.phrase),)))
    return _questions(examples, images, lambda example, image: box_mask(boxes[example.id], image))


def own_grounding(own: Path) -> Questions:
    """The evaluation split's closed questions about an object with a usable exact mask. Raises ValueError without an objects.parquet."""
    asked = [e for e in read_examples(own, "evaluation") if e.image and e.phrase and e.answers and e.task != CAPTION]
    masks, _ = exact_masks(own, asked, MaskQuality())
    usable = masks.filter(pl.col("key") & pl.col("reason").is_null())
    found: Mapping[str, list[dict[str, object]]] = {
        str(example_id): rows.to_dicts() for (example_id,), rows in usable.group_by("example_id", maintain_order=True)
    }
    prefix = f"{NAME}/"

    def mask(example: Example, image: Image.Image) -> Bool[np.ndarray, "height width"]:
        rows = found[example.id.removeprefix(prefix)]
        return reduce(np.logical_or, (decode(str(row["rle"]), image.height, image.width) for row in rows))

    return _questions([replace(e, id=prefix + e.id) for e in asked if e.id in found], own, mask)


def _questions(examples: list[Example], images: Path, mask: ObjectMask) -> Questions:
    examples = [replace(example, split=NAME) for example in examples]
    return Questions(examples, dict.fromkeys({example.task for example in examples}, READ_ONLY), images, mask)


GROUNDING = Benchmark(
    NAME,
    "Grounding by attention: the mean map of all heads while the reference is read; right if its highest visual token is the object's "
    "(the pointing game, Zhang et al. 2018), and the IoU of the tokens above the map's mean with the object's; RefCOCO's expressions "
    "and boxes, or the data's own answers and masks; version 1",
    REFCOCO.files,
    read_grounding,
    prompt="",
)
