"""Put the examples of a data set to a model and judge its answers, one by one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
import torch
from PIL import Image

from headwise.evaluation.settings import Evaluation
from headwise.evaluation.table import ANSWERS
from headwise.evaluation.vqa import normalise, soft_accuracy
from headwise.examples import CAPTION, BadExample, Example
from headwise.likelihood import open_referenced, read_answers
from headwise.vlm import VLM, encode, generate

Row = dict[str, object]


def evaluate(
    vlm: VLM, folder: Path, examples: Sequence[Example], settings: Evaluation, progress: Callable[[int, int], object]
) -> tuple[pl.DataFrame, dict[str, str]]:
    """The ANSWERS table, sorted by example, and the reason of each bad example.

    Every first reference answer is read for its nats (its tokens and the end of turn). Closed questions are answered too, greedily: where
    each token read was the likeliest, the reference is that answer, and only the others are generated. An answer is valid if it is,
    normalised, a reference of any question of its task here. Batches hold questions of like length, and every model reads the same
    ones; it generates in parts of them, for the questions where it would not give the reference, so that there the padding, and with it
    the rounding, may differ from another model's. `progress` hears how many examples of how many are done.
    """
    known, bad = known_answers(examples), dict[str, str]()
    rows: list[Row] = []
    done = 0
    for batch in _batches(vlm, examples, settings.batch_size):
        rows += _answer(vlm, _opened(folder, batch, bad), known, settings.max_new_tokens, bad)
        done += len(batch)
        progress(done, len(examples))
    answers = pl.from_arrow(pa.Table.from_pylist(rows, schema=ANSWERS))
    assert isinstance(answers, pl.DataFrame)
    return answers.sort("example_id"), bad


def known_answers(examples: Sequence[Example]) -> dict[str, frozenset[str]]:
    """The normalised reference answers of each task."""
    tasks = {example.task for example in examples}
    return {task: frozenset(normalise(a) for example in examples if example.task == task for a in example.answers) for task in tasks}


def _batches(vlm: VLM, examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """Captions, then closed questions, each from short to long."""

    def length(example: Example) -> tuple[int, str]:
        return len(vlm.tokenizer(" ".join((example.question, *example.answers[:1])))["input_ids"]), example.id

    for is_caption in (True, False):
        chosen = sorted((e for e in examples if (e.task == CAPTION) == is_caption), key=length)
        yield from (chosen[start : start + size] for start in range(0, len(chosen), size))


def _opened(folder: Path, batch: Sequence[Example], bad: dict[str, str]) -> list[tuple[Example, Image.Image | None]]:
    """The usable examples with their images; the others are added to `bad`."""
    opened = []
    for example in batch:
        try:
            opened.append((example, open_referenced(folder, example)))
        except BadExample as error:
            bad[example.id] = str(error)
    return opened


def _answer(
    vlm: VLM, batch: list[tuple[Example, Image.Image | None]], known: Mapping[str, frozenset[str]], max_new_tokens: int, bad: dict[str, str]
) -> list[Row]:
    """The rows of a batch of one kind; if the model cannot take an example, each is tried alone and the bad ones are added to `bad`."""
    if not batch:
        return []
    try:
        return _rows(vlm, batch, known, max_new_tokens)
    except BadExample as error:
        if len(batch) > 1:
            return [row for one in batch for row in _answer(vlm, [one], known, max_new_tokens, bad)]
        bad[batch[0][0].id] = str(error)
        return []


def _rows(vlm: VLM, batch: list[tuple[Example, Image.Image | None]], known: Mapping[str, frozenset[str]], max_new_tokens: int) -> list[Row]:
    examples, images = [example for example, _ in batch], [image for _, image in batch]
    questions = [example.question for example in examples]
    with torch.no_grad():
        nats, tokens, likeliest = read_answers(vlm, encode(vlm, images, questions, [example.answers[0] for example in examples]))
    if not bool(nats.isfinite().all()):
        raise BadExample(f"the model gives the reference answer {nats.max().item()} nats")
    closed = examples[0].task != CAPTION
    answers = [example.answers[0].strip() if closed else "" for example in examples]
    if closed and (unsure := [i for i, sure in enumerate((likeliest & (tokens <= max_new_tokens)).tolist()) if not sure]):
        generated = generate(vlm, [images[i] for i in unsure], [questions[i] for i in unsure], max_new_tokens)
        answers = [dict(zip(unsure, generated, strict=True)).get(i, answer) for i, answer in enumerate(answers)]
    return [
        {
            "example_id": example.id,
            "image": example.image or example.id,
            "split": example.split,
            "task": example.task,
            "answer": answer,
            "right": soft_accuracy(answer, example.answers) if closed else None,
            "valid": not closed or normalise(answer) in known[example.task],
            "nats": float(nats_),
            "tokens": int(tokens_),
        }
        for example, answer, nats_, tokens_ in zip(examples, answers, nats.tolist(), tokens.tolist(), strict=True)
    ]
