"""Head Impact of every head and example, in two passes over the stored maps: one finds the sink tokens, the other scores."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Float64

from headwise.scores.head_impact import Cut, HeadImpact, binarise, iou
from headwise.scores.schema import MEANS
from headwise.scores.sink_tokens import sink_tokens
from headwise.scores.stored import Heads, StoredExample, stored_examples
from headwise.segments import Grid

THRESHOLDS: dict[str, Cut] = {
    "mean": ("mean", 0.0),
    "mean + 1 std": ("mean_plus_std", 1.0),
    "median": ("quantile", 0.5),
    "quantile 0.9": ("quantile", 0.9),
}
"""The thresholds over which the ranking of the layers should be stable."""


@dataclass(frozen=True)
class Survey:
    """What the first pass finds: each example's grid, the mean map of each grid, and each head's mean of the `MEANS` columns."""

    grids: dict[str, Grid]
    mean_maps: dict[Grid, Float64[np.ndarray, "visual"]]
    means: Float64[np.ndarray, "row statistic"]


@dataclass(frozen=True)
class Impacts:
    """What the second pass finds, examples sorted by id, rows in the order of (layer, head); NaN where undefined.

    by_threshold: each layer's mean HI under every threshold of `THRESHOLDS`.
    """

    example_ids: list[str]
    head_impact: Float32[np.ndarray, "example row"]
    chance: Float32[np.ndarray, "example row"]
    nosink: Float32[np.ndarray, "example row"]
    by_threshold: Float64[np.ndarray, "threshold layer"]


def survey(parts: Sequence[Path], heads: Heads) -> Survey:
    """Read every map once. Sums of 16-bit values are exact in double precision, and examples come in the order of their ids."""
    grids: dict[str, Grid] = {}
    sums: dict[Grid, np.ndarray] = {}
    means = np.zeros((heads.rows, len(MEANS)))
    for example in stored_examples(parts, heads, means=True):
        assert example.means is not None
        grids[example.example_id] = example.grid
        sums[example.grid] = sums.get(example.grid, 0.0) + example.maps.sum(axis=0)
        means += example.means
    counts = Counter(grids.values())
    return Survey(grids, {grid: total / (heads.rows * counts[grid]) for grid, total in sums.items()}, means / len(grids))


def head_impacts(parts: Sequence[Path], heads: Heads, found: Survey, targets: Mapping[str, np.ndarray], settings: HeadImpact) -> Impacts:
    """Score every example that has a token mask.

    HI = IoU([map > threshold], mask). Chance = mean IoU of the same map with the masks of other examples of the same grid: all of them
    up to `chance_masks`, else a seeded choice, so that the cost stays linear in the examples. No-sink = HI with the sink tokens taken
    out of map and mask before the threshold.
    """
    others = _other_masks(targets, found.grids, settings)
    kept = {grid: ~sink_tokens(mean_map, grid, settings.sink_fence) for grid, mean_map in found.mean_maps.items() if 0 not in grid}
    scores = {name: np.full((len(targets), heads.rows), np.nan, dtype=np.float32) for name in ("head_impact", "chance", "nosink")}
    by_threshold = np.zeros((len(THRESHOLDS), heads.num_layers))
    example_ids: list[str] = []
    for example in stored_examples(parts, heads, means=False):
        target = targets.get(example.example_id)
        if target is None:
            continue
        row = len(example_ids)
        example_ids.append(example.example_id)
        binary = binarise(example.maps, [settings.cut, *THRESHOLDS.values()])
        overlap = iou(binary, target[None])[..., 0]
        scores["head_impact"][row] = overlap[0]
        scores["chance"][row] = _chance(binary[0], example.example_id, others[example.grid])
        scores["nosink"][row] = _impact_without_sinks(example, target, kept[example.grid], settings)
        by_threshold += overlap[1:].reshape(-1, heads.num_layers, heads.num_heads).mean(axis=2, dtype=np.float64)
    return Impacts(example_ids, **scores, by_threshold=by_threshold / len(example_ids))


@dataclass(frozen=True)
class _OtherMasks:
    """The examples that give the chance level of a grid, and their token masks."""

    example_ids: list[str]
    masks: Bool[np.ndarray, "mask visual"]


def _other_masks(targets: Mapping[str, np.ndarray], grids: Mapping[str, Grid], settings: HeadImpact) -> dict[Grid, _OtherMasks]:
    """Per grid, one mask more than `chance_masks` where there are as many: an example among them is compared with the rest."""
    rng = np.random.default_rng(settings.seed)
    chosen: dict[Grid, _OtherMasks] = {}
    for grid in sorted({grids[example_id] for example_id in targets}):
        ids = [example_id for example_id in sorted(targets) if grids[example_id] == grid]
        picked = [ids[i] for i in sorted(rng.permutation(len(ids))[: settings.chance_masks + 1].tolist())]
        chosen[grid] = _OtherMasks(picked, np.stack([targets[example_id] for example_id in picked]))
    return chosen


def _chance(binary: Bool[np.ndarray, "row visual"], example_id: str, others: _OtherMasks) -> Float32[np.ndarray, "row"] | float:
    overlap = iou(binary, others.masks)
    if example_id in others.example_ids:
        overlap = np.delete(overlap, others.example_ids.index(example_id), axis=1)
    return overlap.mean(axis=1) if overlap.shape[1] else np.nan


def _impact_without_sinks(
    example: StoredExample, target: Bool[np.ndarray, "visual"], kept: Bool[np.ndarray, "visual"], settings: HeadImpact
) -> Float32[np.ndarray, "row"] | float:
    if not target[kept].any():
        return np.nan
    return iou(binarise(example.maps[:, kept], [settings.cut])[0], target[None, kept])[:, 0]
