"""From stored attention and masks to the score table of every head, with its intervals and the tests behind it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from jaxtyping import Float, Int

from headwise.scores.head_impact import HeadImpact
from headwise.scores.impacts import THRESHOLDS, Impacts, Survey, head_impacts, survey
from headwise.scores.schema import EXAMPLE_SCORES, HEADS, IMPACTS, MEANS
from headwise.scores.sink_tokens import sink_tokens
from headwise.scores.stability import (
    INTERVAL,
    bootstrap_means,
    heads_differ,
    layers_differ,
    resample_counts,
    stability_over_examples,
    stability_over_thresholds,
)
from headwise.scores.stored import Heads, count_heads
from headwise.scores.token_masks import token_masks


@dataclass(frozen=True)
class Scores:
    """What the score step writes: heads.parquet, examples.parquet, tests.json and the examples left out with their reasons."""

    heads: pl.DataFrame
    examples: pa.Table
    tests: dict[str, object]
    left_out: dict[str, str]


def score_heads(parts: Sequence[Path], masks: pl.DataFrame, settings: HeadImpact) -> Scores:
    """Score every head of the stored attention (part.parquet files) against the masks (masks.parquet).

    The maps are streamed twice; what stays in memory is three 32-bit numbers per map. The result does not depend on how the examples were
    shared out among the parts. Raises ValueError if fewer than `min_examples` examples have a token mask, or a part is broken.
    """
    heads = count_heads(parts)
    found = survey(parts, heads)
    targets, left_out = token_masks(masks, found.grids, settings)
    if len(targets) < settings.min_examples:
        reasons = "; ".join(f"{example_id}: {reason}" for example_id, reason in list(left_out.items())[:3])
        fewer = f"{len(targets)} of {len(found.grids)} observed examples can be scored, min_examples = {settings.min_examples}"
        raise ValueError(f"{fewer}; left out: {reasons or 'none'}")
    impacts = head_impacts(parts, heads, found, targets, settings)
    counts = resample_counts(len(impacts.example_ids), settings.bootstrap, settings.seed)
    table = pl.concat([_impact_rows(heads, impacts, counts), _mean_rows(heads, found)]).sort("statistic", "layer", "head")
    tests = {
        "examples": {"observed": len(found.grids), "scored": len(targets), "left_out": len(left_out)},
        **_tests(heads, impacts, counts),
        "sink_tokens": _sinks(found, settings),
    }
    return Scores(table, _example_table(heads, impacts), tests, left_out)


def _impact_rows(heads: Heads, impacts: Impacts, counts: Int[np.ndarray, "resample example"]) -> pl.DataFrame:
    """Mean, count and bootstrap interval of HI, HI minus chance, and HI without sinks."""
    values = dict(zip(IMPACTS, (impacts.head_impact, impacts.head_impact - impacts.chance, impacts.nosink), strict=True))
    frames = []
    for statistic, scores in values.items():
        known = (~np.isnan(scores)).sum(axis=0)
        every = np.ones((1, len(scores)), dtype=counts.dtype)
        low, high = _interval(bootstrap_means(scores, counts))
        frames.append(_rows(heads, statistic, bootstrap_means(scores, every)[0], known, low, high))
    return pl.concat(frames)


def _interval(resampled: Float[np.ndarray, "resample unit"]) -> Float[np.ndarray, "2 unit"]:
    """The interval of each unit over the resamples that have it; NaN for a unit that no resample has."""
    interval = np.full((2, resampled.shape[1]), np.nan)
    known = ~np.isnan(resampled).all(axis=0)
    if known.any():
        interval[:, known] = np.nanpercentile(resampled[:, known], INTERVAL, axis=0)
    return interval


def _mean_rows(heads: Heads, found: Survey) -> pl.DataFrame:
    unknown = np.full(heads.rows, np.nan)
    known = np.full(heads.rows, len(found.grids))
    return pl.concat([_rows(heads, name, found.means[:, i], known, unknown, unknown) for i, name in enumerate(MEANS)])


def _rows(heads: Heads, statistic: str, value: np.ndarray, n: np.ndarray, low: np.ndarray, high: np.ndarray) -> pl.DataFrame:
    layers, numbers = np.divmod(np.arange(heads.rows), heads.num_heads)
    columns = {"layer": layers, "head": numbers, "statistic": [statistic] * heads.rows, "value": value, "n": n, "low": low, "high": high}
    return pl.DataFrame({name: columns[name] for name in HEADS.names}).with_columns(pl.col("value", "low", "high").fill_nan(None))


def _tests(heads: Heads, impacts: Impacts, counts: Int[np.ndarray, "resample example"]) -> dict[str, object]:
    scores = impacts.head_impact.reshape(-1, heads.num_layers, heads.num_heads)
    means = scores.mean(axis=0, dtype=np.float64)
    thresholds: Mapping[str, np.ndarray] = dict(zip(THRESHOLDS, impacts.by_threshold, strict=True))
    return {
        "across_layers": layers_differ(means),
        "within_layers": [{"layer": layer, **heads_differ(scores[:, layer])} for layer in range(heads.num_layers)],
        "layer_ranking_over_examples": stability_over_examples(scores.mean(axis=2, dtype=np.float64), counts),
        "layer_ranking_over_thresholds": stability_over_thresholds(means.mean(axis=1), thresholds),
    }


def _sinks(found: Survey, settings: HeadImpact) -> dict[str, list[int]]:
    """The places of the sink tokens of each grid, in reading order."""
    grids = sorted(grid for grid in found.mean_maps if 0 not in grid)
    return {f"{g[0]} x {g[1]}": np.flatnonzero(sink_tokens(found.mean_maps[g], g, settings.sink_fence)).tolist() for g in grids}


def _example_table(heads: Heads, impacts: Impacts) -> pa.Table:
    layers, numbers = np.divmod(np.arange(heads.rows, dtype=np.int16), np.int16(heads.num_heads))
    num_examples = len(impacts.example_ids)
    scores = (impacts.head_impact, impacts.chance, impacts.nosink)
    columns = [
        pa.array(impacts.example_ids).take(pa.array(np.repeat(np.arange(num_examples), heads.rows))),
        pa.array(np.tile(layers, num_examples)),
        pa.array(np.tile(numbers, num_examples)),
        *(pa.array(score.reshape(-1), mask=np.isnan(score.reshape(-1))) for score in scores),
    ]
    return pa.Table.from_arrays(columns, schema=EXAMPLE_SCORES)
