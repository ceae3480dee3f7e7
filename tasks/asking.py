"""What the steps that ask a model share: the model with its adapter, what it said before, and the folder of its answers."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import polars as pl

from headwise.calibration.adapter import load
from headwise.checkpoints import frozen
from headwise.evaluation.conditions import library_versions
from headwise.evaluation.evaluate import evaluate
from headwise.evaluation.judgement import Questions
from headwise.evaluation.responses import Responses
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.table import ANSWERS, ANSWERS_FILE, BASE, METRICS_FILE, metrics
from headwise.examples import check_bad_share, write_bad
from headwise.files import new_folder, sha256_file, sha256_tree, write_json, write_manifest, write_table
from headwise.observation import Observation
from headwise.vlm import VLM, load_observed, revision
from tasks.command import CODE, RESPONSES
from tasks.progress import progress_bar

Answer = Callable[[VLM, Questions, Evaluation, Responses, Callable[[int, int], object]], tuple[pl.DataFrame, dict[str, str]]]
"""Gives the ANSWERS table and the reasons of the bad examples."""
ANSWERING = (
    *("vlm/*.py", "attention/*.py", "calibration/adapter.py", "calibration/steering.py", "prefix.py", "likelihood.py"),
    *("evaluation/evaluate.py", "examples.py", "checkpoints.py", "smol.py"),
)
ADAPTERS = Path("data/adapters")


@dataclass(frozen=True)
class Asked:
    """What the manifest says of the questions: the stage, the files that they come from, and more of them. title: of the progress bar."""

    stage: str
    title: str
    inputs: Mapping[str, Path | str]
    extra: Mapping[str, object] = field(default_factory=dict)


def write_answers(
    output: Path,
    observed: Observation,
    adapter: Path | None,
    questions: Questions,
    settings: Evaluation,
    asked: Asked,
    answer: Answer = evaluate,
    prepare: Callable[[VLM], object] = lambda _: None,
) -> None:
    """Ask the model with the adapter, by `answer`, and write its answers as `save_answers` does. prepare: gets the model without it before.

    Raises ValueError if the adapter does not fit the model, or more than `max_bad_share` of the examples is bad.
    """
    base = load_observed(observed)
    prepare(base)
    vlm = load(base, adapter) if adapter else base
    made: dict[str, Any] = {
        **{"model": revision(observed.model), "dtype": str(vlm.dtype), "versions": library_versions()},
        "chat_template": vlm.has_template,
    }
    decided = {**made, "device": vlm.device.type, "max_new_tokens": settings.max_new_tokens, "code": _code()}
    kept = os.environ.get(RESPONSES)
    responses = Responses(Path(kept) if kept else None, {**decided, "adapter": sha256_tree(adapter) if adapter else None})
    with progress_bar(asked.title) as progress, frozen(vlm.base):  # as PEFT leaves it: with and without an adapter by the same kernels
        answers, bad = answer(vlm, questions, settings, responses, progress)
    check_bad_share(bad, len(questions.examples), settings.max_bad_share)
    save_answers(output, answers, bad, adapter, settings, asked, {**made, "asked": _digest(questions)})


def _code() -> str:
    """The digest of the modules that decide an answer beside the libraries."""
    modules = sorted(path for pattern in ANSWERING for path in (CODE / "headwise").glob(pattern))
    return sha256("".join(sha256_file(module) for module in modules).encode()).hexdigest()


def _digest(questions: Questions) -> str:
    """Of the questions, their references, and their images' bytes."""
    paths = {e.image: questions.images / e.image for e in questions.examples if e.image}
    images = {name: sha256_file(path) if path.is_file() else "" for name, path in paths.items()}
    lines = sorted(repr((e.id, e.question, e.answers, images.get(e.image or ""))) for e in questions.examples)
    return sha256("".join(lines).encode()).hexdigest()


def save_answers(
    output: Path,
    answers: pl.DataFrame,
    bad: Mapping[str, str],
    adapter: Path | None,
    settings: Evaluation,
    asked: Asked,
    made: Mapping[str, Any],
) -> None:
    """Write answers.parquet, bad.parquet, metrics.json and manifest.json. made: the model's revision, its number type, the versions."""
    with new_folder(output) as folder:
        write_table(answers, folder / ANSWERS_FILE, ANSWERS)
        write_bad(bad, folder)
        write_json(metrics(answers), folder / METRICS_FILE)
        counted = {**made, **asked.extra, "examples": len(answers) + len(bad), "bad": len(bad)}
        inputs = {**asked.inputs, **({"adapter": adapter} if adapter else {})}
        write_manifest(folder, stage=asked.stage, settings=settings, inputs=inputs, extra=counted)


def adapter_of(arm: str) -> Path | None:
    """The arm's adapter; none for the model as it is. Raises ValueError if the arm has none."""
    if arm != BASE and not (ADAPTERS / arm).is_dir():
        raise ValueError(f"{ADAPTERS / arm}: the arm has no adapter; {BASE} asks the model as it is")
    return None if arm == BASE else ADAPTERS / arm
