import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import TypeAdapter, ValidationError

from headwise.masks.quality import bounding_box, box_iou, duplicates, rejection
from headwise.masks.rle import encode
from headwise.masks.settings import MaskQuality, Masks

GATES = MaskQuality(min_area=0.1, max_area=0.5, min_predicted_iou=0.7, min_stability=0.8, min_box_iou=0.5)
GOOD = {"predicted_iou": 0.7, "stability": 0.8, "box_iou": 0.5}


@pytest.mark.parametrize(
    ("area", "said"),
    [(0.0999, "less than min_area = 0.1"), (0.1, None), (0.5, None), (0.5001, "more than max_area = 0.5"), (0.0, "empty")],
)
def test_an_object_is_kept_between_the_gates_and_at_them(area: float, said: str | None) -> None:
    for figures in ({}, GOOD):
        reason = rejection(GATES, area, **figures)
        assert (reason is None) == (said is None)
        assert said is None or said in str(reason)


def test_an_empty_mask_is_dropped_without_gates_too() -> None:
    assert rejection(MaskQuality(min_area=0, max_area=1), 0.0) is not None


@pytest.mark.parametrize("figure", GOOD)
def test_a_generated_mask_has_to_pass_every_gate(figure: str) -> None:
    assert rejection(GATES, 0.3, **GOOD) is None
    low = GOOD[figure] - 0.001
    assert f"{figure} is {low:.3g}, less than min_{figure} = {GOOD[figure]:g}" == rejection(GATES, 0.3, **{**GOOD, figure: low})
    assert f"{figure} is not a number" == rejection(GATES, 0.3, **{**GOOD, figure: float("nan")})


def masks_of(*columns: tuple[int, int]) -> list[str]:
    found = []
    for start, stop in columns:
        mask = np.zeros((4, 20), dtype=bool)
        mask[:, start:stop] = True
        found.append(encode(mask))
    return found


def test_of_masks_that_overlap_the_best_is_kept() -> None:
    rles = masks_of((0, 10), (0, 9), (1, 10), (10, 20))
    assert duplicates(rles, 4, 20, [0.8, 0.9, 0.7, 0.1], 0.5) == {0: (1, 0.9), 2: (1, 0.8)}
    assert duplicates(rles, 4, 20, [0.8, 0.9, 0.7, 0.1], 0.95) == {}
    assert duplicates([], 4, 20, [], 0.5) == {}


def test_a_chain_of_overlaps_loses_every_other_link() -> None:
    """The first drops the second, and what only the second overlaps stays."""
    assert set(duplicates(masks_of((0, 10), (4, 14), (8, 18)), 4, 20, [0.9, 0.8, 0.7], 0.3)) == {1}


BOX = st.tuples(*[st.integers(0, 12)] * 4).filter(lambda box: box[0] <= box[2] and box[1] <= box[3])


@given(BOX, BOX)
def test_the_iou_of_boxes_is_that_of_their_pixels(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    masks = np.zeros((2, 12, 12), dtype=bool)
    for mask, (x0, y0, x1, y1) in zip(masks, (first, second), strict=True):
        mask[y0:y1, x0:x1] = True
    together = (masks[0] | masks[1]).sum()
    assert box_iou(first, second) == pytest.approx((masks[0] & masks[1]).sum() / together if together else 0)


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)))
def test_the_box_is_the_smallest_around_the_mask(mask: np.ndarray) -> None:
    pixels = [(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    xs, ys = [x for x, _ in pixels] or [0], [y for _, y in pixels] or [0]
    expected = (min(xs), min(ys), max(xs) + 1, max(ys) + 1) if pixels else (0, 0, 0, 0)
    assert bounding_box(mask) == expected


@pytest.mark.parametrize(
    "wrong",
    [{"quality": {"min_area": -0.1}}, {"quality": {"max_area": 1.5}}, {"max_bad_share": 2}, {"minimum": 0.1}, {"grounding": {"beams": 3}}],
)
def test_settings_refuse_shares_outside_0_to_1_and_unknown_fields(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Masks).validate_python(wrong)
