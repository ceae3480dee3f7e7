from pathlib import Path

import numpy as np
import pytest

from headwise.scores.head_impact import Cut, HeadImpact
from headwise.scores.impacts import THRESHOLDS, Impacts, Survey, head_impacts, survey
from headwise.scores.stored import Heads
from tests.scores.test_head_impact import obvious_iou, obvious_threshold
from tests.synthetic import draw_scalars, stored, write_part

HEADS = Heads(3, 2)
GRIDS = {"a0": (3, 4), "a1": (3, 4), "a2": (3, 4), "b0": (2, 5), "b1": (2, 5), "c0": (4, 4), "a3": (3, 4), "x": (3, 4)}
"""Three grids, one of them of a single example; `x` is observed and has no mask."""


def draw_maps(rng: np.random.Generator) -> dict[str, np.ndarray]:
    maps = {example_id: rng.random((3, 2, rows * columns)) + 0.05 for example_id, (rows, columns) in GRIDS.items()}
    for example_id, grid in GRIDS.items():
        if grid == (3, 4):
            maps[example_id][..., 8] += 2.0  # the lower left corner draws every head's eye
    return {example_id: stored(array) for example_id, array in maps.items()}


def draw_targets(rng: np.random.Generator) -> dict[str, np.ndarray]:
    targets = {example_id: rng.random(rows * columns) < 0.4 for example_id, (rows, columns) in GRIDS.items() if example_id != "x"}
    for target in targets.values():
        target[1] = True
    targets["a3"] = np.arange(12) == 8  # on the sink alone
    return targets


def looked_at(values: list[float], cut: Cut) -> set[int]:
    threshold = obvious_threshold(values, *cut)
    return {i for i, value in enumerate(values) if value > threshold}


def obvious_sinks(maps: dict[str, np.ndarray], grid: tuple[int, int], fence: float) -> set[int]:
    every = np.concatenate([array.reshape(6, -1).astype(np.float64) for example_id, array in maps.items() if GRIDS[example_id] == grid])
    mean = every.mean(axis=0)
    first, third = np.quantile(mean, 0.25), np.quantile(mean, 0.75)
    edge = {r * grid[1] + c for r in range(grid[0]) for c in range(grid[1]) if r in (0, grid[0] - 1) or c in (0, grid[1] - 1)}
    return {i for i in edge if mean[i] > third + fence * (third - first)}


def obvious_scores(
    maps: dict[str, np.ndarray], targets: dict[str, np.ndarray], example_id: str, row: int, settings: HeadImpact
) -> tuple[float, float, float]:
    """HI, chance and HI without sinks of one map, by sets of tokens."""
    values = maps[example_id].reshape(6, -1)[row].astype(np.float64).tolist()
    meant = {other: set(np.flatnonzero(target).tolist()) for other, target in targets.items()}
    looked = looked_at(values, settings.cut)
    others = [obvious_iou(looked, meant[other]) for other in targets if other != example_id and GRIDS[other] == GRIDS[example_id]]
    sinks = obvious_sinks(maps, GRIDS[example_id], settings.sink_fence)
    kept = [i for i in range(len(values)) if i not in sinks]
    without = {kept[i] for i in looked_at([values[i] for i in kept], settings.cut)}
    left = meant[example_id] - sinks
    chance = float(np.mean(others)) if others else np.nan
    return obvious_iou(looked, meant[example_id]), chance, obvious_iou(without, left) if left else np.nan


