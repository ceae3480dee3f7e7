"""Multiple choice: ScienceQA and ARC, from the files their authors publish."""

from pathlib import Path

from pydantic import BaseModel

from headwise.benchmarks.benchmark import Benchmark, ask, find, image_folder, read_json, read_json_lines
from headwise.evaluation.choices import choice_rule, letter, options_text
from headwise.evaluation.judgement import Asking, Questions
from headwise.examples import Example

CHOICE = Asking(choice_rule)
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


class ArcChoice(BaseModel):
    """An option of ARC."""

    text: str
    label: str


class ArcStem(BaseModel):
    """A question of ARC with its options."""

    stem: str
    choices: list[ArcChoice]


class ArcQuestion(BaseModel):
    """A line of ARC; `answerKey` is the label of the right option, a letter or a number."""

    id: str
    question: ArcStem
    answerKey: str  # noqa: N815


def read_arc(folder: Path, images: Path, prompt: str) -> Questions:
    """Text alone; options with numbers are asked about by letters."""
    asked: list[ArcQuestion] = read_json_lines(find(folder, "*Test.jsonl"), ArcQuestion)
    examples: list[Example] = []
    for one in asked:
        labels, texts = [choice.label for choice in one.question.choices], [choice.text for choice in one.question.choices]
        if one.answerKey not in labels:
            raise ValueError(f"{folder}: question {one.id} has no option {one.answerKey!r}")
        right = labels.index(one.answerKey)
        question = f"{one.question.stem}\n{options_text(texts)}{prompt}"
        examples.append(ask("arc", one.id, None, question, (letter(right), texts[right]), "choice"))
    return Questions(examples, {"choice": CHOICE}, images)


SCIENCEQA = Benchmark(
    "scienceqa", f"ScienceQA (Lu et al. 2022), test: {RULE}", ("problems.json", "pid_splits.json"), read_scienceqa, prompt=LETTER
)
ARC = Benchmark("arc", f"ARC (Clark et al. 2018), test: {RULE}", ("*Test.jsonl",), read_arc, prompt=LETTER)
