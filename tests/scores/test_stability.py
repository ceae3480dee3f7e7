from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from headwise.scores.stability import (
    DrawnMeans,
    HeadRanks,
    image_draws,
    layers_differ,
    rank_agreement,
    stability_over_images,
    stability_over_thresholds,
)

TAIL_OF_10 = stats.norm.cdf(-stats.t.ppf(0.975, 9) * np.sqrt(10 / 9))
"""Hesterberg's share of draws beyond either end of a 95 % interval over ten images."""


def scipy_tau(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.asarray(stats.kendalltau(first, second))[0])


def test_the_first_draw_is_the_sample_and_the_others_draw_images_with_replacement() -> None:
    images = [f"{i}.png" for i in range(2000)]
    draws = image_draws(images, 50, seed=1)
    assert draws.shape == (2000, 51)
    assert (draws[:, 0] == 1).all()
    assert draws[:, 1:].mean() == pytest.approx(1.0, abs=0.02)
    assert draws[:, 1:].var() == pytest.approx(1.0, abs=0.03)
    assert (draws[:, 1:] == 0).mean() == pytest.approx(1 / np.e, abs=0.01)
    assert np.abs(np.corrcoef(draws[:, 1:].T) - np.eye(50)).max() < 0.12


def test_what_an_image_is_drawn_depends_on_its_name_and_the_seed_alone() -> None:
    one, other = image_draws(["a", "b", "a", "c"], 30, seed=1), image_draws(["c", "a"], 30, seed=1)
    np.testing.assert_array_equal(one[0], one[2])
    np.testing.assert_array_equal(one[[3, 0]], other)
    assert not np.array_equal(one[0], one[1])
    assert not np.array_equal(other, image_draws(["c", "a"], 30, seed=2))


