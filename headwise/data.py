"""The data set of a run: drawn scenes, composed photographs, or a folder of the user's own images, in one form on disk."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, get_args

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from headwise.benchmarks.benchmark import Text
from headwise.benchmarks.choice import CHOICES
from headwise.benchmarks.texts import TEXTS
from headwise.calibration.settings import Lora, training_examples
from headwise.compositions import Composition, split_of
from headwise.cutouts import Photographs, compose_photograph, installed_photographs, read_photographs
from headwise.examples import CAPTION, INDEX, OBJECTS, OBJECTS_FILE, BadExample, Example, decode_image, read_image, write_examples
from headwise.files import read_table, write_table
from headwise.leakage import BITS, MIN_DISTANCE
from headwise.masks import rle
from headwise.masks.coco import INSTANCES, read_coco
from headwise.reviews import reviews_folder
from headwise.scenes import compose_scene

Progress = Callable[[int, int], None]
"""Called with the number of items done and the number of all."""

FOLDER_SHARES = {"calibration": 0.5, "evaluation": 0.35, "forgetting": 0.15}
"""Of a folder's images, where the index names no split: by the checksum of an image's name, so that its questions stay together."""
Composed = Literal["scenes", "photos"]
COMPOSED: tuple[Composed, ...] = get_args(Composed)
FIELDS_OF = {
    "path": ("folder", "texts"),
    "texts": ("texts",),
    "prompt": ("texts",),
    "cutouts": ("photos",),
    "backgrounds": ("photos",),
    **dict.fromkeys(("variant", "forgetting"), COMPOSED),
    **dict.fromkeys(("calibration", "evaluation", "seed"), (*COMPOSED, "texts")),
}
"""The fields of DataSource that not every kind of data has a use for."""
MAX_QUESTIONS = 3
MIN_IMAGES = 2
"""Fewer images of a split say nothing about the spread between images, and so nothing about how sure a result is."""
INDEX_LINES = "index.jsonl"
TEXT_BENCHMARKS = {benchmark.name: benchmark for benchmark in (*TEXTS, *CHOICES)}
MASK_FILES = (OBJECTS_FILE, INSTANCES)
"""What a folder may have of exact masks; one without either gets masks made."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class DataSource:
    """Which images and questions a run works on."""

    kind: Annotated[
        Literal["scenes", "photos", "folder", "texts"],
        Field(
            description="drawn scenes, composed photographs (Debian's Tux Paint stamps on wallpapers), a folder of your own, or the texts "
            "of a benchmark without images"
        ),
    ] = "scenes"
    texts: Annotated[Text, Field(description="for kind `texts`: which benchmark")] = "reviews"
    prompt: Annotated[
        str | None,
        Field(
            description="for kind `texts`: put behind every text; null: the benchmark's question, or, without attention.chat_template, the "
            "beginning of a sentence to go on with"
        ),
    ] = None
    path: Annotated[
        str,
        Field(
            description="for kind `folder`: a folder of images with index.jsonl or index.parquet, and its masks if it has any; for `texts` "
            "the folder with the benchmark's files, empty: the movie reviews of `make reviews`"
        ),
    ] = ""
    cutouts: Annotated[
        str, Field(description="for kind `photos`: a folder of RGBA cut-outs (PNG) named in a text file beside each or by its file name")
    ] = ""
    backgrounds: Annotated[str, Field(description="for kind `photos`: a folder of photographs; empty: both from Debian's packages")] = ""
    variant: Annotated[
        Literal["plain", "drift"],
        Field(description="what calibration and evaluation show: like pretraining, or other light, noise, grounds and names"),
    ] = "drift"
    calibration: Annotated[int, Field(ge=MIN_IMAGES, description="images (texts) to score the heads on and to calibrate with")] = 160
    evaluation: Annotated[int, Field(ge=MIN_IMAGES, description="images (texts) held out for the before/after table")] = 60
    forgetting: Annotated[int, Field(ge=MIN_IMAGES, description="plain images of the forgetting probe, closed questions alone")] = 60
    seed: Annotated[int, Field(ge=0, description="seed of the images; the same seed gives the same bytes")] = 0
    min_distance: Annotated[
        int,
        Field(
            ge=0,
            le=BITS,
            description="an image to calibrate with and one to judge by look alike, and the run refuses, where fewer of the 256 bits of "
            "their perceptual hashes differ; 0 allows that",
        ),
    ] = MIN_DISTANCE
    max_bad_share: Annotated[float, Field(ge=0, le=1, description="share of rows that may be unusable before the step fails")] = 0.05

    def __post_init__(self) -> None:
        """Raises ValueError where a field was changed that this kind of data takes no notice of."""
        for name, kinds in FIELDS_OF.items():
            if self.kind not in kinds and getattr(self, name) != getattr(DataSource, name):
                raise ValueError(f"{name} is for {' and '.join(kinds)}, and the data are of kind {self.kind!r}")


