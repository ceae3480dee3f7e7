"""Put the examples of a data set to a model and judge its answers, one by one."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl
import pyarrow as pa
import torch
from PIL import Image

from headwise.evaluation.judgement import READ_ONLY, Asking, Judgement, Rule
from headwise.evaluation.responses import Reading, Response, Responses
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.table import ANSWERS
from headwise.evaluation.vqa import known_rule
from headwise.examples import CAPTION, BadExample, Example, open_image
from headwise.likelihood import read_answers
from headwise.vlm import VLM, encode, generate


def evaluate(
    vlm: VLM,
    folder: Path,
    examples: Sequence[Example],
    askings: Mapping[str, Asking],
    settings: Evaluation,
    responses: Responses,
    progress: Callable[[int, int], object],
) -> tuple[pl.DataFrame, dict[str, str]]:
    """The ANSWERS table, sorted by example, and the reason of each bad example.

    First references are read for their nats (their tokens and the end of turn) where the task's asking says so, all of one image together,
    so that the model reads the image once. What is to be judged is answered too, greedily: where each token read was the likeliest, the
    reference is that answer, and only the others are generated, in batches of like length. What `responses` has is not asked again, and
    each batch is kept there, so that a run that was stopped goes on. Every model reads the same batches; those that it generates in may
    differ from another model's, and with them the padding and the rounding. `progress` hears how many examples of how many are done.
    """
    bad = {e.id: "no reference answer" for e in examples if askings[e.task].read and not e.answers}
    found = responses.find(folder, examples)
    todo = [e for e in examples if e.id not in bad and not _is_done(e, askings, settings, found.get(e.id, Response()))]
    done = len(examples) - len(todo)
    progress(done, len(examples))
    unread = [e for e in todo if askings[e.task].read and (e.id not in found or found[e.id].reading is None)]
    for batch in _batches(vlm, unread, settings.batch_size):
        readings = _read(vlm, _opened(folder, batch, bad), bad)
        read = {i: replace(found.get(i, Response()), reading=reading) for i, reading in readings.items()}
        found |= read
        responses.keep(folder, batch, read)
        done += sum(e.id in bad or _is_done(e, askings, settings, found[e.id]) for e in batch)
        progress(done, len(examples))
    unsaid = [e for e in todo if e.id not in bad and not _is_done(e, askings, settings, found.get(e.id, Response()))]
    for batch in _of_like_length(vlm, unsaid, settings.batch_size):
        said = _generated(vlm, _opened(folder, batch, bad), settings, bad)
        answered = {i: replace(found.get(i, Response()), answer=answer) for i, answer in said.items()}
        found |= answered
        responses.keep(folder, batch, answered)
        done += len(batch)
        progress(done, len(examples))
    return _table([e for e in examples if e.id not in bad], found, askings, settings), bad


def own_askings(examples: Sequence[Example]) -> dict[str, Asking]:
    """How the tasks of a user's own data and of the embedded data are put: captions are read, all else has few possible answers."""
    tasks = {example.task: [one for one in examples if one.task == example.task] for example in {e.task: e for e in examples}.values()}
    return {task: READ_ONLY if task == CAPTION else Asking(known_rule(own)) for task, own in tasks.items()}


def _is_done(example: Example, askings: Mapping[str, Asking], settings: Evaluation, response: Response) -> bool:
    """Whether nothing is left to ask the model: greedy decoding would give a reference each of whose tokens is the likeliest."""
    asking = askings[example.task]
    if asking.read and response.reading is None:
        return False
    return asking.rule is None or response.answer is not None or _is_answered(response.reading, settings)


def _is_answered(reading: Reading | None, settings: Evaluation) -> bool:
    return reading is not None and reading.likeliest and reading.tokens <= settings.max_new_tokens


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
            opened.append((example, None if example.image is None else open_image(folder, example)))
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


def _generated(vlm: VLM, batch: list[tuple[Example, Image.Image | None]], settings: Evaluation, bad: dict[str, str]) -> dict[str, str]:
    """Answers by example; if the model cannot take a batch, each example is tried alone and the bad ones are added to `bad`."""
    if not batch:
        return {}
    examples, images = zip(*batch, strict=True)
    try:
        answers = generate(vlm, images, [example.question for example in examples], settings.max_new_tokens)
    except BadExample as error:
        if len(batch) > 1:
            return {i: answer for one in batch for i, answer in _generated(vlm, [one], settings, bad).items()}
        bad[examples[0].id] = str(error)
        return {}
    return dict(zip((example.id for example in examples), answers, strict=True))


def _table(examples: Sequence[Example], found: Mapping[str, Response], askings: Mapping[str, Asking], settings: Evaluation) -> pl.DataFrame:
    rows = [_row(example, found[example.id], askings[example.task].rule, settings) for example in sorted(examples, key=lambda e: e.id)]
    table = pl.from_arrow(pa.Table.from_pylist(rows, schema=ANSWERS))
    assert isinstance(table, pl.DataFrame)
    return table


def _row(example: Example, response: Response, rule: Rule | None, settings: Evaluation) -> dict[str, object]:
    reading, answer = response.reading, response.answer
    if answer is None:
        answer = example.answers[0].strip() if rule and _is_answered(reading, settings) else ""
    judged = Judgement(right=None, valid=True) if rule is None else rule(answer, example)
    return {
        "example_id": example.id,
        "image": example.image or example.id,
        "split": example.split,
        "task": example.task,
        "answer": answer if rule else "",
        "right": judged.right,
        "valid": judged.valid,
        "nats": reading.nats if reading else None,
        "tokens": reading.tokens if reading else None,
        "part": judged.part,
        "whole": judged.whole,
    }
