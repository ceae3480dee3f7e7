from typing import Literal

import numpy as np
import pytest

from headwise.layout import Layout
from headwise.scores.head_impact import HeadImpact
from headwise.scores.token_masks import NO_PLACE, Targets, token_masks
from headwise.segments import coverage
from tests.synthetic import mask_frame, mask_row, one_view

GRID = (2, 3)
LAYOUT = one_view(*GRID)


def chosen(found: Targets, example_id: str = "a") -> list[int]:
    """The numbers of the tokens in the example's mask."""
    return np.flatnonzero(found.examples[example_id].tokens).tolist()


def half_cell() -> np.ndarray:
    """20 x 30 pixels, cells of 10 x 10: all of cell 0, exactly half of cell 1, a quarter of cell 5."""
    mask = np.zeros((20, 30), dtype=bool)
    mask[:10, :15] = True
    mask[10:15, 20:25] = True
    return mask


@pytest.mark.parametrize(
    ("threshold", "tokens"), [(0.0, [0, 1, 5]), (0.25, [0, 1, 5]), (0.3, [0, 1]), (0.5, [0, 1]), (0.51, [0]), (1.0, [0])]
)
def test_a_token_is_meant_from_the_threshold_on(threshold: float, tokens: list[int]) -> None:
    found = token_masks(mask_frame([mask_row("a", half_cell())]), {"a": LAYOUT}, HeadImpact(mask_threshold=threshold))
    assert chosen(found) == tokens
    assert found.examples["a"].image == "a.png"
    assert found.left_out == found.bad == {}


def test_a_threshold_of_any_takes_every_touched_token_and_no_other() -> None:
    mask = np.zeros((20, 30), dtype=bool)
    mask[19, 0] = True
    assert chosen(token_masks(mask_frame([mask_row("a", mask)]), {"a": LAYOUT}, HeadImpact(mask_threshold=0))) == [3]


@pytest.mark.parametrize("size", [7, 9, 11, 13, 23])
def test_a_cell_covered_to_the_threshold_counts_despite_rounding(size: int) -> None:
    layout = one_view(3, 3)
    mask = np.zeros((size, size), dtype=bool)
    mask[:, ::2] = True
    share = float(coverage(mask, layout)[4])
    for threshold in (0.0, min(1.0, share + 1e-12)):
        assert 4 in chosen(token_masks(mask_frame([mask_row("a", mask)]), {"a": layout}, HeadImpact(mask_threshold=threshold)))


def cells(*numbers: int) -> np.ndarray:
    tokens = np.isin(np.arange(6), numbers).reshape(GRID)
    return np.kron(tokens, np.ones((10, 10), dtype=bool)).astype(bool)


ROWS = [
    mask_row("a", cells(0), object=0),
    mask_row("a", cells(1), object=1),
    mask_row("a", cells(4), object=2, key=False),
    mask_row("a", cells(5), object=3, reason="too small"),
]


@pytest.mark.parametrize(("which", "tokens"), [("key", [0, 1]), ("union", [0, 1, 4])])
def test_key_objects_or_all_are_joined_and_dropped_ones_left_out(which: Literal["key", "union"], tokens: list[int]) -> None:
    assert chosen(token_masks(mask_frame(ROWS), {"a": LAYOUT}, HeadImpact(mask_object=which))) == tokens


def test_halves_of_a_cell_by_two_objects_count_together() -> None:
    upper, lower = np.zeros((2, 20, 30), dtype=bool)
    upper[:5, :10] = True
    lower[5:10, :10] = True
    rows = [mask_row("a", upper, object=0), mask_row("a", lower, object=1)]
    assert chosen(token_masks(mask_frame(rows), {"a": LAYOUT}, HeadImpact(mask_threshold=0.9))) == [0]


@pytest.mark.parametrize("which", ["key", "union"])
def test_each_example_without_a_token_mask_is_told_why(which: Literal["key", "union"]) -> None:
    speck = np.zeros((20, 30), dtype=bool)
    speck[0, 0] = True
    rows = [
        mask_row("dropped", cells(0), reason="covers too little"),
        mask_row(
            "nothing", cells(0), object=None, phrase=None, key=False, rle=None, reason="no object is meant: the example has no phrase"
        ),
        mask_row("small", speck),
        mask_row("text", cells(0)),
        mask_row("queries", cells(0)),
        mask_row("torn", cells(0), height=21),
        mask_row("good", cells(2)),
        mask_row("unobserved", cells(2)),
    ]
    layouts: dict[str, Layout | None] = dict.fromkeys(("small", "dropped", "nothing", "absent", "torn", "good"), LAYOUT)
    layouts |= {"text": None, "queries": ()}
    found = token_masks(mask_frame(rows), layouts, HeadImpact(mask_object=which))
    assert list(found.examples) == ["good"]
    assert found.left_out == {
        "dropped": "no usable mask: object 0 (thing): covers too little",
        "nothing": "no object is meant: the example has no phrase",
        "queries": NO_PLACE,
        "small": "too small for the grid: the objects cover no token of 2 x 3 up to mask_threshold = 0.5",
        "text": "no image: the model saw none",
    }
    assert found.bad == {
        "absent": "missing mask: the example has no row in masks.parquet",
        "torn": "unreadable mask: the mask's runs fill 600 pixels, the image has 21 x 30 = 630",
    }


def test_questions_about_one_image_are_one_image() -> None:
    rows = [mask_row("a", cells(0), image="x"), mask_row("b", cells(1), image="x"), mask_row("c", cells(2), image="y")]
    assert token_masks(mask_frame(rows), dict.fromkeys("abc", LAYOUT), HeadImpact()).num_images == 2


def test_each_example_is_laid_on_its_own_layout() -> None:
    rows = [mask_row(example_id, cells(0, 1)) for example_id in "ab"]
    found = token_masks(mask_frame(rows), {"b": one_view(4, 6), "a": LAYOUT}, HeadImpact())
    assert list(found.examples) == ["a", "b"]
    assert found.examples["a"].tokens.size == 6
    assert chosen(found, "b") == [0, 1, 2, 3, 6, 7, 8, 9]
