"""Do layers and heads differ, and would other images or another threshold rank the layers alike? Gathered block by block of examples."""

from collections.abc import Mapping, Sequence
from hashlib import sha256

import numpy as np
from jaxtyping import Float, Float32, Int
from scipy.stats import chi2, kruskal, rankdata

from headwise.intervals import bootstrap_tail

STEPS = 10_000
"""IoUs are ranked over all examples in steps of 1 / STEPS. That is exact up to 100 visual tokens, where two different IoUs are at least
1 / (100 * 99) apart; beyond, values within a step count as equal. So the memory does not grow with the examples."""


def image_draws(images: Sequence[str], draws: int, seed: int) -> Float[np.ndarray, "example draw"]:
    """How often each example counts in the sample itself (draw 0: once) and in every bootstrap draw of images.

    An image's examples are drawn together. Its counts are Poisson(1) (Chamandy et al. 2012, "Estimating Uncertainty for Massive Data
    Streams"), the limit of drawing as many images as there are with replacement, from a generator of its own, seeded by its name: they
    depend neither on the other images nor on the order of the examples.
    """
    counts = {image: _counts(image, draws, seed) for image in set(images)}
    return np.stack([counts[image] for image in images])


def _counts(image: str, draws: int, seed: int) -> Float[np.ndarray, "draw"]:
    rng = np.random.default_rng([seed, int.from_bytes(sha256(image.encode()).digest()[:16])])
    return np.concatenate([[1.0], rng.poisson(1.0, draws)])


class DrawnMeans:
    """The units' means over examples, in the sample (draw 0) and in every bootstrap draw."""

    def __init__(self, draws: int, units: int) -> None:
        """No example so far."""
        self.sums = np.zeros((draws + 1, units))
        self.weights = np.zeros(draws + 1)
        self.n = 0

    def add(self, values: Float32[np.ndarray, "example unit"], draws: Float[np.ndarray, "example draw"]) -> None:
        """Take in a block of examples; one without values (NaN in all units) does not count."""
        known = ~np.isnan(values[:, 0])
        self.sums += draws[known].T @ values[known].astype(np.float64)
        self.weights += draws[known].sum(axis=0)
        self.n += int(known.sum())

    @property
    def sample(self) -> Float[np.ndarray, "unit"]:
        """The means over all examples with values; NaN if there is none."""
        return self.sums[0] / self.weights[0] if self.n else np.full(self.sums.shape[1], np.nan)

    @property
    def drawn(self) -> Float[np.ndarray, "draw unit"]:
        """The means of every bootstrap draw that has an example with values."""
        has = self.weights[1:] > 0
        return self.sums[1:][has] / self.weights[1:][has, None]

    def interval(self, images: int) -> Float[np.ndarray, "2 unit"]:
        """The 95 % interval of each unit, of a sample of that many images; NaN if no draw has an example with values."""
        drawn, tail = self.drawn, bootstrap_tail(images)
        return np.quantile(drawn, [tail, 1 - tail], axis=0) if len(drawn) else np.full((2, self.sums.shape[1]), np.nan)


class HeadRanks:
    """What the tests of the heads within a layer need of the scores: how often each head has each value, and sums of ranks."""

    def __init__(self, num_layers: int, num_heads: int) -> None:
        """No example so far."""
        self.counts = np.zeros((num_layers, num_heads, STEPS + 1), dtype=np.int32)
        self.rank_sums = np.zeros((num_layers, num_heads))
        self.squares = np.zeros(num_layers)
        self.n = 0

    def add(self, scores: Float32[np.ndarray, "example layer head"]) -> None:
        """Take in a block of examples' scores in [0, 1]."""
        first = np.arange(self.rank_sums.size).reshape(self.rank_sums.shape) * (STEPS + 1)
        steps = np.rint(scores * np.float64(STEPS)).astype(np.intp)
        np.add.at(self.counts.reshape(-1), (first + steps).reshape(-1), np.int32(1))  # flat: several times faster than by three indices
        ranks = rankdata(scores, axis=2)
        self.rank_sums += ranks.sum(axis=0)
        self.squares += np.square(ranks).sum(axis=(0, 2))
        self.n += len(scores)

    def tests(self) -> list[dict[str, float | int | None]]:
        """Do the heads of a layer differ in their HI per example (the paper finds p > 0.05)? A row per layer.

        Kruskal-Wallis is the paper's test, but takes the heads' examples for independent; they are the same examples, so Friedman's test
        for repeated measures stands beside it (three heads at least). None as in `layers_differ`.
        """
        names = ("kruskal", "kruskal_p", "friedman", "friedman_p")
        rows = zip(self.counts, self.rank_sums, self.squares, strict=True)
        found = [(*kruskal_of_counts(counts), *friedman_of_sums(sums, squares, self.n)) for counts, sums, squares in rows]
        return [{"layer": layer, **dict(zip(names, row, strict=True))} for layer, row in enumerate(found)]


