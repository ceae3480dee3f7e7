from typing import Literal

import numpy as np
import pytest

from headwise.scores.head_impact import HeadImpact
from headwise.scores.token_masks import token_masks
from headwise.segments import coverage
from tests.synthetic import mask_frame, mask_row

GRID = (2, 3)


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
    found, left_out = token_masks(mask_frame([mask_row("a", half_cell())]), {"a": GRID}, HeadImpact(mask_threshold=threshold))
    assert np.flatnonzero(found["a"]).tolist() == tokens
    assert left_out == {}


def test_a_threshold_of_any_takes_every_touched_token_and_no_other() -> None:
    mask = np.zeros((20, 30), dtype=bool)
    mask[19, 0] = True
    found, _ = token_masks(mask_frame([mask_row("a", mask)]), {"a": GRID}, HeadImpact(mask_threshold=0))
    assert np.flatnonzero(found["a"]).tolist() == [3]


@pytest.mark.parametrize("size", [7, 9, 11, 13, 23])
def test_a_cell_covered_to_the_threshold_counts_despite_rounding(size: int) -> None:
    grid = (3, 3)
    mask = np.zeros((size, size), dtype=bool)
    mask[:, ::2] = True
    found, _ = token_masks(mask_frame([mask_row("a", mask)]), {"a": grid}, HeadImpact(mask_threshold=0))
    share = float(coverage(mask, grid)[4])
    exact, _ = token_masks(mask_frame([mask_row("a", mask)]), {"a": grid}, HeadImpact(mask_threshold=min(1.0, share + 1e-12)))
    assert found["a"][4]
    assert exact["a"][4]


def cells(*chosen: int) -> np.ndarray:
    tokens = np.isin(np.arange(6), chosen).reshape(GRID)
    return np.kron(tokens, np.ones((10, 10), dtype=bool)).astype(bool)


ROWS = [
    mask_row("a", cells(0), object=0),
    mask_row("a", cells(1), object=1),
    mask_row("a", cells(4), object=2, key=False),
    mask_row("a", cells(5), object=3, reason="too small"),
]


@pytest.mark.parametrize(("which", "tokens"), [("key", [0, 1]), ("union", [0, 1, 4])])
def test_key_objects_or_all_are_joined_and_dropped_ones_left_out(which: Literal["key", "union"], tokens: list[int]) -> None:
    found, _ = token_masks(mask_frame(ROWS), {"a": GRID}, HeadImpact(mask_object=which))
    assert np.flatnonzero(found["a"]).tolist() == tokens


def test_halves_of_a_cell_by_two_objects_count_together() -> None:
    upper, lower = np.zeros((2, 20, 30), dtype=bool)
    upper[:5, :10] = True
    lower[5:10, :10] = True
    rows = [mask_row("a", upper, object=0), mask_row("a", lower, object=1)]
    found, _ = token_masks(mask_frame(rows), {"a": GRID}, HeadImpact(mask_threshold=0.9))
    assert np.flatnonzero(found["a"]).tolist() == [0]


def test_each_example_without_a_token_mask_is_told_why() -> None:
    speck = np.zeros((20, 30), dtype=bool)
    speck[0, 0] = True
    rows = [
        mask_row("dropped", cells(0), reason="covers too little"),
        mask_row("small", speck),
        mask_row("text", cells(0)),
        mask_row("good", cells(2)),
        mask_row("unobserved", cells(2)),
    ]
    grids = {"small": GRID, "dropped": GRID, "absent": GRID, "text": (0, 0), "good": GRID}
    found, left_out = token_masks(mask_frame(rows), grids, HeadImpact())
    assert list(found) == ["good"]
    assert set(left_out) == {"small", "dropped", "absent", "text"}
    assert "covers too little" in left_out["dropped"]
    assert "no token of the 2 x 3 grid up to mask_threshold = 0.5" in left_out["small"]
    assert "no row in masks.parquet" in left_out["absent"]
    assert "no image" in left_out["text"]


def test_each_example_is_laid_on_its_own_grid() -> None:
    rows = [mask_row(example_id, cells(0, 1)) for example_id in "ab"]
    found, _ = token_masks(mask_frame(rows), {"b": (4, 6), "a": (2, 3)}, HeadImpact())
    assert list(found) == ["a", "b"]
    assert found["a"].size == 6
    assert np.flatnonzero(found["b"]).tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
