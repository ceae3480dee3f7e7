"""The truth agrees with itself; what was moved, grown, doubled or lost agrees as much as the arithmetic says."""

from itertools import permutations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation

from headwise.masks.agreement import MATCH, agreement
from tests.synthetic import mask_frame, mask_row

SIDE = 60


def block(top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def frame(masks: dict[str, list[np.ndarray]]) -> pl.DataFrame:
    return mask_frame([mask_row(example, mask, object=n) for example, own in masks.items() for n, mask in enumerate(own)])


TRUTH = {"a": [block(10, 10, 20, 20)], "b": [block(5, 5, 10, 30), block(40, 5, 10, 30)], "c": [block(20, 20, 30, 30)]}


def changed(change) -> dict[str, list[np.ndarray]]:
    return {example: [change(mask) for mask in own] for example, own in TRUTH.items()}


def test_the_truth_agrees_with_itself() -> None:
    found = agreement(frame(TRUTH), frame(TRUTH))
    assert (found.mean_iou, found.precision, found.recall, found.union_iou) == (1, 1, 1, 1)
    assert (found.examples, found.objects, found.masks) == (3, 4, 4)


@pytest.mark.parametrize("shift", [1, 5, 9])
def test_a_shift_by_a_known_amount_costs_what_it_must(shift: int) -> None:
    found = agreement(frame(changed(lambda mask: np.roll(mask, shift, axis=1))), frame(TRUTH))
    expected = [(width - shift) / (width + shift) for width in (20, 30, 30, 30)]
    assert found.mean_iou == pytest.approx(np.mean(expected))
    assert found.recall == found.precision == np.mean([iou >= MATCH for iou in expected])
    assert found.union_iou == pytest.approx(np.mean([expected[0], expected[1], expected[3]]))


@pytest.mark.parametrize("steps", [1, 3])
def test_a_dilation_by_a_known_amount_costs_what_it_must(steps: int) -> None:
    grown = changed(lambda mask: binary_dilation(mask, np.ones((3, 3)), iterations=steps))
    sides = [(20, 20), (10, 30), (10, 30), (30, 30)]
    expected = [height * width / ((height + 2 * steps) * (width + 2 * steps)) for height, width in sides]
    assert agreement(frame(grown), frame(TRUTH)).mean_iou == pytest.approx(np.mean(expected))


def test_a_lost_object_counts_zero_and_an_invented_one_costs_precision() -> None:
    found = agreement(frame({"a": [*TRUTH["a"], block(50, 50, 5, 5)], "b": TRUTH["b"][:1]}), frame(TRUTH))
    assert (found.mean_iou, found.recall, found.precision) == (2 / 4, 2 / 4, 2 / 3)
    assert found.union_iou == pytest.approx((400 / 425 + 0.5 + 0) / 3)


def test_what_is_not_key_or_not_usable_does_not_count() -> None:
    rows = [
        mask_row("a", TRUTH["a"][0]),
        mask_row("a", block(0, 0, 9, 9), object=1, key=False),
        mask_row("a", block(0, 0, 9, 9), object=2, reason="no"),
    ]
    found = agreement(mask_frame(rows), frame({"a": TRUTH["a"]}))
    assert (found.masks, found.precision, found.recall) == (1, 1, 1)


def test_an_object_of_several_names_counts_once() -> None:
    found = agreement(frame({"a": TRUTH["a"]}), frame({"a": TRUTH["a"] * 3}))
    assert (found.objects, found.mean_iou, found.recall) == (1, 1, 1)


def test_without_a_truth_every_share_is_unknown() -> None:
    found = agreement(frame(TRUTH), mask_frame([]))
    assert (found.examples, found.objects, found.masks) == (0, 0, 0)
    assert found.mean_iou is found.precision is found.recall is found.union_iou is None


BLOCKS = st.lists(st.builds(block, *[st.integers(0, 30)] * 2, *[st.integers(1, 30)] * 2), max_size=4, unique_by=lambda mask: mask.tobytes())


def iou(first: np.ndarray, second: np.ndarray) -> float:
    return (first & second).sum() / (first | second).sum()


@given(BLOCKS, BLOCKS.filter(len))
def test_the_pairs_are_the_best_of_all_pairings(masks: list[np.ndarray], objects: list[np.ndarray]) -> None:
    found = agreement(frame({"a": masks}), frame({"a": objects}))
    table = np.array([[iou(mask, other) for other in objects] for mask in masks]).reshape(len(masks), len(objects))
    wide = table if len(masks) <= len(objects) else table.T
    best = max(sum(wide[row, column] for row, column in enumerate(order)) for order in permutations(range(wide.shape[1]), len(wide)))
    assert found.mean_iou == pytest.approx(best / len(objects))
    together = iou(np.any(masks, axis=0), np.any(objects, axis=0)) if masks else 0
    assert found.union_iou == pytest.approx(together)