def kruskal_of_counts(counts: Int[np.ndarray, "group value"]) -> tuple[float | None, float | None]:
    """Kruskal-Wallis' H and its p-value from how often each group has each value, ties corrected for.

    H = (N - 1) sum_g n_g (mean rank of g - mean rank)^2 / sum over all (rank - mean rank)^2. None where that says nothing.
    """
    ties, sizes = counts.sum(axis=0), counts.sum(axis=1)
    num = int(sizes.sum())
    from_middle = np.cumsum(ties) - (ties - 1) / 2 - (num + 1) / 2
    between, total = float(((counts @ from_middle) ** 2 / sizes).sum()), float(ties @ from_middle**2)
    return _chi_squared((num - 1) * between, total, len(counts)) if len(counts) > 1 else (None, None)


def friedman_of_sums(rank_sums: Float[np.ndarray, "head"], squares: float, num: int) -> tuple[float | None, float | None]:
    """Friedman's statistic and its p-value from each head's sum of ranks within `num` examples, ties corrected for.

    With k heads: (k - 1) sum (rank sum - num (k + 1) / 2)^2 / (sum of squared ranks - num k (k + 1)^2 / 4). None where that says nothing.
    """
    k = len(rank_sums)
    between = float(((rank_sums - num * (k + 1) / 2) ** 2).sum())
    return _chi_squared((k - 1) * between, float(squares) - num * k * (k + 1) ** 2 / 4, k) if k > 2 else (None, None)


def _chi_squared(between: float, total: float, groups: int) -> tuple[float | None, float | None]:
    """The ratio and its p-value with `groups` - 1 degrees of freedom; None if all ranks are equal."""
    if total <= 0:
        return None, None
    return between / total, float(chi2.sf(between / total, groups - 1))


def layers_differ(head_means: Float[np.ndarray, "layer head"]) -> dict[str, float | int | None]:
    """Kruskal-Wallis across layers, a layer's units being its heads' mean HI (the paper finds p < 0.001).

    `kruskal` is the H statistic; it and `kruskal_p` are None where there is nothing to compare: one layer, or all values equal.
    """
    found: dict[str, float | int | None] = {"kruskal": None, "kruskal_p": None}
    if len(head_means) > 1 and np.ptp(head_means) > 0:
        found = dict(zip(found, map(float, kruskal(*head_means)), strict=True))
    return {**found, "layers": head_means.shape[0], "heads": head_means.shape[1]}


def rank_agreement(first: Float[np.ndarray, "layer"], second: Float[np.ndarray, "layer"]) -> float | None:
    """Kendall's tau-b of two rankings of the layers: 1 the same, 0 unrelated, -1 reversed. None if either ranks nothing.

    sum a b / sqrt(sum a^2 sum b^2) over the pairs of layers, a and b being the signs of their differences in either ranking.
    """
    a, b = (np.sign(scores[:, None] - scores) for scores in (first, second))
    untied = float((a**2).sum() * (b**2).sum())
    return float((a * b).sum()) / untied**0.5 if untied > 0 else None


def stability_over_images(
    layer_scores: Float[np.ndarray, "layer"], drawn: Float[np.ndarray, "draw layer"], images: int
) -> dict[str, float | None]:
    """Kendall's tau between the ranking of the layers in the sample and in each bootstrap draw of its images: mean and 95 % interval."""
    taus = [tau for scores in drawn if (tau := rank_agreement(layer_scores, scores)) is not None]
    if not taus:
        return {"tau": None, "low": None, "high": None}
    tail = bootstrap_tail(images)
    low, high = np.quantile(taus, [tail, 1 - tail])
    return {"tau": float(np.mean(taus)), "low": float(low), "high": float(high)}


def stability_over_thresholds(
    layer_scores: Float[np.ndarray, "layer"], other: Mapping[str, Float[np.ndarray, "layer"]]
) -> dict[str, float | None]:
    """Kendall's tau between the ranking of the layers under the chosen threshold and under each of the others."""
    return {name: rank_agreement(layer_scores, scores) for name, scores in other.items()}
