"""Paired statistics over clusters: one estimator, `sum of differences / sum of weights`, for accuracies and perplexities alike.

Legend: C cluster (image), S draw. For an accuracy every example weighs 1 and differs by its soft accuracy; for a perplexity it weighs its
tokens and differs by its nats, so that the estimate is the logarithm of the ratio of the two corpus perplexities.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Bool, Float, Shaped
from scipy import stats

from headwise.intervals import LEVEL, bootstrap_tail

POWER = 0.8
DRAWS_AT_ONCE = 512
"""Bounds the memory: this many draws of all clusters are held together."""

CHANGED, CORRELATION = 0.1, 0.1
"""What a plan supposes where nothing is known: a tenth of the answers change, and those about one image somewhat together."""

TIE = 1e-12
"""Sums that differ by rounding alone count as equal, relative to the largest possible sum."""


@dataclass(frozen=True)
class PairedSums:
    """Per cluster: the summed difference (after - before) and the summed weight of its examples."""

    difference: Float[np.ndarray, " cluster"]
    weight: Float[np.ndarray, " cluster"]

    @property
    def effect(self) -> float:
        """The ratio estimate, `sum of differences / sum of weights`."""
        return float(self.difference.sum() / self.weight.sum())

    @property
    def standard_error(self) -> float:
        """Linearised standard error of the ratio over clusters: `sqrt(C/(C-1) sum (d_c - effect w_c)^2) / sum of weights`."""
        num_clusters = len(self.difference)
        residual = self.difference - self.effect * self.weight
        return float(np.sqrt(num_clusters / (num_clusters - 1) * np.square(residual).sum()) / self.weight.sum())


def cluster_sums(
    difference: Float[np.ndarray, " example"], weight: Float[np.ndarray, " example"], cluster: Shaped[np.ndarray, " example"]
) -> PairedSums:
    """Sum differences and weights within each cluster. Raises ValueError for fewer than two clusters: they say nothing about spread."""
    names, index = np.unique(cluster, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{len(difference)} examples of {len(names)} images: an interval over images needs at least two of them")
    return PairedSums(np.bincount(index, difference), np.bincount(index, weight))


def ratio_sums(
    before: tuple[Float[np.ndarray, " example"], Float[np.ndarray, " example"]],
    after: tuple[Float[np.ndarray, " example"], Float[np.ndarray, " example"]],
    cluster: Shaped[np.ndarray, " example"],
) -> PairedSums:
    """The difference of two ratios of sums, part over whole, where the wholes may differ too (CHAIR_i: each model has its own mentions).

    Linearised: each cluster's share in the effect is its residual `part - ratio whole` over the mean whole, after less before, around the
    effect itself; so the effect is exact, and its spread is the delta method's. Raises ValueError where a whole sums to nothing.
    """
    ratios, residuals = [], []
    for part, whole in (before, after):
        sums = cluster_sums(part, whole, cluster)
        if not sums.weight.sum():
            raise ValueError(f"{len(part)} examples without anything counted, so their ratio is undefined")
        ratios.append(sums.effect)
        residuals.append((sums.difference - sums.effect * sums.weight) / sums.weight.mean())
    ones = np.ones_like(residuals[0])
    return PairedSums(ratios[1] - ratios[0] + residuals[1] - residuals[0], ones)


def bootstrap_interval(sums: PairedSums, draws: int, seed: int) -> tuple[float, float]:
    """95 % interval of the ratio: clusters drawn with replacement, expanded percentiles (`bootstrap_tail`)."""
    generator = np.random.default_rng(seed)
    num_clusters = len(sums.difference)
    ratios = np.empty(draws)
    for start in range(0, draws, DRAWS_AT_ONCE):
        size = min(DRAWS_AT_ONCE, draws - start)
        drawn_SC = generator.integers(0, num_clusters, (size, num_clusters))
        ratios[start : start + size] = sums.difference[drawn_SC].sum(1) / sums.weight[drawn_SC].sum(1)
    tail = bootstrap_tail(num_clusters)
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)


def sign_flip(sums: PairedSums, draws: int, seed: int) -> float:
    """Two-sided p-value: how often random signs per cluster give a sum as large as the one seen.

    All `2^C` signs where they are no more than `draws` (exact); else `(1 + hits) / (1 + draws)` of drawn signs (Phipson and Smyth 2010),
    which is never 0.
    """
    num_clusters = len(sums.difference)
    least = abs(sums.difference.sum()) - TIE * np.abs(sums.difference).sum()
    if 2**num_clusters <= draws:
        signs_SC = np.array(list(product((-1.0, 1.0), repeat=num_clusters)))
        return float(np.mean(np.abs(signs_SC @ sums.difference) >= least))
    generator = np.random.default_rng(seed)
    hits = 0
    for start in range(0, draws, DRAWS_AT_ONCE):
        size = min(DRAWS_AT_ONCE, draws - start)
        signs_SC = 2.0 * generator.integers(0, 2, (size, num_clusters), dtype=np.int8) - 1.0
        hits += int(np.count_nonzero(np.abs(signs_SC @ sums.difference) >= least))
    return (1 + hits) / (1 + draws)


def mcnemar(before: Bool[np.ndarray, " example"], after: Bool[np.ndarray, " example"]) -> float:
    """Exact two-sided McNemar p-value: the examples right in one alone are a fair coin (binomial test); 1 where there is none.

    For independent examples only: one question per image.
    """
    gained, lost = int(np.count_nonzero(after & ~before)), int(np.count_nonzero(before & ~after))
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def holm(p_values: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """Holm's (1979) step-down adjustment: the k-th smallest of m times `m - k + 1`, never falling, at most 1."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1.0)
    return adjusted


def detectable_effect(sums: PairedSums) -> float:
    """The smallest true effect that a two-sided 5 % test of this sample finds with 80 % power: `(z_0.975 + z_0.8) standard error`."""
    return float((stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(POWER)) * sums.standard_error)


def margin_p_values(sums: PairedSums, margin: float) -> tuple[float, float]:
    """One-sided p-values of "the effect is `-margin` or less" and of "`margin` or more", by t over clusters (linearised standard error).

    The first rejected: not worse by the margin. Both rejected, that is the larger one (two one-sided tests, Schuirmann 1987): equivalent.
    """
    above, below = sums.effect + margin, margin - sums.effect
    error = sums.standard_error
    if error == 0:
        return float(above <= 0), float(below <= 0)
    freedom = len(sums.difference) - 1
    return float(stats.t.sf(above / error, freedom)), float(stats.t.sf(below / error, freedom))


def planned_effect(examples: int, clusters: int, changed: float = CHANGED, correlation: float = CORRELATION) -> float:
    """The gain of accuracy that so many questions about so many images will show four times out of five, before any is asked.

    changed: the share of questions that one model gets right and the other wrong, whose variance a difference has. correlation: within an
    image, which costs `1 + (questions per image - 1) correlation` (the design effect, Kish 1965).
    """
    design = 1 + (examples / clusters - 1) * correlation
    return float((stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(POWER)) * np.sqrt(changed * design / examples))
