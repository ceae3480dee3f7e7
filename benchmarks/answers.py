"""Answers a second of the embedded model to the closed questions of drawn scenes: generated one by one, generated in batches, and as an
evaluation asks (one image read for all its questions; where the reference is the likeliest answer, nothing is generated).

`python benchmarks/answers.py [IMAGES]` prints one JSON line last: questions per second of each, the medians of the ratios to one by one
over paired runs, in how many answers the sides differ, and how fast an evaluation is that finds every response kept.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from headwise.data import DataSource, write_data
from headwise.evaluation.evaluate import evaluate, own_questions
from headwise.evaluation.responses import Responses
from headwise.evaluation.settings import Evaluation
from headwise.examples import CAPTION, Example, open_image, read_examples
from headwise.observation import EMBEDDED
from headwise.vlm import VLM, generate, load_vlm

IMAGES, RUNS = 40, 3
SETTINGS = Evaluation()
Answers = dict[str, str]


def one_by_one(vlm: VLM, folder: Path, examples: list[Example]) -> Answers:
    return {e.id: generate(vlm, [open_image(folder, e)], [e.question], SETTINGS.max_new_tokens)[0] for e in examples}


def in_batches(vlm: VLM, folder: Path, examples: list[Example]) -> Answers:
    ordered = sorted(examples, key=lambda e: len(vlm.tokenizer(e.question)["input_ids"]))
    found: Answers = {}
    for start in range(0, len(ordered), SETTINGS.batch_size):
        batch = ordered[start : start + SETTINGS.batch_size]
        images, questions = [open_image(folder, e) for e in batch], [e.question for e in batch]
        found |= zip((e.id for e in batch), generate(vlm, images, questions, SETTINGS.max_new_tokens), strict=True)
    return found


def evaluation(vlm: VLM, folder: Path, examples: list[Example], path: Path | None = None) -> Answers:
    responses = Responses(path, {})
    answers, _ = evaluate(vlm, own_questions(folder, examples), SETTINGS, responses, lambda _done, _all: None)
    return dict(answers.select("example_id", "answer").iter_rows())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?", type=int, default=IMAGES)
    parser.add_argument("--runs", type=int, default=RUNS)
    given = parser.parse_args()
    sides: dict[str, Callable[[VLM, Path, list[Example]], Answers]] = {
        "one by one": one_by_one,
        "in batches": in_batches,
        "evaluation": evaluation,
    }
    times: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, Answers] = {}
    vlm = load_vlm(EMBEDDED)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        write_data(DataSource(calibration=2, evaluation=given.images, forgetting=2), folder, lambda _done, _all: None)
        examples = [example for example in read_examples(folder, "evaluation") if example.task != CAPTION]
        in_batches(vlm, folder, examples[:32])  # warms up
        for _ in range(given.runs):
            for name, side in sides.items():
                start = time.perf_counter()
                found[name] = side(vlm, folder, examples)
                times[name].append(time.perf_counter() - start)
                print(f"{name}: {len(examples) / times[name][-1]:.2f} questions per second", file=sys.stderr, flush=True)
        kept = Path(temporary) / "responses.sqlite"
        evaluation(vlm, folder, examples, kept)
        start = time.perf_counter()
        assert evaluation(vlm, folder, examples, kept) == found["evaluation"]
        again = time.perf_counter() - start
    ratios = {name: statistics.median(one / own for one, own in zip(times["one by one"], times[name], strict=True)) for name in sides}
    result = {
        "questions": len(examples),
        "dtype": str(vlm.dtype),
        "questions_per_second": {name: round(len(examples) / statistics.median(took), 2) for name, took in times.items()},
        "over_one_by_one": {name: round(ratio, 2) for name, ratio in ratios.items()},
        "answers_that_differ": {name: sum(own[i] != found["one by one"][i] for i in own) for name, own in found.items()},
        "kept_responses_questions_per_second": round(len(examples) / again),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