def run(tmp_path: Path, maps: dict[str, np.ndarray], targets: dict[str, np.ndarray], settings: HeadImpact) -> tuple[Survey, Impacts]:
    part = write_part(tmp_path / "part.parquet", maps, {example_id: GRIDS.get(example_id, (3, 4)) for example_id in maps})
    found = survey([part], HEADS)
    return found, head_impacts([part], HEADS, found, targets, settings)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "settings",
    [
        HeadImpact(),
        HeadImpact(threshold="quantile", threshold_value=0.7),
        HeadImpact(threshold="mean_plus_std", threshold_value=0.5, sink_fence=0.0),
        HeadImpact(sink_fence=1000),
    ],
)
def test_every_score_is_the_obvious_one(tmp_path: Path, settings: HeadImpact, seed: int) -> None:
    rng = np.random.default_rng(seed)
    maps, targets = draw_maps(rng), draw_targets(rng)
    _, impacts = run(tmp_path, maps, targets, settings)
    assert impacts.example_ids == sorted(targets)
    expected = np.array([[obvious_scores(maps, targets, i, row, settings) for row in range(6)] for i in impacts.example_ids])
    found = np.stack([impacts.head_impact, impacts.chance, impacts.nosink], axis=-1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_the_mask_on_the_sink_alone_and_the_lonely_grid_have_no_score(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    _, impacts = run(tmp_path, draw_maps(rng), draw_targets(rng), HeadImpact())
    assert np.isnan(impacts.nosink).all(axis=1).tolist() == [i == "a3" for i in impacts.example_ids]
    assert np.isnan(impacts.chance).all(axis=1).tolist() == [i == "c0" for i in impacts.example_ids]


@pytest.mark.parametrize("name", THRESHOLDS)
def test_layers_are_averaged_under_every_threshold(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(1)
    maps, targets = draw_maps(rng), draw_targets(rng)
    _, impacts = run(tmp_path, maps, targets, HeadImpact())
    rule, value = THRESHOLDS[name]
    _, alone = run(tmp_path, maps, targets, HeadImpact(threshold=rule, threshold_value=value))
    expected = alone.head_impact.reshape(-1, 3, 2).mean(axis=(0, 2))
    np.testing.assert_allclose(impacts.by_threshold[list(THRESHOLDS).index(name)], expected, rtol=1e-6)


def test_the_survey_averages_maps_and_scalars_over_all_observed_examples(tmp_path: Path) -> None:
    maps = draw_maps(np.random.default_rng(0))
    found, _ = run(tmp_path, maps, draw_targets(np.random.default_rng(0)), HeadImpact())
    assert found.grids == GRIDS
    every = np.concatenate([maps[i].reshape(6, -1).astype(np.float64) for i in GRIDS if GRIDS[i] == (3, 4)])
    np.testing.assert_allclose(found.mean_maps[3, 4], every.mean(axis=0), rtol=1e-12)
    scalars = np.mean([draw_scalars(example_id, (6,)) for example_id in GRIDS], axis=0, dtype=np.float64)
    np.testing.assert_allclose(found.means, scalars, rtol=1e-12)


@pytest.mark.parametrize("chance_masks", [1, 3])
def test_chance_takes_only_so_many_other_masks_and_never_the_own(tmp_path: Path, chance_masks: int) -> None:
    rng = np.random.default_rng(2)
    ids = [f"e{i:02d}" for i in range(12)]
    maps = {i: stored(rng.random((3, 2, 12)) + 0.05) for i in ids}
    targets = {i: np.isin(np.arange(12), [n, (n + 1) % 12]) for n, i in enumerate(ids)}
    _, impacts = run(tmp_path, maps, targets, HeadImpact(chance_masks=chance_masks))
    for row, example_id in enumerate(ids):
        own = maps[example_id].reshape(6, -1)[0].astype(np.float64).tolist()
        looked = looked_at(own, ("mean", 0.0))
        single = [obvious_iou(looked, set(np.flatnonzero(targets[other]).tolist())) for other in ids if other != example_id]
        sums = {0.0}
        for _ in range(chance_masks):
            sums = {round(total + one, 9) for total in sums for one in single}
        means = [total / chance_masks for total in sums] + [(total + one) / (chance_masks + 1) for total in sums for one in single]
        assert np.abs(np.array(means) - impacts.chance[row, 0]).min() < 1e-6
    same = dict.fromkeys(ids, targets["e00"])
    _, alike = run(tmp_path, maps, same, HeadImpact(chance_masks=chance_masks))
    np.testing.assert_allclose(alike.chance, alike.head_impact, rtol=1e-6)


def test_another_seed_chooses_other_masks(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    ids = [f"e{i:02d}" for i in range(30)]
    maps = {i: stored(rng.random((3, 2, 12)) + 0.05) for i in ids}
    targets = {i: rng.random(12) < 0.5 for i in ids}
    by_seed = [run(tmp_path, maps, targets, HeadImpact(chance_masks=2, seed=seed))[1].chance for seed in (0, 0, 1)]
    np.testing.assert_array_equal(by_seed[0], by_seed[1])
    assert not np.array_equal(by_seed[0], by_seed[2])