def has_masks(source: DataSource) -> bool:
    """Whether the data have exact masks of their objects."""
    root = Path(source.path).expanduser()
    return source.kind in COMPOSED or any((root / name).is_file() for name in MASK_FILES)


def photographs(source: DataSource) -> Photographs:
    """The cut-outs and backgrounds that the source names, or those installed. Raises ValueError if they are too few, or one is missing."""
    if bool(source.cutouts) is not bool(source.backgrounds):
        raise ValueError("images.cutouts and images.backgrounds belong together: give both folders, or neither for Debian's packages")
    if not source.cutouts:
        return installed_photographs()
    return read_photographs(Path(source.cutouts).expanduser(), Path(source.backgrounds).expanduser())


def texts_folder(source: DataSource) -> Path:
    """Where the texts' files are. Raises ValueError if no folder is named and they are not the reviews, or those are not there."""
    if source.path:
        return Path(source.path).expanduser()
    if source.texts != "reviews":
        raise ValueError(f"images.path: empty; {source.texts} is read from the folder of its official files")
    return reviews_folder()


def text_prompt(source: DataSource, *, chat_template: bool) -> str:
    """What is put behind every text."""
    benchmark = TEXT_BENCHMARKS[source.texts]
    own = benchmark.prompt if chat_template or benchmark.completion is None else benchmark.completion
    return own if source.prompt is None else source.prompt


def _drawn_texts(source: DataSource) -> list[Example]:
    """So many of the texts to calibrate with, and so many others to judge by, drawn by the seed: one task, whatever the subjects. A text
    that stands there twice counts once. Those that the benchmark holds out are only judged by. Raises ValueError if there are fewer.
    """
    folder, benchmark = texts_folder(source), TEXT_BENCHMARKS[source.texts]
    read = benchmark.read(folder, folder, text_prompt(source, chat_template=True)).examples
    found = list({example.question: example for example in read}.values())
    shuffled = [found[place] for place in np.random.default_rng(source.seed).permutation(len(found))]
    judged = [one for one in shuffled if one.id in benchmark.held_out or not benchmark.held_out][: source.evaluation]
    reserved = benchmark.held_out | {one.id for one in judged}
    pools = {"calibration": [one for one in shuffled if one.id not in reserved][: source.calibration], "evaluation": judged}
    for split, wanted in (("calibration", source.calibration), ("evaluation", source.evaluation)):
        if len(pools[split]) < wanted:
            raise ValueError(f"{source.texts}: {len(pools[split])} texts for {split}, {wanted} are asked for: lower images.{split}")
    return [replace(example, split=split, task=source.texts) for split, pool in pools.items() for example in pool]


def write_data(source: DataSource, folder: Path, progress: Progress) -> dict[str, str]:
    """Write `index.parquet`, `objects.parquet` and `images/`; return the examples left out with their reasons.

    Raises ValueError if the source cannot give a data set at all.
    """
    (folder / "images").mkdir(parents=True)
    if source.kind == "folder":
        return _write_own(source, folder, progress)
    if source.kind == "texts":
        write_examples(_drawn_texts(source), folder)
        return {}
    examples, objects = [], []
    total = source.calibration + source.evaluation + source.forgetting
    for number, (name, split, composition) in enumerate(_composed(source), start=1):
        new_examples, new_objects = _write_composition(folder, name, split, composition)
        examples += new_examples
        objects += new_objects
        progress(number, total)
    write_examples(examples, folder)
    write_table(pa.Table.from_pylist(objects, schema=OBJECTS), folder / OBJECTS_FILE, OBJECTS)
    return {}


def source_inputs(source: DataSource) -> dict[str, Path | str]:
    """What the data set is made from apart from the code, for the manifest: the user's folder, or the digest of the photographs."""
    if source.kind == "folder":
        return {"source": Path(source.path).expanduser()}
    if source.kind == "texts":
        return {"source": texts_folder(source)}
    return {"photographs": photographs(source).digest()} if source.kind == "photos" else {}


