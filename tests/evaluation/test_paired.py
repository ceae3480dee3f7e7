"""Every statistic against a slow loop, and the interval against data of which the truth is known."""

from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from headwise.evaluation.paired import (
    PairedSums,
    bootstrap_interval,
    cluster_sums,
    detectable_effect,
    holm,
    margin_p_values,
    mcnemar,
    planned_effect,
    ratio_sums,
    sign_flip,
)


def draw_sums(generator, num_clusters, effect=0.0, spread=1.0):
    """Clusters of 1 to 4 examples that share an offset, as the questions of one image do."""
    sizes = generator.integers(1, 5, num_clusters)
    cluster = np.repeat(np.arange(num_clusters), sizes)
    offsets = spread * generator.exponential(1.0, num_clusters) - spread
    difference = effect + offsets[cluster] + generator.normal(0, 1, len(cluster))
    return cluster_sums(difference, np.ones(len(cluster)), cluster)


def test_cluster_sums_by_a_loop():
    generator = np.random.default_rng(0)
    cluster = np.array([f"image {i}" for i in generator.integers(0, 7, 50)])
    difference, weight = generator.normal(size=50), generator.integers(1, 9, 50).astype(float)
    sums = cluster_sums(difference, weight, cluster)
    for position, name in enumerate(sorted(set(cluster))):
        assert sums.difference[position] == pytest.approx(sum(d for d, c in zip(difference, cluster, strict=True) if c == name))
        assert sums.weight[position] == pytest.approx(sum(w for w, c in zip(weight, cluster, strict=True) if c == name))
    assert sums.effect == pytest.approx(difference.sum() / weight.sum())


def test_one_image_has_no_interval():
    with pytest.raises(ValueError, match="at least two"):
        cluster_sums(np.ones(3), np.ones(3), np.array(["a", "a", "a"]))


def test_bootstrap_is_seeded_and_does_not_depend_on_the_order_of_examples():
    generator = np.random.default_rng(1)
    cluster, difference = generator.integers(0, 20, 80), generator.normal(size=80)
    order = generator.permutation(80)
    straight = bootstrap_interval(cluster_sums(difference, np.ones(80), cluster), 1000, 5)
    shuffled = bootstrap_interval(cluster_sums(difference[order], np.ones(80), cluster[order]), 1000, 5)
    assert straight == pytest.approx(shuffled)
    assert straight == bootstrap_interval(cluster_sums(difference, np.ones(80), cluster), 1000, 5)
    assert straight != bootstrap_interval(cluster_sums(difference, np.ones(80), cluster), 1000, 6)


def test_bootstrap_interval_against_the_full_distribution_of_three_clusters():
    sums = PairedSums(np.array([1.0, 4.0, -2.0]), np.array([1.0, 2.0, 3.0]))
    ratios = [sums.difference[list(drawn)].sum() / sums.weight[list(drawn)].sum() for drawn in product(range(3), repeat=3)]
    low, high = bootstrap_interval(sums, 5000, 0)
    assert (low, high) == pytest.approx((min(ratios), max(ratios)))


def test_equal_answers_give_an_interval_of_width_zero():
    sums = cluster_sums(np.zeros(30), np.ones(30), np.arange(30))
    assert bootstrap_interval(sums, 500, 0) == (0.0, 0.0)
    assert sign_flip(sums, 500, 0) == 1.0


@pytest.mark.parametrize(("num_clusters", "spread"), [(15, 0.5), (40, 1.0)])
def test_the_interval_covers_the_truth_about_95_times_in_100(num_clusters, spread):
    generator = np.random.default_rng(num_clusters)
    trials, truth = 600, 0.3
    covered = 0
    for trial in range(trials):
        low, high = bootstrap_interval(draw_sums(generator, num_clusters, truth, spread), 400, trial)
        covered += low <= truth <= high
    assert 0.92 <= covered / trials <= 0.975


def test_ignoring_the_images_would_be_too_sure():
    generator = np.random.default_rng(2)
    offsets = generator.normal(0, 1, 60)
    difference = np.repeat(offsets, 4) + generator.normal(0, 0.3, 240)
    by_image = cluster_sums(difference, np.ones(240), np.repeat(np.arange(60), 4))
    by_example = cluster_sums(difference, np.ones(240), np.arange(240))
    assert by_image.standard_error > 1.7 * by_example.standard_error


def test_standard_error_of_single_examples_is_the_textbook_one():
    values = np.random.default_rng(3).normal(size=25)
    sums = cluster_sums(values, np.ones(25), np.arange(25))
    assert sums.standard_error == pytest.approx(values.std(ddof=1) / 5)
    assert detectable_effect(sums) == pytest.approx((1.959964 + 0.841621) * values.std(ddof=1) / 5, rel=1e-5)


def test_the_detectable_effect_is_found_four_times_in_five():
    generator = np.random.default_rng(4)
    effect = detectable_effect(cluster_sums(generator.normal(size=4000), np.ones(4000), np.arange(4000))) * np.sqrt(4000 / 100)
    found = [stats.ttest_1samp(generator.normal(effect, 1, 100), 0).pvalue < 0.05 for _ in range(1500)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)


