from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from headwise.scores import impacts as impacts_module
from headwise.scores.head_impact import Cut, HeadImpact
from headwise.scores.impacts import THRESHOLDS, Impacts, Survey, head_impacts, survey
from headwise.scores.stored import Heads
from headwise.scores.token_masks import Target
from tests.scores.test_head_impact import obvious_iou, obvious_threshold
from tests.synthetic import draw_scalars, highest, one_view, stored, write_part

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


def obvious_mean(maps: dict[str, np.ndarray], grid: tuple[int, int]) -> np.ndarray:
    """The mean attention: every map times its maximum."""
    own = [example_id for example_id in maps if GRIDS[example_id] == grid]
    places = [(example_id, layer, head) for example_id in own for layer in range(3) for head in range(2)]
    return np.mean([maps[i][layer, head].astype(np.float64) * highest(i, layer, head) for i, layer, head in places], axis=0)


def obvious_sinks(maps: dict[str, np.ndarray], grid: tuple[int, int], fence: float) -> set[int]:
    mean = obvious_mean(maps, grid)
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


def run(
    tmp_path: Path,
    maps: dict[str, np.ndarray],
    targets: dict[str, np.ndarray],
    settings: HeadImpact,
    images: dict[str, str] | None = None,
) -> tuple[Survey, Impacts]:
    """The survey, and the blocks of impacts as one; every example is about an image of its own unless `images` says otherwise."""
    part = write_part(tmp_path / "part.parquet", maps, {example_id: one_view(*GRIDS.get(example_id, (3, 4))) for example_id in maps})
    found = survey([part], HEADS)
    meant = {example_id: Target((images or {}).get(example_id, example_id), tokens) for example_id, tokens in targets.items()}
    blocks = list(head_impacts([part], HEADS, found, meant, settings))
    assert all(len(block.example_ids) <= impacts_module.BLOCK_EXAMPLES for block in blocks)
    whole = Impacts(
        [example_id for block in blocks for example_id in block.example_ids],
        [image for block in blocks for image in block.images],
        *(np.concatenate([getattr(block, name) for block in blocks]) for name in ("head_impact", "chance", "nosink")),
        by_threshold=np.sum([block.by_threshold for block in blocks], axis=0),
    )
    return found, whole


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
def test_every_score_is_the_obvious_one(tmp_path: Path, settings: HeadImpact, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impacts_module, "BLOCK_EXAMPLES", 3)
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
    expected = alone.head_impact.reshape(-1, 3, 2).mean(axis=2).sum(axis=0)
    np.testing.assert_allclose(impacts.by_threshold[list(THRESHOLDS).index(name)], expected, rtol=1e-6)


def test_the_survey_averages_maps_and_scalars_over_all_observed_examples(tmp_path: Path) -> None:
    maps = draw_maps(np.random.default_rng(0))
    found, _ = run(tmp_path, maps, draw_targets(np.random.default_rng(0)), HeadImpact())
    assert found.layouts == {example_id: one_view(*grid) for example_id, grid in GRIDS.items()}
    np.testing.assert_allclose(found.mean_maps[one_view(3, 4)], obvious_mean(maps, (3, 4)), rtol=1e-12)
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


@pytest.mark.parametrize("chance_masks", [2, 32])
def test_chance_takes_no_mask_of_the_same_image_and_one_of_each_other(tmp_path: Path, chance_masks: int) -> None:
    """Four questions about the object of each image; with fewer images than `chance_masks` the level is exact."""
    rng = np.random.default_rng(4)
    ids = [f"{image}{question}" for image in "klmnop" for question in range(4)]
    images = {i: i[0] for i in ids}
    objects = {image: np.isin(np.arange(12), [2 * n, 2 * n + 1]) for n, image in enumerate("klmnop")}
    targets = {i: objects[i[0]] for i in ids}
    maps = {i: stored(rng.random((3, 2, 12)) + 0.05) for i in ids}
    _, impacts = run(tmp_path, maps, targets, HeadImpact(chance_masks=chance_masks), images)
    assert impacts.images == [i[0] for i in sorted(ids)]
    for row, example_id in enumerate(sorted(ids)):
        looked = looked_at(maps[example_id].reshape(6, -1)[0].astype(np.float64).tolist(), ("mean", 0.0))
        single = [obvious_iou(looked, set(np.flatnonzero(objects[image]).tolist())) for image in "klmnop" if image != example_id[0]]
        some = [np.mean(chosen) for number in (chance_masks, chance_masks + 1) for chosen in combinations(single, min(number, 5))]
        assert np.abs(np.array(some) - impacts.chance[row, 0]).min() < 1e-6


def test_a_head_that_hardly_looks_at_the_image_makes_no_sink(tmp_path: Path) -> None:
    """Its map, divided by its own maximum, is as large as any other."""
    maps = {f"e{i}": np.full((3, 2, 12), 0.5, dtype=np.float16) for i in range(4)}
    faint = min(((layer, head) for layer in range(3) for head in range(2)), key=lambda place: highest("e0", *place))
    for array in maps.values():
        array[..., 5] = 1.0
        array[(*faint, 8)] = 1.0
    found, _ = run(tmp_path, maps, dict.fromkeys(maps, np.arange(12) < 3), HeadImpact())
    expected = np.mean([[highest(i, layer, head) for layer in range(3) for head in range(2)] for i in maps], axis=0)
    np.testing.assert_allclose(found.mean_maps[one_view(3, 4)][5], expected.mean(), rtol=1e-12)
    extra = found.mean_maps[one_view(3, 4)][8] - found.mean_maps[one_view(3, 4)][0]
    assert extra == pytest.approx(0.5 * np.mean([highest(i, *faint) for i in maps]) / 6) and extra < 0.5 * expected.mean() / 6


def test_another_seed_chooses_other_masks(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    ids = [f"e{i:02d}" for i in range(30)]
    maps = {i: stored(rng.random((3, 2, 12)) + 0.05) for i in ids}
    targets = {i: rng.random(12) < 0.5 for i in ids}
    by_seed = [run(tmp_path, maps, targets, HeadImpact(chance_masks=2, seed=seed))[1].chance for seed in (0, 0, 1)]
    np.testing.assert_array_equal(by_seed[0], by_seed[1])
    assert not np.array_equal(by_seed[0], by_seed[2])
