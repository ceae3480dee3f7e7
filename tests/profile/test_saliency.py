"""I-SAL and the likeness of maps against loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.layout import View
from headwise.profile.saliency import layer_z_scores, map_cosines, rank_correlation, saliency, top_overlap


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_the_z_scores_are_those_of_each_layer(layers: int, heads: int, seed: int) -> None:
    values = np.random.default_rng(seed).random((layers, heads))
    found = layer_z_scores(values)
    for layer, row in enumerate(values):
        mean = sum(row) / heads
        deviation = math.sqrt(sum((x - mean) ** 2 for x in row) / heads)
        assert found[layer] == pytest.approx([(x - mean) / (deviation + 1e-6) for x in row])


def test_heads_that_are_all_alike_and_a_single_head_have_a_score_of_zero() -> None:
    assert not layer_z_scores(np.full((3, 4), 0.3)).any() and not layer_z_scores(np.random.default_rng(0).random((3, 1))).any()


def test_both_halves_count_alike() -> None:
    assert saliency(np.array([0.2, 0.0]), np.array([0.4, 0.1])) == pytest.approx([0.3, 0.05])


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True)) / math.sqrt(sum(a * a for a in one) * sum(b * b for b in other))


def test_maps_are_compared_by_their_means() -> None:
    maps = [np.random.default_rng(seed).random((2, 3, 7)).astype(np.float32) for seed in range(4)]
    mean = [np.mean([map_[layer, head] for map_ in maps], axis=0) for layer in range(2) for head in range(3)]
    expected = np.array([[cosine(a, b) for b in mean] for a in mean])
    assert map_cosines(maps, [(View(1, 7),)] * 4) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("views", [(View(2, 2), View(2, 3)), (View(2, 3), View(3, 2))], ids=["sizes", "grids"])
def test_maps_of_unlike_layouts_are_compared_example_by_example(views: tuple[View, View]) -> None:
    maps = [np.random.default_rng(place).random((2, 3, view.cells)) for place, view in enumerate(views)]
    flat = [[map_[layer, head] for layer in range(2) for head in range(3)] for map_ in maps]
    expected = np.mean([[[cosine(a, b) for b in own] for a in own] for own in flat], axis=0)
    assert map_cosines(maps, [(view,) for view in views]) == pytest.approx(expected)


def test_a_head_that_does_not_look_at_the_image_is_like_no_other() -> None:
    maps = np.random.default_rng(0).random((1, 3, 5))
    maps[0, 1] = 0
    assert not map_cosines([maps], [(View(1, 5),)])[1].any()


def test_the_overlap_is_that_of_each_layers_upper_30_percent() -> None:
    one = np.array([np.arange(10.0), np.arange(10.0)])
    assert top_overlap(one, one) == 1 and top_overlap(one, -one) == 0
    assert top_overlap(one, np.stack([one[0], -one[0]])) == 0.5 and top_overlap(np.ones((2, 3)), one[:, :3]) == 1


def test_the_rank_correlation_is_that_of_the_ranks_or_none() -> None:
    one = np.array([[1.0, 2.0], [30.0, 4.0]])
    assert rank_correlation(one, one**3) == pytest.approx(1) and rank_correlation(one, -one) == pytest.approx(-1)
    assert rank_correlation(one, np.ones((2, 2))) is None
