"""What a benchmark is, and how its questions are read from its official files."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import polars as pl
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as settings_class

from headwise.evaluation.judgement import Questions
from headwise.examples import Example
from headwise.leakage import BITS, MIN_DISTANCE

Figures = Callable[[pl.DataFrame], Mapping[str, float | None]]
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""What LLaVA's evaluations, and lmms-eval's after them, put behind a question with a short answer."""


Pictured = Literal["vqav2", "gqa", "textvqa", "vizwiz", "scienceqa", "pope", "mme", "coco", "refcoco", "grounding"]
Text = Literal["sst2", "mr", "reviews", "sst5", "subj", "trec", "cb", "boolq", "arc", "mmlu", "aqua", "mathqa", "logiqa", "csqa", "piqa"]
TEXT_NAMES: tuple[Text, ...] = get_args(Text)
LMMS = "lmms-"
Harnessed = Annotated[str, Field(pattern=f"^{LMMS}[A-Za-z0-9_-]+$")]
"""A task of lmms-eval, which asks and judges it."""
BenchmarkName = Pictured | Text | Harnessed


@settings_class(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class Source:
    """A benchmark: where its files are, and how much of it is asked."""

    name: Annotated[
        BenchmarkName,
        Field(
            description="which benchmark; pope, coco and grounding can also be made from the run's own data; "
            f"{LMMS}TASK: a task of lmms-eval"
        ),
    ]
    path: Annotated[
        str,
        Field(
            description="folder with the official files, or a data set's id on the Hugging Face Hub; empty: from the run's own data; for "
            "lmms-eval the folder that defines the task, empty: one of its own"
        ),
    ] = ""
    images: Annotated[str, Field(description="folder of the images, where it is another")] = ""
    limit: Annotated[int, Field(ge=0, description="images at most (lmms-eval: questions), drawn by the seed; 0: all")] = 0
    seed: Annotated[int, Field(ge=0, description="seed of the images drawn, and of questions made from the run's own data")] = 0
    min_distance: Annotated[int, Field(ge=0, le=BITS, description="as images.min_distance, for the benchmark's images")] = MIN_DISTANCE
    prompt: Annotated[str | None, Field(description="put behind every question; null: the benchmark's own words")] = None

    def __post_init__(self) -> None:
        """Raises ValueError on a limit of one image, which no interval can be drawn from."""
        if self.limit == 1:
            raise ValueError("limit = 1: a single image has no interval; give 2 or more, or 0 for all")

    @property
    def harnessed(self) -> str | None:
        """The name of the task in lmms-eval; None where Headwise reads the benchmark itself."""
        return self.name.removeprefix(LMMS) if self.name.startswith(LMMS) else None


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. protocol: what a figure of it means, with a number that changes when that does. read: the questions from the folder
    of its files and that of its images, with the prompt. figures: what its authors report beside the mean of `right`.
    max_new_tokens: the longest answer, where it needs more than a word. completion: in the prompt's place where no chat template writes
    the turns. held_out: the only examples by which calibrations are judged, as others were looked at; none: any.
    """

    name: str
    protocol: str
    files: tuple[str, ...]
    read: Callable[[Path, Path, str], Questions]
    prompt: str = SHORT_ANSWER
    figures: Figures | None = None
    max_new_tokens: int | None = None
    completion: str | None = None
    held_out: frozenset[str] = frozenset()


def ask(
    benchmark: str, example_id: str, image: str | None, question: str, answers: Sequence[str], task: str, phrase: str | None = None
) -> Example:
    """A question of a benchmark; its answers are compared as a split of that name."""
    return Example(f"{benchmark}/{example_id}", image, None, question, tuple(answers), phrase, task, benchmark)


def drawn(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    """The examples of `limit` images (of `limit` texts where there are no images), whichever the seed says; all with a limit of 0."""
    groups = {example.image or example.id for example in examples}
    if not limit or limit >= len(groups):
        return list(examples)
    chosen = set(sorted(groups, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())[:limit])
    return [example for example in examples if (example.image or example.id) in chosen]


def of_shard(examples: Sequence[Example], shard: int, num_shards: int) -> list[Example]:
    """The examples of every `num_shards`-th image."""
    place = {name: number for number, name in enumerate(sorted({example.image or example.id for example in examples}))}
    return [example for example in examples if place[example.image or example.id] % num_shards == shard]


def find(folder: Path, *patterns: str) -> Path:
    """The one file that fits the first pattern which any fits. Raises ValueError naming what was looked for, or all that were found."""
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise ValueError(f"{folder}: {len(found)} files {pattern} ({', '.join(path.name for path in found[:3])}), one is needed")
        if found:
            return found[0]
    raise ValueError(f"{folder}: no file {' or '.join(patterns)}, which this benchmark is published as")


def image_folder(root: Path, *names: str) -> str:
    """The first of these folders that is there, with a slash; the root itself where none is."""
    return next((f"{name}/" for name in names if (root / name).is_dir()), "")


def read_json(path: Path, type_: Any) -> Any:
    """The file's content as the type. Raises ValueError naming the file and what is wrong in it."""
    return validate(path, type_, _decoded(path, path.read_bytes()))


def read_json_lines(path: Path, type_: Any) -> list[Any]:
    """An entry of the type per line that is not empty. Raises ValueError naming the file, the line and what is wrong in it."""
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(path.read_bytes().splitlines(), start=1) if line.strip()]
    return [validate(place, type_, _decoded(place, line)) for place, line in lines]


def _decoded(place: object, content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{place}: not JSON ({error})") from error


def validate(place: object, type_: Any, content: object) -> Any:
    """The content as the type. Raises ValueError with the place and the first thing that is wrong."""
    try:
        return TypeAdapter(type_).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(": ".join([str(place), *([".".join(map(str, first["loc"]))] if first["loc"] else []), first["msg"]])) from error
