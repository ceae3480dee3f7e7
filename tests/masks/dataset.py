"""A small data set on disk: images of 40 x 60 pixels with two objects each, and questions about them."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from headwise.examples import OBJECTS, OBJECTS_FILE, Example, write_examples
from headwise.files import write_table
from headwise.masks.rle import encode

HEIGHT, WIDTH = 40, 60


def left() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[5:25, 10:20] = True
    return mask


def right() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[30:40, 50:60] = True
    return mask


def object_row(image: str, number: int, phrase: str, mask: np.ndarray) -> dict[str, object]:
    return {"image": image, "object": number, "phrase": phrase, "height": mask.shape[0], "width": mask.shape[1], "rle": encode(mask)}


def write_image(folder: Path, name: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), "white").save(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def question(example_id: str, image: str | None, phrase: str | None, sha256: str | None = None, split: str = "calibration") -> Example:
    return Example(example_id, image, sha256, "What is it?", ("a cat",), phrase, "name" if phrase else "caption", split)


def write_dataset(folder: Path, num_images: int = 1, changed: Mapping[str, Sequence[dict[str, object]]] | None = None) -> list[Example]:
    """Per image a question about the cat (q) and a caption (c), in the calibration split, and one question of another split; returns them.

    changed: the objects of an image instead of its cat and dog.
    """
    examples: list[Example] = []
    objects: list[dict[str, object]] = []
    for number in range(num_images):
        image = f"images/{number:03d}.png"
        sha256 = write_image(folder, image)
        examples += [
            question(f"{number:03d}-q", image, "cat", sha256),
            question(f"{number:03d}-c", image, None, sha256),
            question(f"{number:03d}-e", image, "cat", sha256, "evaluation"),
        ]
        objects += (changed or {}).get(image, [object_row(image, 0, "cat", left()), object_row(image, 1, "dog", right())])
    write_examples(examples, folder)
    write_table(pa.Table.from_pylist(objects, schema=OBJECTS), folder / OBJECTS_FILE, OBJECTS)
    return [example for example in examples if example.split == "calibration"]
