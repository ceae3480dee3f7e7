from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from headwise.scores.stability import (
    bootstrap_means,
    heads_differ,
    layers_differ,
    rank_agreement,
    resample_counts,
    stability_over_examples,
    stability_over_thresholds,
)


def scipy_tau(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.asarray(stats.kendalltau(first, second))[0])


def test_each_resample_draws_as_many_examples_as_there_are() -> None:
    counts = resample_counts(50, 300, seed=1)
    assert counts.shape == (300, 50)
    assert (counts.sum(axis=1) == 50).all()
    assert (counts == 0).mean() == pytest.approx(1 / np.e, abs=0.02)
    np.testing.assert_array_equal(counts, resample_counts(50, 300, seed=1))
    assert not np.array_equal(counts, resample_counts(50, 300, seed=2))


def test_bootstrap_means_are_means_of_the_drawn_examples() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((20, 3)).astype(np.float32)
    values[4, 1] = values[7, 1] = np.nan
    counts = resample_counts(20, 30, seed=0)
    expected = [[np.nanmean(np.repeat(values[:, unit].astype(np.float64), row)) for unit in range(3)] for row in counts]
    np.testing.assert_allclose(bootstrap_means(values, counts), expected, rtol=1e-12)


def test_a_resample_without_a_value_has_no_mean() -> None:
    values = np.array([[np.nan], [2.0]])
    assert np.isnan(bootstrap_means(values, np.array([[2, 0]]))).all()
    assert bootstrap_means(values, np.array([[1, 1]])).tolist() == [[2.0]]


def test_layers_are_compared_by_their_heads_means() -> None:
    means = np.random.default_rng(0).random((5, 9)) + np.arange(5)[:, None] * 0.2
    expected = stats.kruskal(*means)
    found = layers_differ(means)
    assert (found["kruskal"], found["kruskal_p"]) == (expected.statistic, expected.pvalue)
    assert (found["layers"], found["heads"]) == (5, 9)
    assert expected.pvalue < 0.001


def test_heads_are_compared_by_their_examples_and_as_repeated_measures() -> None:
    scores = np.random.default_rng(0).random((40, 1)) + np.random.default_rng(1).random((40, 6)) * 0.1 + np.arange(6) * 0.02
    once, repeated = stats.kruskal(*scores.T), stats.friedmanchisquare(*scores.T)
    found = heads_differ(scores)
    assert found == {"kruskal": once.statistic, "kruskal_p": once.pvalue, "friedman": repeated.statistic, "friedman_p": repeated.pvalue}
    assert repeated.pvalue < 0.001 < 0.05 < once.pvalue  # the examples differ more than the heads: only Friedman sees it


def test_nothing_to_compare_is_no_test() -> None:
    assert layers_differ(np.random.default_rng(0).random((1, 9)))["kruskal"] is None
    assert layers_differ(np.full((3, 4), 0.5))["kruskal_p"] is None
    assert set(heads_differ(np.zeros((10, 5))).values()) == {None}
    alone = heads_differ(np.random.default_rng(0).random((10, 1)))
    assert set(alone.values()) == {None}


def test_heads_that_never_differ_within_an_example_have_no_friedman_test() -> None:
    scores = np.repeat(np.random.default_rng(0).random((10, 1)), 4, axis=1)
    found = heads_differ(scores)
    assert found["friedman"] is None
    assert found["kruskal"] == pytest.approx(0.0, abs=1e-9)


def test_two_heads_have_no_friedman_test() -> None:
    found = heads_differ(np.random.default_rng(0).random((10, 2)))
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
    counts = resample_counts(100, 100, seed=0)
    clear = stability_over_examples(rng.random((100, 8)) * 0.1 + np.arange(8), counts)
    noise = stability_over_examples(rng.random((100, 8)), counts)
    assert clear == pytest.approx({"tau": 1.0, "low": 1.0, "high": 1.0})
    assert noise["low"] is not None
    assert noise["tau"] is not None
    assert noise["high"] is not None
    assert noise["low"] < noise["tau"] < noise["high"] <= 1.0
    assert noise["tau"] < 0.8


def test_stability_is_the_mean_tau_over_resamples() -> None:
    scores = np.random.default_rng(5).random((15, 6))
    counts = resample_counts(15, 40, seed=3)
    resampled = [np.repeat(scores, row, axis=0).mean(axis=0) for row in counts]
    taus = [scipy_tau(scores.mean(axis=0), ranking) for ranking in resampled]
    found = stability_over_examples(scores, counts)
    low, high = np.percentile(taus, [2.5, 97.5])
    assert found == pytest.approx({"tau": np.mean(taus), "low": low, "high": high})


def test_equal_layers_have_no_stability() -> None:
    assert stability_over_examples(np.ones((10, 4)), resample_counts(10, 5, seed=0)) == {"tau": None, "low": None, "high": None}


def test_each_threshold_is_compared_with_the_chosen_one() -> None:
    chosen = np.array([3.0, 1.0, 2.0])
    assert stability_over_thresholds(chosen, {"same": chosen * 2, "reverse": -chosen}) == pytest.approx({"same": 1.0, "reverse": -1.0})
