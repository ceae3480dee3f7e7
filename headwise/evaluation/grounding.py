"""Where a model looks while it reads an answer: at the object that the answer is about?"""

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl
import pyarrow as pa
from jaxtyping import Bool, Float
from PIL import Image

from headwise.attention.observe import observe
from headwise.evaluation.judgement import Judgement, ObjectMask, Questions
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.table import ANSWERS
from headwise.examples import BadExample, Example, open_image
from headwise.layout import Layout
from headwise.segments import coverage
from headwise.vlm import VLM, encode

COVERED = 0.5
"""The share of a visual token's cell that the object has to cover, as Head Impact's masks."""
Opened = tuple[Example, Image.Image]


def ground(
    vlm: VLM, questions: Questions, settings: Evaluation, progress: Callable[[int, int], object]
) -> tuple[pl.DataFrame, dict[str, str]]:
    """The ANSWERS table of where the model looks, sorted by example, and the reason of each bad example; every example has an image.

    The model reads the first reference, and its `map`, the mean attention of the answer's rows to each visual token, is averaged over all
    heads of all layers: no head is chosen, so nothing is fitted to what is judged. `right` and `part` are `judge_map`'s. Raises ValueError
    if the model's visual tokens have no place in the image.
    """
    mask_of = questions.mask
    assert mask_of is not None
    bad: dict[str, str] = {}
    rows: list[dict[str, object]] = []
    ordered = sorted(questions.examples, key=lambda example: (len(example.question), example.id))
    for start in range(0, len(ordered), settings.batch_size):
        progress(start, len(ordered))
        window: list[Opened] = []
        for example in ordered[start : start + settings.batch_size]:
            try:
                window.append((example, open_image(questions.images, example)))
            except BadExample as error:
                bad[example.id] = str(error)
        rows += _looked(vlm, window, mask_of, bad)
    progress(len(ordered), len(ordered))
    rows.sort(key=lambda row: str(row["example_id"]))
    table = pl.from_arrow(pa.Table.from_pylist(rows, schema=ANSWERS))
    assert isinstance(table, pl.DataFrame)
    return table, bad


def judge_map(attention: Float[np.ndarray, "visual"], mask: Bool[np.ndarray, "height width"], layout: Layout) -> Judgement:
    """Right if the visual token that most attention falls on is one of the object's (the pointing game, Zhang et al. 2018, arXiv
    1608.00507, without its tolerance of 15 pixels: a token is larger); the IoU of the tokens above the map's mean with the object's as a
    part of 1 (arXiv 2511.23375, eq. of Head Impact).

    The object's tokens are those of whose cells it covers at least COVERED, or of a smaller object the one that it covers most. Raises
    BadExample if it covers none.
    """
    covered = coverage(mask, layout)
    if not covered.any():
        raise BadExample("the object covers no visual token: it lies outside what the image processor keeps")
    own = covered >= min(COVERED, covered.max())
    looked = attention > attention.mean()
    overlap = float((looked & own).sum() / (looked | own).sum())
    return Judgement(float(own[attention.argmax()]), valid=True, part=overlap, whole=1.0)


def _looked(vlm: VLM, window: Sequence[Opened], mask_of: ObjectMask, bad: dict[str, str]) -> list[dict[str, object]]:
    """A row per example; if the model cannot take a batch, each example is tried alone and the bad ones are added to `bad`."""
    if not window:
        return []
    examples, images = zip(*window, strict=True)
    try:
        batch = encode(vlm, images, [example.question for example in examples], [example.answers[0] for example in examples])
    except BadExample as error:
        if len(window) > 1:
            return [row for one in window for row in _looked(vlm, [one], mask_of, bad)]
        bad[examples[0].id] = str(error)
        return []
    observed = observe(vlm, batch, ("map",))
    rows = []
    for example, image, map_, layout in zip(examples, images, observed.maps["map"], observed.layouts, strict=True):
        if not layout:
            raise ValueError("this model's visual tokens have no place in the image (queries of a Q-Former), so it cannot be said to look")
        try:
            judged = judge_map(map_.mean(axis=(0, 1)), mask_of(example, image), layout)
        except BadExample as error:
            bad[example.id] = str(error)
            continue
        rows.append(
            {
                "example_id": example.id,
                "image": example.image,
                "split": example.split,
                "task": example.task,
                "answer": "",
                "right": judged.right,
                "valid": judged.valid,
                "nats": None,
                "tokens": None,
                "part": judged.part,
                "whole": judged.whole,
            }
        )
    return rows
