"""Do layers and heads differ, and would other examples or another threshold rank the layers alike?"""

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import friedmanchisquare, kendalltau, kruskal

INTERVAL = (2.5, 97.5)
"""Percentiles of the bootstrap that bound a 95 % interval."""


def resample_counts(num_examples: int, resamples: int, seed: int) -> Int[np.ndarray, "resample example"]:
    """How often each example is drawn in each bootstrap resample: as many draws as there are examples, with replacement."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(num_examples, size=(resamples, num_examples))
    return np.stack([np.bincount(row, minlength=num_examples) for row in drawn])


def bootstrap_means(
    values: Float[np.ndarray, "example unit"], counts: Int[np.ndarray, "resample example"]
) -> Float[np.ndarray, "resample unit"]:
    """The units' means in every resample, over the examples that have a value (not NaN); NaN where a resample has none."""
    weights, known = counts.astype(np.float64), ~np.isnan(values)
    sums, drawn = weights @ np.where(known, values, 0.0).astype(np.float64), weights @ known.astype(np.float64)
    return np.divide(sums, drawn, out=np.full_like(sums, np.nan), where=drawn > 0)


def layers_differ(head_means: Float[np.ndarray, "layer head"]) -> dict[str, float | int | None]:
    """Kruskal-Wallis across layers, a layer's units being its heads' mean HI (the paper finds p < 0.001).

    `kruskal` is the H statistic; it and `kruskal_p` are None where there is nothing to compare: one layer, or all values equal.
    """
    statistic, p = _test(kruskal, list(head_means)) if len(head_means) > 1 else (None, None)
    return {"kruskal": statistic, "kruskal_p": p, "layers": head_means.shape[0], "heads": head_means.shape[1]}


def heads_differ(scores: Float[np.ndarray, "example head"]) -> dict[str, float | None]:
    """Do the heads of one layer differ in their HI per example (the paper finds p > 0.05)?

    Kruskal-Wallis is the paper's test, but takes the heads' examples for independent; they are the same examples, so Friedman's test for
    repeated measures stands beside it (three heads at least). None as in `layers_differ`.
    """
    heads = list(scores.T)
    statistic, p = _test(kruskal, heads) if len(heads) > 1 else (None, None)
    repeated, repeated_p = _test(friedmanchisquare, heads) if len(heads) > 2 else (None, None)
    return {"kruskal": statistic, "kruskal_p": p, "friedman": repeated, "friedman_p": repeated_p}


def _test(test: Callable[..., Any], groups: list[np.ndarray]) -> tuple[float | None, float | None]:
    ranked_together = 0 if test is friedmanchisquare else None  # Friedman ranks the heads within each example, Kruskal-Wallis all values
    if not np.ptp(np.stack(groups), axis=ranked_together).any():
        return None, None
    statistic, p = test(*groups)
    return float(statistic), float(p)


def rank_agreement(first: Float[np.ndarray, "layer"], second: Float[np.ndarray, "layer"]) -> float | None:
    """Kendall's tau-b of two rankings of the layers: 1 the same, 0 unrelated, -1 reversed. None if either ranks nothing."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    tau, _ = kendalltau(first, second, method="asymptotic")  # the exact p-value is not needed
    return float(cast("float", tau))


def stability_over_examples(
    layer_scores: Float[np.ndarray, "example layer"], counts: Int[np.ndarray, "resample example"]
) -> dict[str, float | None]:
    """Kendall's tau between the ranking of the layers from all examples and from each resample: mean and 95 % interval."""
    full = layer_scores.mean(axis=0, dtype=np.float64)
    taus = [tau for ranking in bootstrap_means(layer_scores, counts) if (tau := rank_agreement(full, ranking)) is not None]
    if not taus:
        return {"tau": None, "low": None, "high": None}
    low, high = np.percentile(taus, INTERVAL)
    return {"tau": float(np.mean(taus)), "low": float(low), "high": float(high)}


def stability_over_thresholds(
    layer_scores: Float[np.ndarray, "layer"], other: Mapping[str, Float[np.ndarray, "layer"]]
) -> dict[str, float | None]:
    """Kendall's tau between the ranking of the layers under the chosen threshold and under each of the others."""
    return {name: rank_agreement(layer_scores, scores) for name, scores in other.items()}
