"""Put the examples of a data set to a model and judge its answers, one by one."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import polars as pl
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from headwise.evaluation.judgement import READ_ONLY, Asking, Judgement, Questions, Rule
from headwise.evaluation.responses import Reading, Response, Responses
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.table import ANSWERS
from headwise.evaluation.vqa import known_rule
from headwise.examples import CAPTION, BadExample, Example, open_image
from headwise.likelihood import read_answers, read_continued
from headwise.prefix import generate_continued, read_on, read_prefix
from headwise.vlm import VLM, Batch, encode, generate


def evaluate(
    vlm: VLM, questions: Questions, settings: Evaluation, responses: Responses, progress: Callable[[int, int], object]
) -> tuple[pl.DataFrame, dict[str, str]]:
    """The ANSWERS table, sorted by example, and the reason of each bad example.

    First references are read for their nats (their tokens and the end of turn) where the task's asking says so; what is to be judged is
    answered greedily. Where several questions are about one image, the model reads it once, and an answer goes on from the very logits that
    the reference was read with; the others go in batches of like length. In float32 a reference each of whose tokens is the likeliest is
    the answer, and nothing is generated; in a coarser type that would let a near tie fall on the reference's side twice, so there only an
    answer that shares its logits is taken over. What `responses` has is not asked again, and each batch is kept there, so that a run that
    was stopped goes on. The batches that two models generate in may differ, and with them the padding and the rounding. `progress` hears
    how many examples of how many are done.
    """
    folder, examples, askings = questions.images, questions.examples, questions.askings
    bad = {e.id: "no reference answer" for e in examples if askings[e.task].read and not e.answers}
    found = responses.find(folder, examples)

    def lacking(batch: Sequence[Example]) -> list[Example]:
        return [e for e in batch if e.id not in bad and not _is_done(e, askings, found.get(e.id, Response()))]

    done = len(examples) - len(lacking(examples))
    progress(done, len(examples))

    def settle(batch: Sequence[Example], said: Mapping[str, Response]) -> None:
        nonlocal done
        found.update(said)
        responses.keep(folder, batch, said)
        done += len(batch) - len(lacking(batch))
        progress(done, len(examples))

    # all batches are those of a run that finds nothing kept: a run that goes on asks the rest in the same ones
    shared, alone = _windows(vlm, [e for e in examples if e.id not in bad], settings.batch_size)
    for window in shared:
        batch = lacking(window)
        opened = _opened(folder, batch, bad)
        if (said := _asked_together(vlm, opened, askings, settings, found)) is None:
            alone += window
        else:
            settle(batch, said)
    for window in _of_like_length(vlm, [e for e in alone if askings[e.task].read], settings.batch_size):
        batch = [e for e in lacking(window) if found.get(e.id, Response()).reading is None]
        readings = _read(vlm, _opened(folder, batch, bad), bad)
        said = {i: replace(found.get(i, Response()), reading=reading) for i, reading in readings.items()}
        settle(batch, _with_answers(batch, said, askings, settings) if vlm.dtype == torch.float32 else said)
    unsaid = [e for e in alone if askings[e.task].rule and found.get(e.id, Response()).answer is None]
    for window in _of_like_length(vlm, unsaid, settings.batch_size):
        batch = lacking(window)
        answers = _generated(vlm, _opened(folder, batch, bad), settings, bad)
        settle(batch, {i: replace(found.get(i, Response()), answer=answer) for i, answer in answers.items()})
    return _table([e for e in examples if e.id not in bad], found, askings), bad


def own_questions(folder: Path, examples: Sequence[Example]) -> Questions:
    """Examples of a user's own data or of the embedded data: captions are read, all else has few possible answers."""
    tasks = {example.task: [one for one in examples if one.task == example.task] for example in {e.task: e for e in examples}.values()}
    askings = {task: READ_ONLY if task == CAPTION else Asking(known_rule(own)) for task, own in tasks.items()}
    return Questions(examples, askings, folder)


def _is_done(example: Example, askings: Mapping[str, Asking], response: Response) -> bool:
    asking = askings[example.task]
    return (response.reading is not None or not asking.read) and (response.answer is not None or asking.rule is None)


def _with_answers(
    examples: Sequence[Example], said: Mapping[str, Response], askings: Mapping[str, Asking], settings: Evaluation
) -> dict[str, Response]:
    """With the reference as the answer where each of its tokens is the likeliest: greedy decoding would give just that."""

    def answered(example: Example, response: Response) -> Response:
        reading = response.reading
        sure = reading is not None and reading.likeliest and reading.tokens <= settings.max_new_tokens
        take = sure and askings[example.task].rule is not None and response.answer is None
        return replace(response, answer=example.answers[0].strip()) if take else response

    return {e.id: answered(e, said[e.id]) for e in examples if e.id in said}


