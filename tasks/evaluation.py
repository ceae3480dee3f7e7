"""The evaluation step: data/images, data/adapters/ARM -> data/evaluations/ARM. Run it with `python -m tasks.evaluation --arm top`."""

from argparse import ArgumentParser
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from headwise.calibration.steering import read_readout
from headwise.evaluation.evaluate import evaluate, own_questions
from headwise.evaluation.labelled import evaluate_labelled
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.table import BASE
from headwise.examples import INDEX, Example, read_examples
from headwise.labels import label_sets
from headwise.observation import Observation
from tasks.asking import Asked, adapter_of, write_answers
from tasks.command import plain_errors, read_settings

IMAGES, EVALUATIONS = Path("data/images"), Path("data/evaluations")


def write_evaluation(images: Path, adapter: Path | None, output: Path, observed: Observation, settings: Evaluation) -> None:
    """Write the answers to the splits `evaluation` and, where there is one, `forgetting`, as `write_answers` does: free ones, or labels,
    which are all answers that the data have for a task.
    """
    asked, answer = Asked("evaluation", f"evaluation, arm {output.name}", {"index": images / INDEX}), evaluate
    if settings.closed == "labels":
        answer = partial(evaluate_labelled, labels=label_sets(read_examples(images)), readout=read_readout(adapter))
    write_answers(output, observed, adapter, own_questions(images, evaluated(images)), settings, asked, answer)


def evaluated(images: Path) -> list[Example]:
    """The examples of the splits `evaluation`, of which there must be some, and `forgetting`."""
    return read_examples(images, "evaluation") + [example for example in read_examples(images) if example.split == "forgetting"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate the model with the adapter of the arm that the command line names."""
    parser = ArgumentParser(prog="python -m tasks.evaluation", description=__doc__)
    parser.add_argument("--arm", required=True, help=f"whose adapter; {BASE}: none")
    arm = parser.parse_args(arguments).arm
    write_evaluation(
        IMAGES, adapter_of(arm), EVALUATIONS / arm, read_settings("attention", Observation), read_settings("evaluation", Evaluation)
    )


if __name__ == "__main__":
    with plain_errors():
        main()
