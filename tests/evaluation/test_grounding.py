"""Where attention points, by hand and against a slow loop."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headwise.attention.observe import observe
from headwise.benchmarks.benchmark import Source
from headwise.benchmarks.grounding import box_mask
from headwise.benchmarks.registry import read_questions
from headwise.data import DataSource, write_data
from headwise.evaluation.grounding import ground, judge_map
from headwise.evaluation.settings import Evaluation
from headwise.examples import CAPTION, OBJECTS, OBJECTS_FILE, BadExample, Example, open_image, read_examples
from headwise.files import read_table
from headwise.layout import View
from headwise.masks.rle import decode
from headwise.vlm import encode
from tests import tiny
from tests.benchmarks.official import WRITERS

GRID = (View(2, 2),)


def pixels(*places: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((4, 4), dtype=bool)
    for row, column in places:
        mask[row, column] = True
    return mask


TOP_LEFT = pixels((0, 0), (0, 1), (1, 0), (1, 1))
SPECK = pixels((3, 3))


@pytest.mark.parametrize(
    ("attention", "mask", "hit", "iou"),
    [
        ([0.7, 0.1, 0.1, 0.1], TOP_LEFT, 1, 1.0),
        ([0.1, 0.7, 0.1, 0.1], TOP_LEFT, 0, 0.0),
        ([0.4, 0.4, 0.1, 0.1], TOP_LEFT, 1, 0.5),  # of equals the first
        ([0.3, 0.4, 0.2, 0.1], TOP_LEFT, 0, 0.5),
        ([0.1, 0.1, 0.1, 0.7], SPECK, 1, 1.0),  # a quarter of a cell, and no other cell has more
        ([0.25, 0.25, 0.25, 0.25], TOP_LEFT, 1, 0.0),  # nothing is above the mean
        ([0.4, 0.3, 0.2, 0.1], TOP_LEFT | pixels((0, 2), (1, 2)), 1, 1.0),  # half of the second cell
    ],
)
def test_pointing_and_overlap_by_hand(attention: list[float], mask: np.ndarray, hit: int, iou: float) -> None:
    judged = judge_map(np.array(attention), mask, GRID)
    assert (judged.right, judged.part, judged.whole, judged.valid) == (hit, pytest.approx(iou), 1, True)


def test_an_object_outside_what_the_model_sees_is_no_hit() -> None:
    """A processor that crops the middle: the first column of pixels is in no cell."""
    middle = (View(2, 2, 0.0, 0.25, 1.0, 0.75),)
    with pytest.raises(BadExample, match="covers no visual token"):
        judge_map(np.array([0.7, 0.1, 0.1, 0.1]), pixels((0, 0), (1, 0)), middle)
    assert judge_map(np.array([0.7, 0.1, 0.1, 0.1]), pixels((0, 1), (1, 1)), middle).right == 1


def test_a_box_is_its_pixels_and_never_none() -> None:
    image = Image.new("RGB", (10, 20))
    mask = box_mask((0.1, 0.5, 0.4, 0.9), image)
    assert mask.shape == (20, 10) and mask.sum() == 8 * 3 and mask[10:18, 1:4].all()
    assert box_mask((0.99, 0.99, 1.0, 1.0), image).sum() == 1


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "images"
    write_data(DataSource(calibration=2, evaluation=5, forgetting=2), folder, lambda _done, _all: None)
    return folder


def test_scenes_are_looked_at_where_their_objects_are(scenes: Path) -> None:
    """One example at a time, by the definitions: the mean of every map, its highest token, the tokens above its mean."""
    vlm = tiny.tiny_vlm()
    questions = read_questions(Source(name="grounding"), scenes)
    own = {e.id: e for e in read_examples(scenes, "evaluation") if e.task != CAPTION and e.phrase}
    assert {e.id.removeprefix("grounding/") for e in questions.examples} <= own.keys() and len(questions.examples) > 5
    found, bad = ground(vlm, questions, Evaluation(batch_size=4), lambda _done, _all: None)
    assert not bad and found["example_id"].is_sorted() and set(found["split"]) == {"grounding"}
    objects = read_table(scenes / OBJECTS_FILE, OBJECTS)
    rows, columns = tiny.GRID
    for row in found.iter_rows(named=True):
        example = own[row["example_id"].removeprefix("grounding/")]
        batch = encode(vlm, [open_image(scenes, example)], [example.question], [example.answers[0]])
        (maps,) = observe(vlm, batch).maps["map"]
        mean = sum(maps[layer, head] for layer in range(maps.shape[0]) for head in range(maps.shape[1])) / (maps.shape[0] * maps.shape[1])
        meant = objects.filter((objects["image"] == example.image) & (objects["phrase"] == example.phrase)).to_dicts()
        mask = np.logical_or.reduce([decode(o["rle"], o["height"], o["width"]) for o in meant])
        height, width = (side // cells for side, cells in zip(mask.shape, (rows, columns), strict=True))
        shares = [mask[r * height : (r + 1) * height, c * width : (c + 1) * width].mean() for r in range(rows) for c in range(columns)]
        own_tokens = {k for k, share in enumerate(shares) if share >= min(0.5, max(shares))}
        looked = {k for k, value in enumerate(mean) if value > mean.mean()}
        assert row["right"] == float(int(np.argmax(mean)) in own_tokens)
        assert row["part"] == pytest.approx(len(looked & own_tokens) / len(looked | own_tokens)) and row["whole"] == 1


def test_refcocos_boxes_are_looked_at(tmp_path: Path) -> None:
    WRITERS["grounding"](tmp_path)
    questions = read_questions(Source(name="grounding", path=str(tmp_path)), tmp_path / "own")
    assert all(e.split == "grounding" and e.id.startswith("grounding/") and e.answers == (e.phrase,) for e in questions.examples)
    assert not any("[" in e.question + e.answers[0] for e in questions.examples), "the box is not shown to the model"
    found, bad = ground(tiny.tiny_vlm(), questions, Evaluation(batch_size=4), lambda _done, _all: None)
    assert not bad and len(found) == len(questions.examples) and found["nats"].null_count() == len(found)


def test_an_image_that_is_gone_is_a_bad_example(scenes: Path) -> None:
    questions = read_questions(Source(name="grounding", limit=2), scenes)
    lost = [Example(**{**vars(e), "image": "images/gone.png"}) for e in questions.examples[:1]]
    altered = type(questions)([*lost, *questions.examples[1:]], questions.askings, questions.images, questions.mask)
    found, bad = ground(tiny.tiny_vlm(), altered, Evaluation(), lambda _done, _all: None)
    assert set(bad) == {lost[0].id} and len(found) == len(questions.examples) - 1
