"""Is it there? POPE and MME from their official files, and POPE's questions made from any data with known objects."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from pydantic import BaseModel

from headwise.benchmarks.benchmark import Benchmark, ask, find, image_folder, read_json_lines
from headwise.compositions import article
from headwise.evaluation.judgement import Asking, Questions
from headwise.evaluation.yes_no import COGNITION, PERCEPTION, mme_figures, mme_rule, pope_figures, pope_rule
from headwise.examples import Example

SETTINGS = ("random", "popular", "adversarial")
"""How POPE draws the objects that are not there: any, the commonest of all images, those that stand beside the image's own most often."""
PER_IMAGE = 3
"""Objects that are there, and as many that are not, asked about in each image and setting, as in the paper."""


class PopeLine(BaseModel):
    """A question of POPE."""

    question_id: int
    image: str
    text: str
    label: Literal["yes", "no"]


def read_pope(folder: Path, images: Path, prompt: str) -> Questions:
    """A task per setting: random (2,910 lines in its first version, 3,000 in its present one), popular, adversarial."""
    place = image_folder(images, "val2014", "images")
    examples: list[Example] = []
    for setting in SETTINGS:
        lines: list[PopeLine] = read_json_lines(find(folder, f"*pope_{setting}.json", f"**/*pope_{setting}.json"), PopeLine)
        examples += [
            ask("pope", f"{setting}-{number}", place + line.image, line.text + prompt, [line.label], setting)
            for number, line in enumerate(lines)
        ]
    return Questions(examples, dict.fromkeys(SETTINGS, Asking(pope_rule)), images)


def pope_examples(objects: Mapping[str, Sequence[str]], seed: int, prompt: str) -> list[Example]:
    """POPE's questions about images whose objects are known (image: names), by the paper's three ways to draw the absent ones.

    Of every image as many objects that are there as that are not, PER_IMAGE at most; images all of whose names there are have no question.
    """
    present = {image: sorted(set(names)) for image, names in sorted(objects.items())}
    number = Counter(name for names in present.values() for name in names)
    popular = sorted(number, key=lambda name: (-number[name], name))
    together = Counter(pair for names in present.values() for pair in combinations(names, 2))
    examples: list[Example] = []
    for place, (image, own) in enumerate(present.items()):
        absent = [name for name in popular if name not in own]
        if not absent or not own:
            continue
        rng = np.random.default_rng([seed, place])
        beside = {name: sum(together[min(name, other), max(name, other)] for other in own) for name in absent}
        drawn = {
            "random": [absent[i] for i in rng.permutation(len(absent))],
            "popular": absent,
            "adversarial": sorted(absent, key=lambda name: -beside[name]),
        }
        asked = [own[i] for i in rng.permutation(len(own))[: min(PER_IMAGE, len(absent))]]
        for setting, names in drawn.items():
            pairs = [*((name, "yes") for name in asked), *((name, "no") for name in names[: len(asked)])]
            for k, (name, label) in enumerate(pairs):
                question, phrase = f"Is there {article(name)} in the image?{prompt}", name if label == "yes" else None
                examples.append(ask("pope", f"{setting}-{image}-{k}", image, question, [label], setting, phrase))
    return examples


def read_mme(folder: Path, images: Path, prompt: str) -> Questions:
    """A task per category: a folder with a text file per image, a line per question (question, tab, answer), beside the images or in
    `questions_answers_YN`.
    """
    examples: list[Example] = []
    for category in (*PERCEPTION, *COGNITION):
        texts = folder / category / "questions_answers_YN" if (folder / category / "questions_answers_YN").is_dir() else folder / category
        pictures = images / category / "images" if (images / category / "images").is_dir() else images / category
        for file in sorted(texts.glob("*.txt")):
            image = _picture(pictures, file.stem).relative_to(images).as_posix()
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            for number, line in enumerate(lines):
                question, _, answer = line.rpartition("\t")
                label = answer.strip().lower().replace(".", "")
                if not question or label not in ("yes", "no"):
                    raise ValueError(f"{file}, line {number + 1}: not a question, a tab and Yes or No")
                examples.append(ask("mme", f"{category}-{file.stem}-{number}", image, question.strip() + prompt, [label], category))
    if not examples:
        raise ValueError(f"{folder}: none of MME's categories is a folder here ({', '.join(PERCEPTION[:3])}, ...)")
    return Questions(examples, dict.fromkeys({example.task for example in examples}, Asking(mme_rule)), images)


def pope_by_setting(answers: pl.DataFrame) -> dict[str, float | None]:
    """`pope_figures` of each setting, as POPE's authors report them."""
    settings = sorted(answers.group_by("task"), key=lambda group: str(group[0][0]))
    return {f"{setting}, {name}": figure for (setting,), rows in settings for name, figure in pope_figures(rows).items()}


def _picture(folder: Path, stem: str) -> Path:
    return find(folder, *(f"{stem}.{ending}" for ending in ("jpg", "png", "jpeg")))


POPE = Benchmark(
    "pope",
    "POPE (Li et al. 2023): no where the first sentence has No, no or not, else yes; per setting; version 1",
    tuple(f"*pope_{setting}.json" for setting in SETTINGS),
    read_pope,
    figures=pope_by_setting,
)
MME = Benchmark(
    "mme",
    "MME (Fu et al. 2023): yes or no in the first four letters; accuracy plus accuracy of pairs, in percent, per category; version 1",
    ("**/*.txt",),
    read_mme,
    prompt="",
    figures=mme_figures,
)
