import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp
from pydantic import TypeAdapter, ValidationError

from headwise.masks.quality import MaskQuality, bounding_box, rejection

GATES = MaskQuality(min_area=0.1, max_area=0.5)


@pytest.mark.parametrize(
    ("area", "said"),
    [(0.0999, "less than min_area = 0.1"), (0.1, None), (0.5, None), (0.5001, "more than max_area = 0.5"), (0.0, "empty")],
)
def test_an_object_is_kept_between_the_gates_and_at_them(area: float, said: str | None) -> None:
    reason = rejection(area, GATES)
    assert (reason is None) == (said is None)
    assert said is None or said in str(reason)


def test_an_empty_mask_is_dropped_without_gates_too() -> None:
    assert rejection(0.0, MaskQuality(min_area=0, max_area=1)) is not None


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)))
def test_the_box_is_the_smallest_around_the_mask(mask: np.ndarray) -> None:
    pixels = [(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    xs, ys = [x for x, _ in pixels] or [0], [y for _, y in pixels] or [0]
    expected = [min(xs), min(ys), max(xs) + 1, max(ys) + 1] if pixels else [0, 0, 0, 0]
    assert bounding_box(mask) == expected


@pytest.mark.parametrize("wrong", [{"min_area": -0.1}, {"max_area": 1.5}, {"max_bad_share": 2}, {"minimum": 0.1}])
def test_settings_refuse_shares_outside_0_to_1_and_unknown_fields(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(MaskQuality).validate_python(wrong)
