"""All benchmarks by name, and the questions of one from wherever its source says."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import polars as pl

from headwise.benchmarks.benchmark import Benchmark, Source, drawn
from headwise.benchmarks.choice import CHOICES, SCIENCEQA
from headwise.benchmarks.coco import COCO, REFCOCO, chair_examples
from headwise.benchmarks.grounding import GROUNDING, own_grounding
from headwise.benchmarks.hallucination import MME, POPE, SETTINGS, pope_examples
from headwise.benchmarks.texts import TEXTS
from headwise.benchmarks.vqa import GQA, TEXTVQA, VIZWIZ, VQAV2
from headwise.evaluation.judgement import Asking, Questions
from headwise.evaluation.yes_no import pope_rule
from headwise.examples import OBJECTS, OBJECTS_FILE, read_examples
from headwise.files import read_table
from headwise.hub import dataset_folder, weights_digest

BENCHMARKS: dict[str, Benchmark] = {
    one.name: one for one in (VQAV2, GQA, TEXTVQA, VIZWIZ, SCIENCEQA, POPE, MME, COCO, REFCOCO, GROUNDING, *TEXTS, *CHOICES)
}
TASK_FILES = ("*.yaml", "*.py", "*.json", "*.jsonl", "*.csv", "*.parquet")
"""What defines a task for lmms-eval, and its questions where they lie beside it."""
OWN = {"pope": POPE, "coco": COCO, "grounding": GROUNDING}
"""Those that can be made from any data whose objects are known."""


def read_questions(source: Source, own: Path) -> Questions:
    """The benchmark's questions about the images that the source draws, in the order of their files.

    own: the folder of the run's own data, asked where the source names no files. Raises ValueError if a file is missing or broken, the
    images' folder is missing, or there is no question.
    """
    name, benchmark = source.name, BENCHMARKS[source.name]
    prompt = benchmark.prompt if source.prompt is None else source.prompt
    if not source.path:
        found = _own_questions(benchmark, source, own, prompt)
    else:
        folder = dataset_folder(source.path)
        images = Path(source.images).expanduser() if source.images else folder
        if not images.is_dir():
            raise ValueError(f"benchmarks.{name}.images = {source.images!r}: no such folder")
        found = benchmark.read(folder, images, prompt)
        if benchmark.held_out:
            found = replace(found, examples=[example for example in found.examples if example.id in benchmark.held_out])
    if unanswered := [example.id for example in found.examples if not example.answers and found.askings[example.task].read]:
        raise ValueError(f"benchmark {name!r}: {len(unanswered)} questions have no answer, such as {unanswered[0]}; is it a test split?")
    if not found.examples:
        raise ValueError(f"benchmark {name!r}: no question in {source.path or own}")
    return replace(found, examples=drawn(found.examples, source.limit, source.seed))


def _own_questions(benchmark: Benchmark, source: Source, own: Path, prompt: str) -> Questions:
    if benchmark.name not in OWN:
        made = ", ".join(OWN)
        raise ValueError(f"benchmark {benchmark.name}: no folder of its files; from the run's own data only {made} can be made")
    if benchmark is GROUNDING:
        return own_grounding(own)
    objects = evaluated_objects(own)
    if benchmark is POPE:
        return Questions(pope_examples(objects, source.seed, prompt), dict.fromkeys(SETTINGS, Asking(pope_rule)), own)
    return replace(chair_examples(objects, prompt), images=own)


def evaluated_objects(own: Path) -> dict[str, list[str]]:
    """What the objects in each image of the evaluation split are called. Raises ValueError where the data have no objects."""
    if not (own / OBJECTS_FILE).is_file():
        raise ValueError(f"{own}: no {OBJECTS_FILE}, so no object is known to ask about; give the benchmark's own files")
    objects = defaultdict[str, list[str]](list)
    for image, phrase in read_table(own / OBJECTS_FILE, OBJECTS).select("image", "phrase").iter_rows():
        objects[image].append(phrase)
    evaluated = sorted({example.image for example in read_examples(own, "evaluation") if example.image})
    return {image: objects[image] for image in evaluated if image in objects}


def authors_figures(split: str, answers: pl.DataFrame) -> dict[str, float | None]:
    """What a benchmark's authors report beside the mean of `right`, from all of its answers; empty where there is nothing of the kind.

    Raises ValueError where the answers are not enough for them.
    """
    figures = BENCHMARKS[split].figures if split in BENCHMARKS else None
    return dict(figures(answers)) if figures else {}


def files_digest(source: Source) -> str:
    """SHA-256 of the benchmark's files, the images apart; empty for one made from the run's own data, or that lmms-eval has of its own.

    Raises ValueError if there is no such file.
    """
    patterns = [f"**/{pattern}" for pattern in (TASK_FILES if source.harnessed else BENCHMARKS[source.name].files)]
    if not source.path:
        return ""
    folder = dataset_folder(source.path)
    if not any(path.is_file() for pattern in patterns for path in folder.glob(pattern)):
        wanted = ", ".join(pattern.removeprefix("**/") for pattern in patterns)
        raise ValueError(f"benchmark {source.name}: none of its files ({wanted}) in {source.path}")
    return weights_digest(folder, patterns)
