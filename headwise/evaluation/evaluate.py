"""Put the examples of a data set to a model and judge its answers, one by one."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Reading:
    """How the model finds a reference answer: the nats of its tokens, their number, and whether each was the likeliest."""

    nats: float
    tokens: int
    likeliest: bool


def evaluate(
    vlm: VLM, folder: Path, examples: Sequence[Example], settings: Evaluation, progress: Callable[[int, int], object]
) -> tuple[pl.DataFrame, dict[str, str]]:
    """The ANSWERS table, sorted by example, and the reason of each bad example.

    Every first reference answer is read for its nats (its tokens and the end of turn), all of one image together, so that the model
    reads the image once. Closed questions are answered too, greedily: where each token read was the likeliest, the reference is that
    answer, and only the others are generated, in batches of like length. An answer is valid if it is, normalised, a reference of any
    question of its task here. Every model reads the same batches; those that it generates in may differ from another model's, and with
    them the padding and the rounding. `progress` hears how many examples of how many are done.
    """
    bad, readings, unsure = dict[str, str](), dict[str, Reading](), list[Example]()
    done = 0
    for batch in _batches(vlm, examples, settings.batch_size):
        found = _read(vlm, _opened(folder, batch, bad), bad)
        readings |= found
        waiting = [e for e in batch if e.id in found and e.task != CAPTION and not _is_answered(found[e.id], settings)]
        unsure += waiting
        done += len(batch) - len(waiting)
        progress(done, len(examples))
    answers = {e.id: e.answers[0].strip() if e.task != CAPTION else "" for e in examples if e.id in readings}
    for batch in _of_like_length(vlm, unsure, settings.batch_size):
        images, questions = [open_referenced(folder, example) for example in batch], [example.question for example in batch]
        answers |= zip((e.id for e in batch), generate(vlm, images, questions, settings.max_new_tokens), strict=True)
        done += len(batch)
        progress(done, len(examples))
    return _table([e for e in examples if e.id in readings], readings, answers, known_answers(examples)), bad


def _is_answered(reading: Reading, settings: Evaluation) -> bool:
    """Whether greedy decoding would give the reference."""
    return reading.likeliest and reading.tokens <= settings.max_new_tokens


def known_answers(examples: Sequence[Example]) -> dict[str, frozenset[str]]:
    """The normalised reference answers of each task."""
    tasks = {example.task for example in examples}
    return {task: frozenset(normalise(a) for example in examples if example.task == task for a in example.answers) for task in tasks}


def _batches(vlm: VLM, examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    """The questions about one image together; those that are alone with theirs, and those without one, by length."""
    about = defaultdict[str | None, list[Example]](list)
    for example in examples:
        about[example.image].append(example)
    alone = about.pop(None, []) + [example for together in about.values() if len(together) == 1 for example in together]
    for together in about.values():
        if len(together) > 1:
            yield from (together[start : start + size] for start in range(0, len(together), size))
    yield from _of_like_length(vlm, alone, size)


def _of_like_length(vlm: VLM, examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    def length(example: Example) -> tuple[int, str]:
        return len(vlm.tokenizer(" ".join((example.question, *example.answers[:1])))["input_ids"]), example.id

    ordered = sorted(examples, key=length)
    yield from (ordered[start : start + size] for start in range(0, len(ordered), size))


def _opened(folder: Path, batch: Sequence[Example], bad: dict[str, str]) -> list[tuple[Example, Image.Image | None]]:
    """The usable examples with their images; the others are added to `bad`."""
    opened = []
    for example in batch:
        try:
            opened.append((example, open_referenced(folder, example)))
        except BadExample as error:
            bad[example.id] = str(error)
    return opened


def _read(vlm: VLM, batch: list[tuple[Example, Image.Image | None]], bad: dict[str, str]) -> dict[str, Reading]:
    """Readings by example; if the model cannot take a batch, each example is tried alone and the bad ones are added to `bad`."""
    if not batch:
        return {}
    examples, images = zip(*batch, strict=True)
    shown = {example.image for example in examples}
    one_image = len(examples) > len(shown) == 1 and None not in shown
    try:
        encoded = encode(vlm, images, [example.question for example in examples], [example.answers[0] for example in examples])
        with torch.no_grad():
            nats, tokens, likeliest = read_answers(vlm, encoded, one_image=one_image)
        if not bool(nats.isfinite().all()):
            raise BadExample(f"the model gives the reference answer {nats.max().item()} nats")
    except BadExample as error:
        if len(batch) > 1:
            return {i: reading for one in batch for i, reading in _read(vlm, [one], bad).items()}
        bad[examples[0].id] = str(error)
        return {}
    read = zip(nats.tolist(), tokens.tolist(), likeliest.tolist(), strict=True)
    return {example.id: Reading(*values) for example, values in zip(examples, read, strict=True)}


def _table(
    examples: Sequence[Example], readings: dict[str, Reading], answers: dict[str, str], known: dict[str, frozenset[str]]
) -> pl.DataFrame:
    rows = [
        {
            "example_id": example.id,
            "image": example.image or example.id,
            "split": example.split,
            "task": example.task,
            "answer": answers[example.id],
            "right": soft_accuracy(answers[example.id], example.answers) if example.task != CAPTION else None,
            "valid": example.task == CAPTION or normalise(answers[example.id]) in known[example.task],
            "nats": readings[example.id].nats,
            "tokens": readings[example.id].tokens,
        }
        for example in sorted(examples, key=lambda example: example.id)
    ]
    table = pl.from_arrow(pa.Table.from_pylist(rows, schema=ANSWERS))
    assert isinstance(table, pl.DataFrame)
    return table
