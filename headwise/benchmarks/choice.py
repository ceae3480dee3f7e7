"""Multiple choice, from the files their authors publish."""

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel

from headwise.benchmarks.benchmark import Benchmark, ask, find, image_folder, read_json, read_json_lines
from headwise.evaluation.choices import choice_rule, letter, options_text
from headwise.evaluation.judgement import Asking, Questions
from headwise.examples import Example

CHOICE = Asking(choice_rule)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER = "\nAnswer with the option's letter from the given choices directly."
RULE = "the letter alone, at the beginning, or after 'the answer is'; anything else is invalid and wrong; version 1"


class Problem(BaseModel):
    """A problem of ScienceQA; `answer` is the place of the right choice."""

    question: str
    choices: list[str]
    answer: int
    hint: str
    image: str | None
    subject: str


def read_scienceqa(folder: Path, images: Path, prompt: str) -> Questions:
    """The test split, with and without images; tasks are the subjects, with `, image` where there is one."""
    problems: dict[str, Problem] = read_json(find(folder, "problems.json", "**/problems.json"), dict[str, Problem])
    splits: dict[str, list[str]] = read_json(find(folder, "pid_splits.json", "**/pid_splits.json"), dict[str, list[str]])
    place = image_folder(images, "images/test", "test")
    examples: list[Example] = []
    for name in splits["test"]:
        problem = problems[name]
        hint = f"Context: {problem.hint}\n" if problem.hint else ""
        question = f"{hint}{problem.question}\n{options_text(problem.choices)}{prompt}"
        image = f"{place}{name}/{problem.image}" if problem.image else None
        task = problem.subject + (", image" if image else "")
        answers = (letter(problem.answer), problem.choices[problem.answer])
        examples.append(ask("scienceqa", name, image, question, answers, task))
    return Questions(examples, dict.fromkeys({example.task for example in examples}, CHOICE), images)


class Option(BaseModel):
    """An option of ARC or CommonsenseQA."""

    text: str
    label: str


class Stem(BaseModel):
    """A question with its options."""

    stem: str
    choices: list[Option]


class Asked(BaseModel):
    """A line of ARC or CommonsenseQA; `answerKey` is the label of the right option, a letter or a number."""

    id: str
    question: Stem
    answerKey: str  # noqa: N815


class AquaLine(BaseModel):
    """A line of AQuA: options that begin with their letter and a bracket."""

    question: str
    options: list[str]
    correct: str


class MathProblem(BaseModel):
    """A problem of MathQA: all options in one text, `a ) 38 , b ) 27`."""

    Problem: str
    options: str
    correct: str


class Goal(BaseModel):
    """A goal of PIQA with two ways to reach it."""

    goal: str
    sol1: str
    sol2: str


Choice = tuple[str, str, str, list[str], int]
"""An example's id, its task, the question, its options, and the place of the right one."""


def read_arc(path: Path) -> Iterator[Choice]:
    """ARC's and CommonsenseQA's lines; options with numbers are asked about by letters."""
    lines: list[Asked] = read_json_lines(path, Asked)
    for one in lines:
        labels = [option.label for option in one.question.choices]
        if one.answerKey not in labels:
            raise ValueError(f"{path}: question {one.id} has no option {one.answerKey!r}")
        yield one.id, "choice", one.question.stem, [option.text for option in one.question.choices], labels.index(one.answerKey)


def read_mmlu(path: Path) -> Iterator[Choice]:
    """One of MMLU's files, a subject each: question, four options, the letter."""
    subject = path.stem.removesuffix("_test")
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file)):
            if len(row) != 6 or row[5] not in tuple(LETTERS[:4]):
                raise ValueError(f"{path}, row {number + 1}: a question, four options and a letter of A to D are needed")
            yield f"{subject}/{number:05d}", subject, row[0], row[1:5], LETTERS.index(row[5])


def read_aqua(path: Path) -> Iterator[Choice]:
    """AQuA's lines."""
    lines: list[AquaLine] = read_json_lines(path, AquaLine)
    for number, line in enumerate(lines):
        texts = [option.partition(")")[2] for option in line.options]
        yield f"{number:05d}", "choice", line.question, texts, _place(path, number, line.correct, len(texts))


