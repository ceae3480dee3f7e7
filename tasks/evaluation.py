"""The evaluation step: data/images, data/adapters/ARM -> data/evaluations/ARM. Run it with `python -m tasks.evaluation --arm top`."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from headwise.evaluation.conditions import library_versions
from headwise.evaluation.evaluate import evaluate
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.table import ANSWERS, ANSWERS_FILE, BASE, CHAMPION, METRICS_FILE, metrics
from headwise.examples import INDEX, Example, check_bad_share, read_examples, write_bad
from headwise.files import new_folder, write_json, write_manifest, write_table
from headwise.observation import Observation
from headwise.selection import Arm
from headwise.vlm import load_vlm, revision
from tasks.command import plain_errors, read_settings
from tasks.progress import progress_bar

IMAGES, ADAPTERS, EVALUATIONS = Path("data/images"), Path("data/adapters"), Path("data/evaluations")


def write_evaluation(images: Path, adapter: Path | None, output: Path, observed: Observation, settings: Evaluation) -> None:
    """Write answers.parquet, bad.parquet, metrics.json and manifest.json for the splits `evaluation` and, where there is one, `forgetting`.

    Raises ValueError if the adapter does not fit the model, or more than `max_bad_share` of the examples is bad.
    """
    examples = evaluated(images)
    vlm = load_vlm(observed.model, adapter=adapter, dtype=observed.dtype)
    with progress_bar(f"evaluation, arm {output.name}") as progress:
        answers, bad = evaluate(vlm, images, examples, settings, progress)
    check_bad_share(bad, len(examples), settings.max_bad_share)
    with new_folder(output) as folder:
        write_table(answers, folder / ANSWERS_FILE, ANSWERS)
        write_bad(bad, folder)
        write_json(metrics(answers), folder / METRICS_FILE)
        inputs = {"index": images / INDEX} | ({"adapter": adapter} if adapter else {})
        made = {"model": revision(observed.model), "dtype": str(vlm.dtype), "versions": library_versions()}
        write_manifest(
            folder, stage="evaluation", settings=settings, inputs=inputs, extra={**made, "examples": len(examples), "bad": len(bad)}
        )


def evaluated(images: Path) -> list[Example]:
    """The examples of the splits `evaluation`, of which there must be some, and `forgetting`."""
    return read_examples(images, "evaluation") + [example for example in read_examples(images) if example.split == "forgetting"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate the model with the adapter of the arm that the command line names."""
    parser = ArgumentParser(prog="python -m tasks.evaluation", description=__doc__)
    parser.add_argument("--arm", choices=[BASE, CHAMPION, *get_args(Arm)], required=True, help=f"whose adapter; {BASE}: none")
    arm = parser.parse_args(arguments).arm
    adapter = None if arm == BASE else ADAPTERS / arm
    write_evaluation(IMAGES, adapter, EVALUATIONS / arm, read_settings("attention", Observation), read_settings("evaluation", Evaluation))


if __name__ == "__main__":
    with plain_errors():
        main()