def test_sign_flip_of_few_images_is_exact():
    difference = np.random.default_rng(5).normal(0.5, 1, 9)
    sums = PairedSums(difference, np.ones(9))
    hits = sum(
        abs(sum(s * d for s, d in zip(signs, difference, strict=True))) >= abs(difference.sum()) - 1e-12
        for signs in product((-1, 1), repeat=9)
    )
    assert sign_flip(sums, 512, 0) == hits / 512


def test_drawn_sign_flips_agree_with_all_of_them():
    sums = PairedSums(np.random.default_rng(6).normal(0.4, 1, 12), np.ones(12))
    assert sign_flip(sums, 4095, 0) == pytest.approx(sign_flip(sums, 4096, 0), abs=0.02)
    assert sign_flip(sums, 4095, 0) == sign_flip(sums, 4095, 0)


def test_sign_flip_is_uniform_where_nothing_changed():
    generator = np.random.default_rng(7)
    p_values = [sign_flip(PairedSums(generator.normal(size=30), np.ones(30)), 200, trial) for trial in range(400)]
    assert np.mean(np.array(p_values) <= 0.05) == pytest.approx(0.05, abs=0.03)


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 5))
def test_mcnemar_is_the_binomial_sum(gained, lost, both):
    before = np.array([False] * gained + [True] * lost + [True] * both, dtype=bool)
    after = np.array([True] * gained + [False] * lost + [True] * both, dtype=bool)
    total = gained + lost
    tail = sum(comb(total, k) for k in range(min(gained, lost) + 1)) / 2**total
    assert mcnemar(before, after) == pytest.approx(min(1.0, 2 * tail))


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_by_its_definition(p_values):
    adjusted = holm(np.array(p_values, dtype=float))
    ordered = sorted(p_values)
    for p, found in zip(p_values, adjusted, strict=True):
        rank = ordered.index(p)
        slow = max(min(1.0, (len(ordered) - k) * ordered[k]) for k in range(rank + 1))
        ties = [max(min(1.0, (len(ordered) - k) * ordered[k]) for k in range(r + 1)) for r, q in enumerate(ordered) if q == p]
        assert any(found == pytest.approx(value) for value in (slow, *ties))


@pytest.mark.parametrize("seed", range(5))
def test_a_difference_of_ratios_by_the_jackknife(seed):
    """The effect is exact; the linearised standard error is the jackknife's over clusters but for terms of higher order."""
    generator = np.random.default_rng(seed)
    cluster = np.repeat(np.arange(80), 3)
    wholes = [generator.integers(1, 6, 240).astype(float) for _ in range(2)]
    parts = [generator.binomial(whole.astype(int), share).astype(float) for whole, share in zip(wholes, (0.4, 0.3), strict=True)]
    sums = ratio_sums((parts[0], wholes[0]), (parts[1], wholes[1]), cluster)

    def effect(kept):
        return parts[1][kept].sum() / wholes[1][kept].sum() - parts[0][kept].sum() / wholes[0][kept].sum()

    assert sums.effect == pytest.approx(effect(np.ones(240, dtype=bool)))
    without = np.array([effect(cluster != c) for c in range(80)])
    jackknife = np.sqrt(79 / 80 * np.square(without - without.mean()).sum())
    assert sums.standard_error == pytest.approx(jackknife, rel=0.03)


def test_equal_wholes_make_it_the_difference_of_means():
    generator = np.random.default_rng(1)
    before, after, cluster = generator.random(60), generator.random(60), np.repeat(np.arange(20), 3)
    ones = np.ones(60)
    ratio, plain = ratio_sums((before, ones), (after, ones), cluster), cluster_sums(after - before, ones, cluster)
    assert ratio.effect == pytest.approx(plain.effect) and ratio.standard_error == pytest.approx(plain.standard_error)
    with pytest.raises(ValueError, match="60 examples without anything counted"):
        ratio_sums((before, 0 * ones), (after, ones), cluster)


def test_margins_by_the_textbooks_t():
    generator = np.random.default_rng(2)
    difference = generator.normal(0.01, 0.05, 40)
    worse, better = margin_p_values(cluster_sums(difference, np.ones(40), np.arange(40)), 0.02)
    assert worse == pytest.approx(stats.ttest_1samp(difference, -0.02, alternative="greater").pvalue)
    assert better == pytest.approx(stats.ttest_1samp(difference, 0.02, alternative="less").pvalue)
    nothing = cluster_sums(np.zeros(10), np.ones(10), np.arange(10))
    assert margin_p_values(nothing, 0.02) == (0, 0) and margin_p_values(nothing, 0.0) == (1, 1)


def test_a_planned_effect_is_what_such_a_sample_shows():
    """A tenth of the answers change, independently: the plan without correlation is the sample's own detectable effect."""
    generator = np.random.default_rng(3)
    changes = generator.choice([-1.0, 0.0, 1.0], size=6000, p=[0.05, 0.9, 0.05])
    found = detectable_effect(cluster_sums(changes, np.ones(6000), np.repeat(np.arange(2000), 3)))
    assert planned_effect(6000, 2000, 0.1, 0.0) == pytest.approx(found, rel=0.06)
    assert planned_effect(6000, 2000, 0.1, 1.0) == pytest.approx(planned_effect(2000, 2000, 0.1, 0.0))