def read_mathqa(path: Path) -> Iterator[Choice]:
    """MathQA's problems."""
    problems: list[MathProblem] = read_json(path, list[MathProblem])
    for number, problem in enumerate(problems):
        texts = [text.strip(" ,") for text in re.split(r"(?:^|,)\s*[a-e] \)", problem.options)[1:]]
        yield f"{number:05d}", "choice", problem.Problem, texts, _place(path, number, problem.correct, len(texts))


def read_logiqa(path: Path) -> Iterator[Choice]:
    """LogiQA's blocks of eight lines: an empty one, the letter, the context, the question, four options with their letters."""
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    if len(lines) % 8:
        raise ValueError(f"{path}: {len(lines)} lines, which are no blocks of eight")
    for number, block in enumerate(lines[start : start + 8] for start in range(0, len(lines), 8)):
        _, right, context, question, *options = (line.strip() for line in block)
        texts = [option.partition(".")[2].strip() for option in options]
        yield f"{number:05d}", "choice", f"{context}\n{question}", texts, _place(path, number, right, len(texts))


def read_piqa(path: Path) -> Iterator[Choice]:
    """PIQA's goals, their labels in the `.lst` file beside them."""
    goals: list[Goal] = read_json_lines(path, Goal)
    beside = path.with_name(f"{path.stem}-labels.lst")
    labels = beside.read_text(encoding="utf-8").split() if beside.is_file() else []
    if len(labels) != len(goals):
        raise ValueError(f"{beside}: {len(labels)} labels for {len(goals)} goals")
    for number, (goal, label) in enumerate(zip(goals, labels, strict=True)):
        if label not in ("0", "1"):
            raise ValueError(f"{beside}, line {number + 1}: {label!r}, where 0 or 1 is needed")
        yield f"{number:05d}", "choice", goal.goal, [goal.sol1, goal.sol2], int(label)


def _place(path: Path, number: int, correct: str, options: int) -> int:
    place = LETTERS.find(correct.upper())
    if len(correct) != 1 or not 0 <= place < options:
        raise ValueError(f"{path}, question {number}: {correct!r} is none of its {options} options")
    return place


def _choice(name: str, source: str, files: tuple[str, ...], rows: Callable[[Path], Iterator[Choice]]) -> Benchmark:
    """Text alone, from each of the files that fit the first pattern which any fits."""

    def read(folder: Path, images: Path, prompt: str) -> Questions:
        paths = next((found for pattern in files if (found := sorted(folder.glob(pattern)))), None)
        if paths is None:
            raise ValueError(f"{folder}: no file {' or '.join(files)}, which this benchmark is published as")
        examples = [
            ask(name, example_id, None, f"{question}\n{options_text(texts)}{prompt}", (letter(right), texts[right]), task)
            for path in paths
            for example_id, task, question, texts, right in rows(path)
        ]
        return Questions(examples, dict.fromkeys({example.task for example in examples}, CHOICE), images)

    return Benchmark(name, f"{source}: {RULE}", files, read, prompt=LETTER, completion="\nAnswer:")


SCIENCEQA = Benchmark(
    "scienceqa", f"ScienceQA (Lu et al. 2022), test: {RULE}", ("problems.json", "pid_splits.json"), read_scienceqa, prompt=LETTER
)
CHOICES = (
    _choice("arc", "ARC (Clark et al. 2018), test", ("*Test.jsonl",), read_arc),
    _choice("mmlu", "MMLU (Hendrycks et al. 2021), test", ("test/*_test.csv", "*_test.csv"), read_mmlu),
    _choice("aqua", "AQuA (Ling et al. 2017), test", ("test.json",), read_aqua),
    _choice("mathqa", "MathQA (Amini et al. 2019), test", ("test.json",), read_mathqa),
    _choice("logiqa", "LogiQA (Liu et al. 2020), test", ("Test.txt",), read_logiqa),
    _choice("csqa", "CommonsenseQA (Talmor et al. 2019), dev", ("dev_rand_split.jsonl",), read_arc),
    _choice("piqa", "PIQA (Bisk et al. 2020), valid", ("valid.jsonl",), read_piqa),
)