def _windows(vlm: VLM, examples: Sequence[Example], size: int) -> tuple[list[list[Example]], list[Example]]:
    """Batches of questions that share their images, with all questions of an image where they fit, and the examples that share none."""
    about = defaultdict[str | None, list[Example]](list)
    for example in examples:
        about[example.image].append(example)
    shared: list[list[Example]] = []
    alone: list[Example] = []
    for image, own in about.items():
        if image is None or len(own) == 1 or not vlm.family.shares_image:
            alone += own
            continue
        for part in (own[start : start + size] for start in range(0, len(own), size)):
            if shared and len(shared[-1]) + len(part) <= size:
                shared[-1] += part
            else:
                shared.append(part)
    return shared, alone


def _asked_together(
    vlm: VLM,
    opened: list[tuple[Example, Image.Image | None]],
    askings: Mapping[str, Asking],
    settings: Evaluation,
    found: Mapping[str, Response],
) -> dict[str, Response] | None:
    """Readings and answers about some images, each of which the model reads once; None where it cannot share them, or take one of them."""
    pictures = {example.image: picture for example, picture in opened if picture is not None}
    if not pictures:
        return {}
    place = {image: number for number, image in enumerate(pictures)}
    said = {example.id: found.get(example.id, Response()) for example, _ in opened}

    def prompts(asked: Sequence[Example], *, answered: bool) -> tuple[list[int], Batch]:
        images, questions = [place[e.image] for e in asked], [e.question for e in asked]
        answers = [e.answers[0] for e in asked] if answered else None
        return images, encode(vlm, [pictures[e.image] for e in asked], questions, answers)

    try:
        with torch.no_grad():
            if (prefix := read_prefix(vlm, list(pictures.values()))) is None:
                return None
            unread = [e for e, _ in opened if askings[e.task].read and said[e.id].reading is None]
            others = [e for e, _ in opened if e not in unread]
            for asked, answered in ((unread, True), (others, False)):
                if not asked:
                    continue
                images, batch = prompts(asked, answered=answered)
                if not prefix.fits(batch):
                    return None
                continued = read_on(vlm, prefix, images, batch)
                if answered:
                    readings = _readings(asked, *read_continued(continued))
                    read = {i: replace(said[i], reading=reading) for i, reading in readings.items()}
                    said |= _with_answers(asked, read, askings, settings)
                if unsaid := [row for row, e in enumerate(asked) if not _is_done(e, askings, said[e.id])]:
                    answers = generate_continued(vlm, continued, unsaid, settings.max_new_tokens)
                    said |= {asked[row].id: replace(said[asked[row].id], answer=a) for row, a in zip(unsaid, answers, strict=True)}
    except BadExample:
        return None
    return said


def _readings(
    examples: Sequence[Example], nats: Float[Tensor, "batch"], tokens: Int[Tensor, "batch"], likeliest: Bool[Tensor, "batch"]
) -> dict[str, Reading]:
    """Raises BadExample where a model finds an answer neither likely nor unlikely."""
    if not bool(nats.isfinite().all()):
        raise BadExample(f"the model gives the reference answer {nats.max().item()} nats")
    read = zip(nats.tolist(), tokens.tolist(), likeliest.tolist(), strict=True)
    return {example.id: Reading(*values) for example, values in zip(examples, read, strict=True)}


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
    try:
        encoded = encode(vlm, images, [example.question for example in examples], [example.answers[0] for example in examples])
        with torch.no_grad():
            return _readings(examples, *read_answers(vlm, encoded))
    except BadExample as error:
        if len(batch) > 1:
            return {i: reading for one in batch for i, reading in _read(vlm, [one], bad).items()}
        bad[examples[0].id] = str(error)
        return {}


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


def _table(examples: Sequence[Example], found: Mapping[str, Response], askings: Mapping[str, Asking]) -> pl.DataFrame:
    rows = [_row(example, found[example.id], askings[example.task].rule) for example in sorted(examples, key=lambda e: e.id)]
    table = pl.from_arrow(pa.Table.from_pylist(rows, schema=ANSWERS))
    assert isinstance(table, pl.DataFrame)
    return table


def _row(example: Example, response: Response, rule: Rule | None) -> dict[str, object]:
    reading, answer = response.reading, response.answer or ""
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
