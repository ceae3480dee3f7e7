"""COCO: captions (perplexity and CHAIR) and RefCOCO's boxes, from the files their authors publish."""

import io
import pickle
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from headwise.benchmarks.benchmark import Benchmark, ask, find, image_folder, read_json, validate
from headwise.evaluation.boxes import box_rule, format_box
from headwise.evaluation.chair import CHAIR, chair_rule, objects_in, read_synonyms, vocabulary_of, with_double_words
from headwise.evaluation.judgement import READ_ONLY, Asking, Questions
from headwise.examples import CAPTION, Example

DESCRIBE = "Describe the image."
SYNONYMS = "synonyms.txt"
BOX = (
    "Give the bounding box of the region that this phrase describes as [x0, y0, x1, y1], left, top, right and bottom in fractions of the "
    "image's sides: "
)


class Image(BaseModel):
    """An image of COCO."""

    id: int
    file_name: str
    width: int
    height: int


class Category(BaseModel):
    """What an instance is called."""

    id: int
    name: str


class Boxed(BaseModel):
    """An instance: its box as left, top, width and height in pixels."""

    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]


class Instances(BaseModel):
    """The parts of COCO's instances that benchmarks need."""

    images: list[Image]
    categories: list[Category]
    annotations: list[Boxed]


class Caption(BaseModel):
    """A caption of an image."""

    image_id: int
    caption: str


class Captions(BaseModel):
    """COCO's captions."""

    images: list[Image]
    annotations: list[Caption]


def read_captions(folder: Path, images: Path, prompt: str) -> Questions:
    """Tasks `caption` (perplexity of the first reference) and `chair`: what a description mentions against the image's objects, those of
    the instances and those that any of its captions mentions, as in the paper. Names are those in `synonyms.txt` where the folder has
    the authors' file, else COCO's categories alone.
    """
    told: Captions = read_json(find(folder, "captions_val*.json", "**/captions_val*.json"), Captions)
    drawn: Instances = read_json(find(folder, "instances_val*.json", "**/instances_val*.json"), Instances)
    categories = {category.id: category.name for category in drawn.categories}
    own_words = read_synonyms(folder / SYNONYMS) if (folder / SYNONYMS).is_file() else {name: name for name in categories.values()}
    vocabulary = vocabulary_of(with_double_words(own_words))
    captions, objects = defaultdict[int, list[str]](list), defaultdict[int, set[str]](set)
    for caption in told.annotations:
        captions[caption.image_id].append(caption.caption)
    for instance in drawn.annotations:
        name = categories[instance.category_id]
        objects[instance.image_id].add(own_words.get(name, name))
    place = image_folder(images, "val2014", "val2017", "images")
    examples: list[Example] = []
    for image in told.images:
        if not (own := captions[image.id]):
            continue
        there = tuple(sorted(objects[image.id] | objects_in(own, vocabulary)))
        examples += [
            ask("coco", f"{task}-{image.id}", place + image.file_name, DESCRIBE + prompt, answers, task)
            for task, answers in ((CAPTION, tuple(own)), (CHAIR, there))
        ]
    return Questions(examples, {CAPTION: READ_ONLY, CHAIR: Asking(chair_rule(vocabulary), read=False)}, images)


def chair_examples(objects: Mapping[str, Sequence[str]], prompt: str) -> Questions:
    """`chair` on images whose objects are known (image: names), each object called as it is named there."""
    names = {name: name for own in objects.values() for name in own}
    examples = [
        ask("coco", f"{CHAIR}-{image}", image, DESCRIBE + prompt, sorted(set(own)), CHAIR) for image, own in sorted(objects.items())
    ]
    return Questions(examples, {CHAIR: Asking(chair_rule(vocabulary_of(names)), read=False)}, Path())


class Sentence(BaseModel):
    """A referring expression."""

    sent: str


class Reference(BaseModel):
    """The expressions for one instance."""

    ref_id: int
    ann_id: int
    image_id: int
    split: str
    sentences: list[Sentence]


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, texts and numbers, which is what RefCOCO's pickles hold, and runs nothing."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Refuse whatever a pickle would call."""
        raise pickle.UnpicklingError(f"it calls {module_name}.{global_name}")


def read_plain_pickle(path: Path, type_: Any) -> Any:
    """The pickle's content as the type, without running anything in it. Raises ValueError if it is broken or would call something."""
    try:
        content = PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except (pickle.UnpicklingError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not a pickle of plain values ({error})") from error
    return validate(path, type_, content)


def read_refcoco(folder: Path, images: Path, prompt: str) -> Questions:
    """A question per expression of the splits `val`, `testA`, `testB` and `test`, which are the tasks."""
    references: list[Reference] = read_plain_pickle(find(folder, "refs(unc).p", "refs(umd).p", "refs*.p"), list[Reference])
    drawn: Instances = read_json(find(folder, "instances.json"), Instances)
    pictures, instances = {image.id: image for image in drawn.images}, {instance.id: instance for instance in drawn.annotations}
    place = image_folder(images, "train2014", "images")
    examples: list[Example] = []
    for reference in references:
        if reference.split not in ("val", "testA", "testB", "test"):
            continue
        picture, (left, top, width, height) = pictures[reference.image_id], instances[reference.ann_id].bbox
        x0, y0 = max(left / picture.width, 0), max(top / picture.height, 0)  # some boxes overhang the image by a fraction of a pixel
        box = (x0, y0, min((left + width) / picture.width, 1), min((top + height) / picture.height, 1))
        for number, sentence in enumerate(reference.sentences):
            example_id, image = f"{reference.ref_id}-{number}", place + picture.file_name
            question = BOX + sentence.sent + prompt
            examples.append(ask("refcoco", example_id, image, question, [format_box(box)], reference.split, sentence.sent))
    return Questions(examples, dict.fromkeys({example.task for example in examples}, Asking(box_rule, read=False)), images)


COCO = Benchmark(
    "coco",
    "COCO captions (Chen et al. 2015): perplexity of the first reference; CHAIR (Rohrbach et al. 2018): the share of descriptions without "
    "an object that is not there is 1 - CHAIR_s, hallucinated of all mentions is CHAIR_i, of descriptions of at most 64 tokens; version 2",
    ("captions_val*.json", "instances_val*.json", SYNONYMS),
    read_captions,
    prompt="",
    max_new_tokens=64,
)
REFCOCO = Benchmark(
    "refcoco",
    "RefCOCO (Yu et al. 2016): right from an IoU of one half on, and the mean IoU; no box counts 0; fractions, or thousandths where all "
    "four are whole numbers, never pixels; version 2",
    ("refs*.p", "instances.json"),
    read_refcoco,
    prompt="",
    max_new_tokens=64,
)