@pytest.mark.parametrize("blocks", [1, 3, 20])
def test_drawn_means_are_means_of_the_drawn_examples(blocks: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.random((20, 3)).astype(np.float32)
    values[[4, 7]] = np.nan
    draws = image_draws([str(i // 2) for i in range(20)], 30, seed=0)
    found = DrawnMeans(30, 3)
    for block, block_draws in zip(np.array_split(values, blocks), np.array_split(draws, blocks), strict=True):
        found.add(block, block_draws)
    expected = [np.nanmean(np.repeat(values.astype(np.float64), column.astype(int), axis=0), axis=0) for column in draws.T]
    np.testing.assert_allclose(found.sample, expected[0], rtol=1e-12)
    np.testing.assert_allclose(found.drawn, expected[1:], rtol=1e-12)
    np.testing.assert_allclose(found.interval(10), np.quantile(expected[1:], [TAIL_OF_10, 1 - TAIL_OF_10], axis=0), rtol=1e-6)
    assert found.n == 18


def test_draws_without_a_value_are_left_out_and_without_any_there_is_no_interval() -> None:
    found = DrawnMeans(2, 1)
    found.add(np.array([[np.nan], [2.0]], dtype=np.float32), np.array([[1.0, 2.0, 1.0], [1.0, 0.0, 1.0]]))
    assert found.drawn.tolist() == [[2.0]]
    nothing = DrawnMeans(2, 3)
    nothing.add(np.full((4, 3), np.nan, dtype=np.float32), np.ones((4, 3)))
    assert nothing.n == 0
    assert np.isnan([nothing.sample, *nothing.interval(2)]).all()


def test_more_questions_about_the_same_images_do_not_narrow_the_interval() -> None:
    """Four questions with the answer of one: the interval is that of one; resampling questions would halve it."""
    rng = np.random.default_rng(0)
    values, images = rng.random((60, 1)).astype(np.float32), [f"{i}.png" for i in range(60)]
    once, four_times = DrawnMeans(400, 1), DrawnMeans(400, 1)
    once.add(values, image_draws(images, 400, 0))
    four_times.add(np.repeat(values, 4, axis=0), image_draws([i for i in images for _ in range(4)], 400, 0))
    np.testing.assert_allclose(four_times.interval(60), once.interval(60), rtol=1e-12)


@pytest.mark.parametrize("images", [20, 150])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(images: int) -> None:
    """Images of one to four questions that share an offset; of 20 images plain percentiles cover 89 %."""
    rng = np.random.default_rng(0)
    units = 300
    image = np.repeat(np.arange(images), rng.integers(1, 5, images))
    values = rng.exponential(1.0, (images, units))[image] + rng.normal(0, 0.5, (len(image), units))
    found = DrawnMeans(400, units)
    found.add(values.astype(np.float32), image_draws([str(i) for i in image], 400, 0))
    low, high = found.interval(images)
    assert 0.91 < ((low < 1.0) & (high > 1.0)).mean() < 0.98


def test_layers_are_compared_by_their_heads_means() -> None:
    means = np.random.default_rng(0).random((5, 9)) + np.arange(5)[:, None] * 0.2
    expected = stats.kruskal(*means)
    found = layers_differ(means)
    assert (found["kruskal"], found["kruskal_p"]) == (expected.statistic, expected.pvalue)
    assert (found["layers"], found["heads"]) == (5, 9)
    assert expected.pvalue < 0.001


def heads_differ(scores: np.ndarray, blocks: int = 3) -> dict[str, float | int | None]:
    """The tests of one layer's heads (example, head), gathered in blocks."""
    ranks = HeadRanks(1, scores.shape[1])
    for block in np.array_split(scores.astype(np.float32), blocks):
        ranks.add(block[:, None])
    (found,) = ranks.tests()
    return {name: value for name, value in found.items() if name != "layer"}


def draw_ious(seed: int, num_examples: int, num_heads: int, visual: int) -> np.ndarray:
    """IoUs of token sets of a grid of so many visual tokens; smaller grids tie more often."""
    rng = np.random.default_rng(seed)
    union = rng.integers(1, visual + 1, (num_examples, num_heads))
    return (rng.integers(0, union + 1) / union).astype(np.float32)


@settings(max_examples=40)
@given(st.integers(0, 2**20), st.integers(2, 40), st.integers(3, 9), st.sampled_from([1, 2, 9, 100]), st.integers(1, 5))
def test_streamed_rank_tests_are_scipys(seed: int, num_examples: int, num_heads: int, visual: int, blocks: int) -> None:
    """Up to 100 visual tokens to the last digits."""
    scores = draw_ious(seed, num_examples, num_heads, visual)
    found = heads_differ(scores, blocks)
    if np.ptp(scores) > 0:
        once = stats.kruskal(*scores.T.astype(np.float64))
        assert (found["kruskal"], found["kruskal_p"]) == pytest.approx((once.statistic, once.pvalue), abs=1e-9)
    if np.ptp(scores, axis=1).any():
        repeated = stats.friedmanchisquare(*scores.T.astype(np.float64))
        assert (found["friedman"], found["friedman_p"]) == pytest.approx((repeated.statistic, repeated.pvalue), abs=1e-9)


def test_different_ious_of_a_hundred_tokens_stay_different_and_of_many_differ_little() -> None:
    every = np.unique([np.float32(a / b) for b in range(1, 101) for a in range(b + 1)])
    ranks = HeadRanks(1, 1)
    ranks.add(every[:, None, None])
    assert ranks.counts.max() == 1
    fine = draw_ious(1, 300, 9, 4000)
    once = stats.kruskal(*fine.T.astype(np.float64))
    assert heads_differ(fine)["kruskal"] == pytest.approx(once.statistic, rel=1e-3)


def test_heads_are_compared_as_repeated_measures_too() -> None:
    rng = np.random.default_rng(0)
    found = heads_differ((rng.random((40, 1)) + rng.random((40, 6)) * 0.1 + np.arange(6) * 0.02) / 1.3)
    assert found["friedman_p"] is not None
    assert found["kruskal_p"] is not None
    assert found["friedman_p"] < 0.001 < 0.05 < found["kruskal_p"]  # the examples differ more than the heads: only Friedman sees it


def test_layers_are_tested_apart() -> None:
    scores = np.stack([draw_ious(layer, 30, 4, 50) for layer in range(3)], axis=1)
    ranks = HeadRanks(3, 4)
    ranks.add(scores)
    assert [row["layer"] for row in ranks.tests()] == [0, 1, 2]
    for layer, row in enumerate(ranks.tests()):
        assert {name: value for name, value in row.items() if name != "layer"} == heads_differ(scores[:, layer])


def test_nothing_to_compare_is_no_test() -> None:
    assert layers_differ(np.random.default_rng(0).random((1, 9)))["kruskal"] is None
    assert layers_differ(np.full((3, 4), 0.5))["kruskal_p"] is None
    assert set(heads_differ(np.zeros((10, 5))).values()) == {None}
    assert set(heads_differ(np.random.default_rng(0).random((10, 1))).values()) == {None}


def test_heads_that_never_differ_within_an_example_have_no_friedman_test() -> None:
    found = heads_differ(np.repeat(draw_ious(0, 10, 1, 30), 4, axis=1))
    assert found["friedman"] is None
    assert found["kruskal"] == pytest.approx(0.0, abs=1e-9)


def test_two_heads_have_no_friedman_test() -> None:
    found = heads_differ(draw_ious(0, 10, 2, 30))
    assert found["friedman"] is None
    assert found["kruskal"] is not None


@pytest.mark.parametrize(("change", "tau"), [(lambda x: x**3, 1.0), (lambda x: -x, -1.0)])
def test_agreement_is_about_ranks(change: Callable[[np.ndarray], np.ndarray], tau: float) -> None:
    scores = np.random.default_rng(0).random(12)
    assert rank_agreement(scores, change(scores)) == pytest.approx(tau)


def test_agreement_is_kendalls_tau_with_ties() -> None:
    first, second = np.array([1.0, 2.0, 2.0, 4.0, 3.0]), np.array([2.0, 1.0, 3.0, 3.0, 5.0])
    assert rank_agreement(first, second) == pytest.approx(scipy_tau(first, second))


def test_nothing_is_ranked_by_one_layer_or_by_equal_scores() -> None:
    assert rank_agreement(np.array([1.0]), np.array([2.0])) is None
    assert rank_agreement(np.array([1.0, 1.0]), np.array([2.0, 3.0])) is None
    assert rank_agreement(np.array([1.0, 2.0]), np.array([3.0, 3.0])) is None


def test_a_clear_ranking_is_stable_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    clear = stability_over_images(np.arange(8.0), np.arange(8) + rng.normal(0, 0.01, (100, 8)), 100)
    noise = stability_over_images(rng.random(8), rng.random((100, 8)), 100)
    assert clear == pytest.approx({"tau": 1.0, "low": 1.0, "high": 1.0})
    assert noise["low"] is not None
    assert noise["tau"] is not None
    assert noise["high"] is not None
    assert noise["low"] < noise["tau"] < noise["high"] <= 1.0
    assert noise["tau"] < 0.8


def test_stability_is_the_mean_tau_over_draws() -> None:
    layers, drawn = np.random.default_rng(5).random(6), np.random.default_rng(6).random((40, 6))
    taus = [scipy_tau(layers, ranking) for ranking in drawn]
    low, high = np.quantile(taus, [TAIL_OF_10, 1 - TAIL_OF_10])
    assert stability_over_images(layers, drawn, 10) == pytest.approx({"tau": np.mean(taus), "low": low, "high": high})


def test_equal_layers_have_no_stability() -> None:
    assert stability_over_images(np.ones(4), np.ones((5, 4)), 5) == {"tau": None, "low": None, "high": None}


def test_each_threshold_is_compared_with_the_chosen_one() -> None:
    chosen = np.array([3.0, 1.0, 2.0])
    assert stability_over_thresholds(chosen, {"same": chosen * 2, "reverse": -chosen}) == pytest.approx({"same": 1.0, "reverse": -1.0})
