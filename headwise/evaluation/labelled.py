"""Closed questions answered by their likeliest label, whatever else a model would say: how classifiers are judged."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import polars as pl
import pyarrow as pa
import torch

from headwise.evaluation.evaluate import evaluate
from headwise.evaluation.judgement import Questions
from headwise.evaluation.responses import Responses
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.table import ANSWERS
from headwise.examples import BadExample, Example, open_image
from headwise.labels import Labels, Readout, score_labels, tokenised
from headwise.vlm import VLM

Row = dict[str, object]


def evaluate_labelled(
    vlm: VLM,
    questions: Questions,
    settings: Evaluation,
    responses: Responses,
    progress: Callable[[int, int], object],
    *,
    labels: Mapping[str, Sequence[str]],
    readout: Readout,
) -> tuple[pl.DataFrame, dict[str, str]]:
    """As `evaluate`, but each task with labels is answered by the likeliest of them, through the readout.

    In the table `answer` is that label; `valid` says whether the model, left to itself, would begin with any of the labels; `nats` is the
    negative log-likelihood of the right label among all of them, over one token. Nothing of it is kept for another run: it takes one pass.
    Raises ValueError if a task's labels cannot be told apart.
    """
    chosen = [example for example in questions.examples if example.task in labels]
    others = [example for example in questions.examples if example.task not in labels]
    total, done = len(questions.examples), 0
    table, bad = evaluate(vlm, replace(questions, examples=others), settings, responses, lambda some, _: progress(some, total))
    rows = list[Row]()
    for task in dict.fromkeys(example.task for example in chosen):
        own = sorted((example for example in chosen if example.task == task), key=lambda one: (len(one.question), one.id))
        known = tokenised(vlm, labels[task])
        for start in range(0, len(own), settings.batch_size):
            batch = own[start : start + settings.batch_size]
            rows += _rows(vlm, questions, batch, known, readout, bad)
            done += len(batch)
            progress(len(others) + done, total)
    found = pl.from_arrow(pa.Table.from_pylist(rows, schema=ANSWERS))
    assert isinstance(found, pl.DataFrame)
    return pl.concat([table, found]).sort("example_id"), bad


def _rows(vlm: VLM, questions: Questions, batch: Sequence[Example], labels: Labels, readout: Readout, bad: dict[str, str]) -> list[Row]:
    """The batch's rows; if the model cannot take it, each example is tried alone and the bad ones are added to `bad`."""
    try:
        images = [None if example.image is None else open_image(questions.images, example) for example in batch]
        with torch.no_grad():
            scores = score_labels(vlm, images, [example.question for example in batch], labels)
    except BadExample as error:
        if len(batch) > 1:
            return [row for one in batch for row in _rows(vlm, questions, [one], labels, readout, bad)]
        bad[batch[0].id] = str(error)
        return []
    likely = readout.applied(scores.log_probs, batch[0].task, labels)
    rows = list[Row]()
    for example, own, valid in zip(batch, likely, scores.valid.tolist(), strict=True):
        answer, right = labels.words[int(own.argmax())], labels.words.index(example.answers[0])
        same: Row = {"example_id": example.id, "image": example.image or example.id, "split": example.split, "task": example.task}
        said: Row = {"answer": answer, "right": float(answer in example.answers), "valid": valid}
        rows.append({**same, **said, "nats": -float(own[right]), "tokens": 1})
    return rows
