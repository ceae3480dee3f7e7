"""What the steps that ask a model share: the model with its adapter, what it said before, and the folder of its answers."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headwise.evaluation.conditions import library_versions
from headwise.evaluation.evaluate import evaluate
from headwise.evaluation.judgement import Asking
from headwise.evaluation.responses import Responses
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.table import ANSWERS, ANSWERS_FILE, BASE, METRICS_FILE, metrics
from headwise.examples import Example, check_bad_share, write_bad
from headwise.files import new_folder, sha256_tree, write_json, write_manifest, write_table
from headwise.observation import Observation
from headwise.vlm import load_vlm, revision
from tasks.command import RESPONSES
from tasks.progress import progress_bar

ADAPTERS = Path("data/adapters")


def write_answers(
    output: Path,
    observed: Observation,
    adapter: Path | None,
    images: Path,
    examples: Sequence[Example],
    askings: Mapping[str, Asking],
    settings: Evaluation,
    *,
    stage: str,
    title: str,
    inputs: Mapping[str, Path | str],
    extra: Mapping[str, object],
) -> None:
    """Ask the model with the adapter, and write answers.parquet, bad.parquet, metrics.json and manifest.json.

    Raises ValueError if the adapter does not fit the model, or more than `max_bad_share` of the examples is bad.
    """
    vlm = load_vlm(observed.model, adapter=adapter, dtype=observed.dtype)
    made = {"model": revision(observed.model), "dtype": str(vlm.dtype), "versions": library_versions()}
    decided = {**made, "device": vlm.device.type, "max_new_tokens": settings.max_new_tokens}
    kept = os.environ.get(RESPONSES)
    responses = Responses(Path(kept) if kept else None, {**decided, "adapter": sha256_tree(adapter) if adapter else None})
    with progress_bar(title) as progress:
        answers, bad = evaluate(vlm, images, examples, askings, settings, responses, progress)
    check_bad_share(bad, len(examples), settings.max_bad_share)
    with new_folder(output) as folder:
        write_table(answers, folder / ANSWERS_FILE, ANSWERS)
        write_bad(bad, folder)
        write_json(metrics(answers), folder / METRICS_FILE)
        counted: dict[str, Any] = {**made, **extra, "examples": len(examples), "bad": len(bad)}
        write_manifest(
            folder, stage=stage, settings=settings, inputs={**inputs, **({"adapter": adapter} if adapter else {})}, extra=counted
        )


def adapter_of(arm: str) -> Path | None:
    """The arm's adapter; none for the model as it is."""
    return None if arm == BASE else ADAPTERS / arm
