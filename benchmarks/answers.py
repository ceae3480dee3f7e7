"""Answers a second of the embedded model to questions about drawn scenes, those of their own, three an image, and POPE's, about fourteen:
generated one by one, generated in batches, and as an evaluation asks (one image read for all its questions; where the reference is the
likeliest answer, nothing is generated).

`python benchmarks/answers.py [IMAGES]` prints one JSON line for each last: questions per second of each side, the medians of the ratios to
one by one over paired runs, in how many answers the sides differ, and how fast an evaluation is that finds every response kept.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from headwise.benchmarks.benchmark import Source
from headwise.benchmarks.registry import read_questions
from headwise.data import DataSource, write_data
from headwise.evaluation.evaluate import evaluate, own_questions
from headwise.evaluation.judgement import Questions
from headwise.evaluation.responses import Responses
from headwise.evaluation.settings import Evaluation
from headwise.examples import CAPTION, Example, open_image, read_examples
from headwise.observation import EMBEDDED
from headwise.vlm import VLM, generate, load_vlm

IMAGES, RUNS = 24, 3
SETTINGS = Evaluation()
Answers = dict[str, str]


def one_by_one(vlm: VLM, questions: Questions) -> Answers:
    return {e.id: said for e in questions.examples for said in _said(vlm, questions.images, [e])}


def in_batches(vlm: VLM, questions: Questions) -> Answers:
    ordered = sorted(questions.examples, key=lambda e: len(vlm.tokenizer(e.question)["input_ids"]))
    size, found = SETTINGS.batch_size, Answers()
    for batch in (ordered[start : start + size] for start in range(0, len(ordered), size)):
        found |= zip((e.id for e in batch), _said(vlm, questions.images, batch), strict=True)
    return found


def _said(vlm: VLM, folder: Path, batch: list[Example]) -> list[str]:
    return generate(vlm, [open_image(folder, e) for e in batch], [e.question for e in batch], SETTINGS.max_new_tokens)


def evaluation(vlm: VLM, questions: Questions, path: Path | None = None) -> Answers:
    answers, _ = evaluate(vlm, questions, SETTINGS, Responses(path, {}), lambda _done, _all: None)
    return dict(answers.select("example_id", "answer").iter_rows())


SIDES: dict[str, Callable[[VLM, Questions], Answers]] = {"one by one": one_by_one, "in batches": in_batches, "evaluation": evaluation}


def measure(vlm: VLM, name: str, questions: Questions, runs: int, kept: Path) -> dict[str, object]:
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    found: dict[str, Answers] = {}
    number = len(questions.examples)
    in_batches(vlm, replace(questions, examples=questions.examples[:32]))  # warms up
    for _ in range(runs):
        for side, answer in SIDES.items():
            start = time.perf_counter()
            found[side] = answer(vlm, questions)
            times[side].append(time.perf_counter() - start)
            print(f"{name}, {side}: {number / times[side][-1]:.2f} questions per second", file=sys.stderr, flush=True)
    evaluation(vlm, questions, kept)
    start = time.perf_counter()
    assert evaluation(vlm, questions, kept) == found["evaluation"]
    again = time.perf_counter() - start
    ratios = {side: statistics.median(one / own for one, own in zip(times["one by one"], times[side], strict=True)) for side in SIDES}
    return {
        "asked": name,
        "questions": number,
        "dtype": str(vlm.dtype),
        "questions_per_second": {side: round(number / statistics.median(took), 2) for side, took in times.items()},
        "over_one_by_one": {side: round(ratio, 2) for side, ratio in ratios.items()},
        "answers_that_differ": {side: sum(own[i] != found["one by one"][i] for i in own) for side, own in found.items()},
        "kept_responses_questions_per_second": round(number / again),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?", type=int, default=IMAGES)
    parser.add_argument("--runs", type=int, default=RUNS)
    given = parser.parse_args()
    vlm = load_vlm(EMBEDDED)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        write_data(DataSource(calibration=2, evaluation=given.images, forgetting=2), folder, lambda _done, _all: None)
        closed = [example for example in read_examples(folder, "evaluation") if example.task != CAPTION]
        asked = {"closed questions": own_questions(folder, closed), "pope": read_questions(Source(name="pope"), folder)}
        for name, questions in asked.items():
            print(json.dumps(measure(vlm, name, questions, given.runs, Path(temporary) / f"{name}.sqlite")), flush=True)


if __name__ == "__main__":
    main()
