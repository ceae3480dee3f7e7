import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import TypeAdapter, ValidationError

from headwise.scores.head_impact import Cut, HeadImpact, binarise, iou, thresholds

SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=30)
MAPS = hnp.arrays(np.float16, SHAPES, elements=st.floats(0, 1, width=16)).map(lambda maps: maps.astype(np.float64))
CUTS = st.one_of(
    st.just(("mean", 0.0)),
    st.tuples(st.just("quantile"), st.floats(0, 0.99)),
    st.tuples(st.just("mean_plus_std"), st.floats(0, 3)),
)


def obvious_threshold(values: list[float], rule: str, value: float) -> float:
    mean = sum(values) / len(values)
    if rule == "quantile":
        return float(np.quantile(values, value, method="lower"))
    return mean + value * float(np.std(values)) if rule == "mean_plus_std" else mean


def obvious_iou(looked: set[int], meant: set[int]) -> float:
    return len(looked & meant) / len(looked | meant) if looked | meant else 0.0


def tokens(chosen: np.ndarray) -> set[int]:
    return set(np.flatnonzero(chosen).tolist())


@settings(max_examples=60, deadline=None)
@given(MAPS, st.lists(CUTS, min_size=1, max_size=4))
def test_thresholds_are_those_of_each_map_alone(maps: np.ndarray, cuts: list[Cut]) -> None:
    expected = [[obvious_threshold(row, *cut) for row in maps.tolist()] for cut in cuts]
    np.testing.assert_allclose(thresholds(maps, cuts), expected, rtol=1e-12, atol=1e-15)


def test_a_token_at_the_threshold_is_not_looked_at() -> None:
    maps = np.array([[0.25, 0.5, 0.75], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert binarise(maps, [("mean", 0.0)])[0].tolist() == [[False, False, True], [False] * 3, [False] * 3]
    assert binarise(maps, [("quantile", 0.5)])[0].tolist() == [[False, False, True], [False] * 3, [False] * 3]


def test_each_rule_by_hand() -> None:
    maps = np.array([[0.0, 0.0, 0.0, 1.0, 0.5]])  # mean 0.3, population standard deviation 0.4
    found = binarise(maps, [("mean", 0.0), ("mean_plus_std", 1.0), ("mean_plus_std", 2.0), ("quantile", 0.5), ("quantile", 0.9)])
    expected = [[0, 0, 0, 1, 1], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 1, 0]]
    assert found[:, 0].astype(int).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(MAPS, CUTS, st.sampled_from([0.5, 0.25, 4.0]))
def test_the_scale_of_a_map_does_not_matter(maps: np.ndarray, cut: Cut, scale: float) -> None:
    assert np.array_equal(binarise(maps, [cut]), binarise(maps * scale, [cut]))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 7, 63, 64, 65, 130]).flatmap(lambda n: st.tuples(*[hnp.arrays(bool, st.tuples(st.integers(1, 9), st.just(n)))] * 2))
)
def test_iou_is_that_of_the_token_sets(pair: tuple[np.ndarray, np.ndarray]) -> None:
    binary, masks = pair
    expected = [[obvious_iou(tokens(row), tokens(mask)) for mask in masks] for row in binary]
    np.testing.assert_allclose(iou(binary, masks), expected, rtol=1e-6)


def test_iou_keeps_the_leading_axes() -> None:
    binary = np.random.default_rng(0).random((3, 4, 10)) < 0.5
    masks = np.random.default_rng(1).random((2, 10)) < 0.5
    found = iou(binary, masks)
    assert found.shape == (3, 4, 2)
    for cut in range(3):
        np.testing.assert_array_equal(found[cut], iou(binary[cut], masks))


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": "quantile", "threshold_value": 1.0},
        {"threshold": "median"},
        {"threshold_value": -1},
        {"mask_threshold": 1.1},
        {"mask_object": "all"},
        {"bootstrap": 0},
        {"min_images": 1},
        {"max_bad_share": 1.1},
        {"pooling": "binarise_then_mean"},
    ],
)
def test_settings_out_of_bounds_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(HeadImpact).validate_python(wrong)


def test_a_value_above_one_is_a_fine_number_of_standard_deviations() -> None:
    assert HeadImpact(threshold="mean_plus_std", threshold_value=2.0).cut == ("mean_plus_std", 2.0)
