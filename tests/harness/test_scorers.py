"""The native rules against lmms-eval 0.7.3's own, on the same answers; where they differ, which, and why."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from headwise.evaluation.boxes import box_rule, format_box
from headwise.evaluation.choices import choice_rule, options_text
from headwise.evaluation.judgement import Rule
from headwise.evaluation.vqa import exact_rule, vqa_rule
from headwise.evaluation.yes_no import mme_rule, pope_rule
from headwise.examples import Example
from headwise.harness.request import harness_python

pytestmark = pytest.mark.slow
ANNOTATORS = (
    ("two", "2", "2", "Two.", "two", "3", "a two", "three", "2", "deux"),
    ("red", "red car", "the red car", "Red", "a red car", "red, white", "red white", "red-white", "reddish", "red"),
    ("don't walk", "dont walk", "Don't walk", "do not walk", "dont walk", "stop", "STOP", "stop!", "don't walk", "no walking"),
    ("10:30", "10:30", "1030", "10 30", "half past ten", "10:30 am", "10:30.", "10:30", "ten thirty", "10:30"),
    ("1,000", "1000", "1000", "1,000", "1,000", "1 000", "thousand", "1000.", "a thousand", "1000"),
)
SHORT = ("two", "2", "Two.", "a two", "the red car", "red car", "Red", "red, white", "red-white", "dont walk", "don't walk", "Do not walk")
SHORT += ("STOP!", "stop", "10:30", "10 30", "1,000", "1000", "1000.", "none", "", " ", "deux", "red\ncar", "red\tcar")
YES_NO = (
    "Yes",
    "yes",
    "yes.",
    "No",
    "no",
    "NO",
    "no.",
    " No ",
    "Yes, there is",
    "No, there is none",
    "There is not",
    "nothing",
    "",
    "maybe",
)
YES_NO += ("y", "n", "N.", "x", "Not at all", "I know", "A no", "Eyes", "It is not")
LETTERS = (
    "B",
    " b ",
    "B.",
    "b.",
    "(B)",
    "B. a bat",
    "C. a hen",
    "B) a bat",
    "B: a bat",
    "The answer is B.",
    "a bat",
    "D",
    "",
    "A shark",
    "BC",
)
PHRASES = ("red", "Red", "red.", " red ", "RED!", "dark red", "", "blue")
BOXES = (
    "[0.1, 0.2, 0.5, 0.6]",
    "It is at [0.1,0.2,0.5,0.6].",
    "[0, 0, 1, 1]",
    "[0.3, 0.2, 0.5, 0.6]",
    "[0.6, 0.7, 0.9, 0.9]",
    "nowhere",
    "",
)
BOXES += ("(100,200),(500,600)", "[0.1, 0.2, 0.5]", "0.1 0.2 0.5 0.6")


@dataclass(frozen=True)
class Benchmark:
    """differ: the answers on which the two disagree, all of them, for a reason that the protocol states."""

    rule: Rule
    answers: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    module: str | None
    function: str
    document: Callable[[tuple[str, ...]], dict[str, Any]]
    differ: tuple[str, ...] = ()
    question: str = "?"


def annotated(references: tuple[str, ...]) -> dict[str, Any]:
    return {"question_id": 1, "answers": [{"answer": answer, "answer_id": place} for place, answer in enumerate(references)]}


def listed(references: tuple[str, ...]) -> dict[str, Any]:
    return {"question_id": 1, "answers": list(references)}


def labelled(references: tuple[str, ...]) -> dict[str, Any]:
    return {"question_id": 1, "answer": references[0], "category": "count"}


OPTIONS = ("a shark", "a bat", "a hen")
BOX = (0.1, 0.2, 0.5, 0.6)
LABELS = (("yes",), ("no",))
BENCHMARKS = {
    "vqav2": Benchmark(vqa_rule, SHORT, ANNOTATORS, "vqav2/utils", "vqav2_process_results_val", annotated),
    "textvqa": Benchmark(vqa_rule, SHORT, ANNOTATORS, "textvqa/utils", "textvqa_process_results", listed),
    "vizwiz": Benchmark(vqa_rule, SHORT, ANNOTATORS, "vizwiz_vqa/utils", "vizwiz_vqa_process_results", listed),
    # theirs keeps the spaces around an answer, which no generated answer has, and drops every punctuation mark
    "gqa": Benchmark(exact_rule, PHRASES, (("red",),), None, "", labelled, differ=(" red ", "RED!")),
    # POPE's own program reads the first sentence, and whatever denies nothing as a yes; theirs takes the bare word alone
    "pope": Benchmark(
        pope_rule, YES_NO, LABELS, "pope/utils", "pope_process_results", labelled, differ=YES_NO[5:7] + YES_NO[8:] + ("yes.",)
    ),
    "mme": Benchmark(mme_rule, YES_NO, LABELS, "mme/utils", "mme_process_results", labelled),
    "scienceqa": Benchmark(
        choice_rule,
        LETTERS,
        (("B",),),
        "scienceqa/utils",
        "sqa_process_results",
        lambda _: {"choices": list(OPTIONS), "answer": 1},
        differ=("b.", "(B)", "B) a bat", "B: a bat", "The answer is B."),  # theirs: the letter alone, or a capital and a full stop
        question=f"?\n{options_text(OPTIONS)}",
    ),
    "refcoco": Benchmark(
        box_rule,
        BOXES,
        ((format_box(BOX),),),
        "refcoco/utils_rec",
        "refcoco_bbox_rec_process_result",
        lambda _: {"question_id": 1, "answer": "dog", "bbox": list(BOX)},
        differ=("(100,200),(500,600)", "0.1 0.2 0.5 0.6"),  # theirs: square brackets alone, and no thousandths
    ),
}


@dataclass(frozen=True)
class Scored:
    """An answer, what the native rule gives it, and the case for lmms-eval."""

    answer: str
    native: float | None
    case: dict[str, Any]


def scored(name: str) -> list[Scored]:
    own, found = BENCHMARKS[name], []
    for references in own.references:
        for answer in own.answers:
            judged = own.rule(answer, Example("q", None, None, own.question, references, None, "count", name))
            case = {"module": own.module, "function": own.function, "document": own.document(references), "answer": answer}
            found.append(Scored(answer, judged.part if name == "refcoco" else judged.right, {**case, "target": references[0]}))
    return found


@pytest.fixture(scope="module")
def theirs() -> dict[str, list[float]]:
    cases = [(name, each.case) for name in BENCHMARKS for each in scored(name)]
    script, given = Path(__file__).parent / "lmms_scores.py", json.dumps([case for _, case in cases])
    done = subprocess.run([harness_python(), script], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures: dict[str, list[float]] = {}
    for (name, _), figure in zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True):
        figures.setdefault(name, []).append(figure)
    return figures


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_native_rule_agrees_with_lmms_eval_on_all_but_the_answers_named(name: str, theirs: dict[str, list[float]]) -> None:
    differ = {own.answer for own, other in zip(scored(name), theirs[name], strict=True) if own.native != pytest.approx(other)}
    assert differ == set(BENCHMARKS[name].differ)
