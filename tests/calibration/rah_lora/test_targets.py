"""Targets and anchors against hand-made tables and loops."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.calibration.rah_lora.settings import RahLora
from headwise.calibration.rah_lora.targets import HeadScores, anchors_for, choose_targets, layer_range

EVERY = RahLora(layers=(0.0, 1.0))


def percentile(values: list[float], share: float) -> float:
    """Between the two nearest of the sorted values, as far as the share lies between their places."""
    ordered = sorted(values)
    place = share / 100 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def test_a_hand_made_layer_with_ties() -> None:
    # the 15th percentile of ten heads lies between the second (-1) and the third (-1): with the tie it is -1, and only -2 is below
    isal = np.array([[-2.0, -1, -1, 0, 0, 0, 0, 1, 1, 2]])
    caf = np.array([[9.0, 9, 1, 1, 1, 1, 1, 1, 1, 1]])
    assert choose_targets(HeadScores(isal, caf), EVERY) == [(0, 0)]
    # the 70th percentile of the flow is 1: both 9s are above; without it every head below -1 counts
    assert choose_targets(HeadScores(isal, None), EVERY) == [(0, 0)]
    assert choose_targets(HeadScores(isal, None), replace(EVERY, p_isal=30.0)) == [(0, 0), (0, 1), (0, 2)]
    assert choose_targets(HeadScores(isal, caf), replace(EVERY, p_isal=30.0)) == [(0, 0), (0, 1)]
    assert choose_targets(HeadScores(isal, caf[:, ::-1]), EVERY) == []  # low saliency, low flow


@given(st.integers(0, 10_000), st.sampled_from([5.0, 10, 15, 20, 50]), st.sampled_from([0.0, 60, 70, 80]), st.integers(1, 12))
def test_targets_are_below_one_percentile_and_above_the_other(seed: int, p_isal: float, p_caf: float, heads: int) -> None:
    generator = np.random.default_rng(seed)
    isal, caf = (generator.integers(0, 6, (3, heads)).astype(float) for _ in range(2))
    settings = replace(EVERY, p_isal=p_isal, p_caf=p_caf)
    expected = [
        (layer, head)
        for layer in range(3)
        for head in range(heads)
        if isal[layer, head] < percentile(list(isal[layer]), p_isal) - 1e-12
        and caf[layer, head] > percentile(list(caf[layer]), p_caf) + 1e-12
    ]
    assert choose_targets(HeadScores(isal, caf), settings) == expected


def test_heads_that_are_all_alike_and_layers_of_one_head_have_no_targets() -> None:
    assert choose_targets(HeadScores(np.zeros((4, 9)), np.ones((4, 9))), EVERY) == []
    assert choose_targets(HeadScores(np.zeros((4, 1)), np.arange(4.0)[:, None]), EVERY) == []


def test_the_controls_take_high_heads_or_as_many_of_each_layer_at_random() -> None:
    generator = np.random.default_rng(0)
    scores = HeadScores(generator.normal(size=(8, 9)), generator.random((8, 9)))
    low = choose_targets(scores, EVERY)
    high = choose_targets(scores, replace(EVERY, targets="high"))
    drawn = [choose_targets(scores, replace(EVERY, targets="random", seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == len(low) > 0
    assert [layer for layer, _ in drawn[0]] == [layer for layer, _ in low]
    assert high == choose_targets(HeadScores(-scores.isal, scores.caf), EVERY) and not set(high) & set(low)


def test_only_layers_of_the_range_are_calibrated() -> None:
    assert layer_range(RahLora(), 30) == range(15) and layer_range(RahLora(layers=(0.375, 0.75)), 32) == range(12, 24)
    isal = np.tile(np.arange(9.0), (4, 1))
    assert {layer for layer, _ in choose_targets(HeadScores(isal, None), RahLora(layers=(0.5, 1.0)))} == {2, 3}
    with pytest.raises(ValueError, match=r"from 1 up to 1 of 4 layers there is none"):
        layer_range(RahLora(layers=(0.3, 0.31)), 4)


def test_anchors_are_sought_in_the_layer_then_next_to_it_then_two_away() -> None:
    isal = np.full((6, 3), -1.0)
    isal[0, 2] = 2
    isal[4, [0, 1]] = 0.7, 0.4
    assert anchors_for(4, isal, [], 0.5) == [(4, 0)]
    assert anchors_for(3, isal, [], 0.5) == [(4, 0)]
    assert anchors_for(2, isal, [], 0.5) == [(0, 2), (4, 0)]
    assert anchors_for(0, isal, [(0, 2)], 0.5) == []  # a target is no anchor
    assert anchors_for(5, isal, [(4, 0)], 0.3) == [(4, 1)]
    assert isal[0, 2] == 2