def check_data(examples: Sequence[Example], training: Lora | None, min_images: int) -> None:
    """Find out before any model is loaded what a later step would stop for.

    Raises ValueError naming what is missing and what to do: an image in two splits, no caption to train on, fewer than `min_images` images
    to score the heads on, or in a split (in its captions, in its other questions) a single image or, where the split is needed, none.
    `forgetting` is not needed. training: None where nothing is trained.
    """
    splits: defaultdict[str, dict[str, str]] = defaultdict(dict)  # per content: an image of it in every split that it is in
    for example in examples:
        if example.image:
            splits[example.sha256 or example.image][example.split] = example.image
    if shared := [found for _, found in sorted(splits.items()) if len(found) > 1]:
        first = ", ".join(f"{image} in {split}" for split, image in sorted(shared[0].items()))
        raise ValueError(
            f"{len(shared)} images are in more than one split, such as {first}: give all rows of an image, and of its copies, the same "
            "`split`, or one would be judged by what one was trained on"
        )
    for split in FOLDER_SHARES:
        groups = {"captions": [e for e in examples if e.split == split and e.task == CAPTION]}
        groups["closed questions"] = [e for e in examples if e.split == split and e.task != CAPTION]
        numbers = {what: len({example.image or example.id for example in group}) for what, group in groups.items() if group}
        if few := [f"{what} about {number}" for what, number in numbers.items() if number < MIN_IMAGES]:
            raise ValueError(f"split {split!r} has {few[0]} image, {MIN_IMAGES} at least are needed: add images to it, or leave these out")
        if not numbers and split != "forgetting":
            raise ValueError(
                f"split {split!r} has no image, {MIN_IMAGES} at least are needed: add images, or share out those that are there by a "
                f"`split` ({', '.join(FOLDER_SHARES)}) in every row of the index"
            )
    calibration = [example for example in examples if example.split == "calibration"]
    if training is not None:
        training_examples(calibration, training)
    if (number := len({example.image or example.id for example in calibration})) < min_images:
        raise ValueError(
            f"split 'calibration' has {number} images, the heads need scores.min_images = {min_images} to be scored: add images to it, "
            "or lower the number"
        )


def _composed(source: DataSource) -> Iterator[tuple[str, str, Composition]]:
    """Name, split and composition of every image; the forgetting probe is always plain, like pretraining."""
    pictures = photographs(source) if source.kind == "photos" else None
    numbers = {"calibration": source.calibration, "evaluation": source.evaluation, "forgetting": source.forgetting}
    for split_number, (split, number) in enumerate(numbers.items(), start=1):
        drift = source.variant == "drift" and split != "forgetting"
        for i in range(number):
            rng = np.random.default_rng([2_000_000_000 + source.seed, split_number, i])
            if pictures is None:
                composition = compose_scene(rng, split, drift=drift)
            else:
                composition = compose_photograph(pictures, split, rng, drift=drift)
            yield f"{split}-{i:05d}", split, composition


def _write_composition(folder: Path, name: str, split: str, composition: Composition) -> tuple[list[Example], list[dict[str, object]]]:
    image = f"images/{name}.png"
    buffer = BytesIO()
    composition.image.save(buffer, format="PNG", compress_level=3)
    (folder / image).write_bytes(buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    caption, *closed = composition.questions
    asked = closed[: MAX_QUESTIONS + 1] if split == "forgetting" else [caption, *closed[:MAX_QUESTIONS]]
    examples = [
        Example(f"{name}-{k}", image, digest, question.question, (question.answer,), question.phrase, question.task, split)
        for k, question in enumerate(asked)
    ]
    objects: list[dict[str, object]] = [
        {"image": image, "object": k, "phrase": t.phrase, "height": t.mask.shape[0], "width": t.mask.shape[1], "rle": rle.encode(t.mask)}
        for k, t in enumerate(composition.things)
    ]
    return examples, objects


def _write_own(source: DataSource, folder: Path, progress: Progress) -> dict[str, str]:
    """Take over the user's images byte for byte; what cannot be used is left out with its reason."""
    root = Path(source.path).expanduser()
    rows = _read_index(root)
    ids = [f"{number:06d}" if row.get("id") is None else str(row["id"]) for number, row in enumerate(rows)]
    if len(set(ids)) < len(ids):
        twice = sorted({i for i in ids if ids.count(i) > 1})
        raise ValueError(f"{root}: {len(twice)} ids occur more than once in the index, the first is {twice[0]!r}")
    examples, bad, seen, names = [], {}, {}, {}
    for number, (example_id, row) in enumerate(zip(ids, rows, strict=True), start=1):
        try:
            examples.append(_own_example(root, folder, example_id, row, seen, names))
        except BadExample as error:
            bad[example_id] = str(error)
        progress(number, len(rows))
    write_examples(examples, folder)
    _write_own_objects(root, folder, {image: stored for image, (stored, _) in seen.items()})
    return bad


def _read_index(root: Path) -> list[dict[str, object]]:
    """The rows of index.parquet or index.jsonl. Raises ValueError naming what is wrong with the folder, the file or a line."""
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; `path` names a folder with images and {INDEX_LINES} (image, question, answers per line)")
    found = [root / name for name in (INDEX, INDEX_LINES) if (root / name).is_file()]
    if len(found) != 1:
        raise ValueError(f"{root}: {'both' if found else 'neither'} {INDEX_LINES} {'and' if found else 'nor'} {INDEX} in it; one is needed")
    path = found[0]
    rows = _parquet_rows(path) if path.name == INDEX else _json_rows(path)
    if not rows:
        raise ValueError(f"{path}: empty; give a row (image, question, answers) per question")
    return rows


def _parquet_rows(path: Path) -> list[dict[str, object]]:
    try:
        return pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({error}); write it again, or give {INDEX_LINES} in its place") from error


def _json_rows(path: Path) -> list[dict[str, object]]:
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # no JSON, or no UTF-8
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
        rows.append(row)
    return rows


def _own_example(
    root: Path, folder: Path, example_id: str, row: dict[str, object], seen: dict[str, tuple[str, str]], names: dict[str, str]
) -> Example:
    """Check one row, and copy its image once, whatever it is called: copies are one image to every statistic. Raises BadExample with the
    reason.

    seen: the stored name and the digest of each image of the index so far; names: the stored name of each digest.
    """
    image, question = row.get("image"), row.get("question")
    answers = _answers(row)
    if not isinstance(image, str) or not image:
        raise BadExample("no image in the index")
    if not isinstance(question, str) or not question.strip():
        raise BadExample("no question in the index")
    if not answers:
        raise BadExample("no answer in the index")
    if image not in seen:
        content = read_image(root, image)
        decode_image(content, image)
        digest = hashlib.sha256(content).hexdigest()
        seen[image] = (names.setdefault(digest, f"images/{_stored_name(image, digest)}"), digest)
        (folder / seen[image][0]).write_bytes(content)
    split = row.get("split") or split_of(image, FOLDER_SHARES)
    if split not in FOLDER_SHARES:
        raise BadExample(f"unknown split {split!r}; the splits are {list(FOLDER_SHARES)}")
    stored, digest = seen[image]
    phrase = row.get("phrase")
    task = str(row.get("task") or "vqa")
    return Example(example_id, stored, digest, question, answers, str(phrase) if phrase else None, task, str(split))


def _stored_name(image: str, digest: str) -> str:
    """A flat name in which the user's own can be recognised: `cats/tom 1.JPG` is `tom-1-0f1e2d3c4b5a6978.jpg`."""
    path = PurePosixPath(image)
    stem = re.sub(r"[^A-Za-z0-9]+", "-", path.stem).strip("-")[:40]
    return f"{stem}-{digest[:16]}{path.suffix.lower()}".lstrip("-")


def _answers(row: dict[str, object]) -> tuple[str, ...]:
    """What stands under `answers` (a list, or one alone) or else under `answer`: texts, and numbers as texts."""
    given = row.get("answers") or row.get("answer")
    several = given if isinstance(given, list) else [given]
    return tuple(text for answer in several if isinstance(answer, str | int | float) and (text := str(answer).strip()))


def _write_own_objects(root: Path, folder: Path, stored: dict[str, str]) -> None:
    """Take over the exact masks where there are any, under the images' new names."""
    files = [root / name for name in MASK_FILES if (root / name).is_file()]
    if not files:
        return
    if len(files) > 1:
        raise ValueError(f"{root}: both {' and '.join(MASK_FILES)} in it; one is needed")
    own = read_table(files[0], OBJECTS) if files[0].name == OBJECTS_FILE else read_coco(root, stored)
    empty = own.is_empty() and files[0].name == OBJECTS_FILE  # COCO's is read for these images alone
    if stored and not empty and not own["image"].is_in(list(stored)).any():
        raise ValueError(f"{files[0]}: no object of an image that the index names, such as {min(stored)!r}; images are named as there")
    kept = own.filter(pl.col("image").is_in(list(stored))).with_columns(pl.col("image").replace_strict(stored, return_dtype=pl.String))
    kept = kept.unique(["image", "object"], keep="first", maintain_order=True)  # copies of an image, each with its objects
    write_table(kept, folder / OBJECTS_FILE, OBJECTS)
