from pathlib import Path

import numpy as np
import polars as pl
import pytest

from headwise.files import read_table, write_table
from headwise.scores.head_impact import HeadImpact
from headwise.scores.schema import EXAMPLE_SCORES, HEADS, IMPACTS, MEANS
from headwise.scores.scoring import Scores, score_heads
from headwise.scores.stability import resample_counts
from tests.synthetic import draw_scalars, look_at, mask_frame, mask_row, square, stored, write_part

GRID = (8, 8)
SHAPE = (4, 3)
SETTINGS = HeadImpact(bootstrap=50, min_examples=10)


def planted(number: int = 40, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Pixel masks of a 2 x 2 square somewhere, and maps in which only layer 1 looks at it."""
    rng = np.random.default_rng(seed)
    masks = {f"e{i:03d}": square(GRID, int(rng.integers(7)), int(rng.integers(7)), 2) for i in range(number)}
    return masks, {example_id: look_at(mask, GRID, rng, SHAPE) for example_id, mask in masks.items()}


def frame_of(masks: dict[str, np.ndarray]) -> pl.DataFrame:
    return mask_frame([mask_row(example_id, mask) for example_id, mask in masks.items()])


def score(tmp_path: Path, masks: dict[str, np.ndarray], maps: dict[str, np.ndarray], settings: HeadImpact = SETTINGS) -> Scores:
    return score_heads([write_part(tmp_path / "part.parquet", maps, GRID)], frame_of(masks), settings)


def layer_means(scores: Scores, statistic: str) -> list[float]:
    rows = scores.heads.filter(pl.col("statistic") == statistic).group_by("layer").agg(pl.col("value").mean()).sort("layer")
    return rows["value"].to_list()


def test_a_layer_that_looks_at_the_mask_comes_out_on_top(tmp_path: Path) -> None:
    scores = score(tmp_path, *planted())
    for statistic in IMPACTS:
        layers = layer_means(scores, statistic)
        assert int(np.argmax(layers)) == 1
        assert layers[1] > 0.85 > 0.2 > max(layers[0], layers[2], layers[3])
    assert layer_means(scores, "head_impact")[1] == 1.0
    across = scores.tests["across_layers"]
    assert isinstance(across, dict)
    assert across["kruskal_p"] < 0.05


def test_with_masks_of_other_examples_nothing_is_left_above_chance(tmp_path: Path) -> None:
    masks, maps = planted(60)
    shuffled = dict(zip(masks, np.random.default_rng(9).permutation(list(masks.values())), strict=True))
    scores = score(tmp_path, shuffled, maps)
    adjusted = scores.heads.filter(pl.col("statistic") == "head_impact_adjusted")
    assert adjusted["value"].abs().max() < 0.03  # type: ignore[operator]
    assert (adjusted["low"] < 0.01).all()
    assert score(tmp_path, masks, maps).heads.filter(pl.col("statistic") == "head_impact_adjusted")["value"].max() > 0.9  # type: ignore[operator]


def test_a_centre_bias_is_head_impact_but_not_adjusted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    masks = {f"e{i:03d}": square(GRID, int(rng.integers(2, 4)), int(rng.integers(2, 4)), 3) for i in range(40)}
    centre = square(GRID, 2, 2, 4)
    maps = {example_id: look_at(centre, GRID, rng, SHAPE) for example_id in masks}
    scores = score(tmp_path, masks, maps)
    assert layer_means(scores, "head_impact")[1] > 0.4
    assert abs(layer_means(scores, "head_impact_adjusted")[1]) < 0.02


def test_a_sink_hides_the_object_until_it_is_taken_out(tmp_path: Path) -> None:
    masks, maps = planted()
    sunk = {}
    for example_id, array in maps.items():
        raised = array.astype(np.float64)
        raised[..., 56] = 100 * raised[..., :56].max()  # one corner lifts the mean of 64 tokens above every other token
        sunk[example_id] = stored(raised)
    scores = score(tmp_path, masks, sunk)
    assert scores.tests["sink_tokens"] == {"8 x 8": [56]}
    assert layer_means(scores, "head_impact")[1] < 0.05
    assert layer_means(scores, "head_impact_nosink")[1] > 0.9


def test_values_counts_and_intervals_are_those_of_the_examples(tmp_path: Path) -> None:
    masks, maps = planted(25)
    scores = score(tmp_path, masks, maps)
    examples = pl.from_arrow(scores.examples)
    assert isinstance(examples, pl.DataFrame)
    assert examples.select("example_id", "layer", "head").equals(examples.select("example_id", "layer", "head").sort(pl.all()))
    counts = resample_counts(25, SETTINGS.bootstrap, SETTINGS.seed)
    for layer, head in np.ndindex(SHAPE):
        rows = examples.filter((pl.col("layer") == layer) & (pl.col("head") == head))
        impact = rows["head_impact"].to_numpy().astype(np.float64)
        resampled = [np.repeat(impact, row).mean() for row in counts]
        found = scores.heads.filter((pl.col("layer") == layer) & (pl.col("head") == head) & (pl.col("statistic") == "head_impact"))
        assert found.select("value", "low", "high").row(0) == pytest.approx((impact.mean(), *np.percentile(resampled, [2.5, 97.5])))
        adjusted = (rows["head_impact"] - rows["chance"]).to_numpy().astype(np.float64)
        row = scores.heads.filter((pl.col("layer") == layer) & (pl.col("head") == head) & (pl.col("statistic") == "head_impact_adjusted"))
        assert row["value"][0] == pytest.approx(adjusted.mean(), abs=1e-7)
        assert row["n"][0] == 25


def test_means_are_over_all_observed_examples_and_have_no_interval(tmp_path: Path) -> None:
    masks, maps = planted(20)
    scored = {example_id: masks[example_id] for example_id in list(masks)[:15]}
    scores = score(tmp_path, scored, maps)
    expected = np.stack([draw_scalars(example_id, SHAPE) for example_id in maps]).mean(axis=0, dtype=np.float64)
    for index, name in enumerate(MEANS):
        rows = scores.heads.filter(pl.col("statistic") == name).sort("layer", "head")
        np.testing.assert_allclose(rows["value"].to_numpy().reshape(SHAPE), expected[..., index], rtol=1e-12)
        assert rows["n"].unique().to_list() == [20]
        assert rows["low"].is_null().all()
        assert rows["high"].is_null().all()
    assert scores.heads.filter(pl.col("statistic") == "head_impact")["n"].unique().to_list() == [15]
    assert set(scores.left_out) == set(maps) - set(scored)
    assert scores.tests["examples"] == {"observed": 20, "scored": 15, "left_out": 5}


def test_where_no_example_defines_a_score_it_is_null(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    corner = square(GRID, 0, 0, 1)
    maps = {}
    for i in range(12):
        array = rng.uniform(0.1, 0.2, size=(*SHAPE, 64))
        array[..., 0] = 1.0
        maps[f"e{i:03d}"] = stored(array)
    scores = score(tmp_path, dict.fromkeys(maps, corner), maps)
    rows = scores.heads.filter(pl.col("statistic") == "head_impact_nosink")
    assert rows["n"].unique().to_list() == [0]
    assert rows.select("value", "low", "high").null_count().row(0) == (12, 12, 12)
    assert scores.examples["head_impact_nosink"].null_count == len(scores.examples)


def test_the_tables_fit_their_schemas(tmp_path: Path) -> None:
    scores = score(tmp_path, *planted(12))
    write_table(scores.heads, tmp_path / "heads.parquet", HEADS)
    write_table(scores.examples, tmp_path / "examples.parquet", EXAMPLE_SCORES)
    assert len(read_table(tmp_path / "heads.parquet", HEADS)) == 12 * (len(IMPACTS) + len(MEANS))
    assert len(read_table(tmp_path / "examples.parquet", EXAMPLE_SCORES)) == 12 * 12


@pytest.mark.parametrize("shares", [2, 3])
def test_scores_do_not_depend_on_how_the_examples_were_shared_out(tmp_path: Path, shares: int) -> None:
    masks, maps = planted(20)
    names = list(np.random.default_rng(shares).permutation(list(maps)))
    parts = [write_part(tmp_path / f"{i}.parquet", {name: maps[name] for name in names[i::shares]}, GRID) for i in range(shares)]
    settings = HeadImpact(bootstrap=20, min_examples=10, chance_masks=5)
    whole, shared = score(tmp_path, masks, maps, settings), score_heads(parts, frame_of(masks), settings)
    assert whole.heads.equals(shared.heads)
    assert whole.examples.equals(shared.examples)
    assert whole.tests == shared.tests


def test_too_few_examples_are_refused_with_both_numbers(tmp_path: Path) -> None:
    masks, maps = planted(20)
    scored = {example_id: masks[example_id] for example_id in list(masks)[:9]}
    with pytest.raises(ValueError, match=r"9 of 20 observed examples can be scored, min_examples = 10; left out: e009: it has no row"):
        score(tmp_path, scored, maps)
    score(tmp_path, {**scored, "e010": masks["e010"]}, maps)


def test_a_text_only_model_has_no_head_impact(tmp_path: Path) -> None:
    maps = {f"e{i:03d}": np.zeros((2, 2, 0), dtype=np.float16) for i in range(12)}
    part = write_part(tmp_path / "part.parquet", maps, (0, 0))
    with pytest.raises(ValueError, match=r"0 of 12 observed examples can be scored.*the model saw no image"):
        score_heads([part], frame_of({}), SETTINGS)


def test_the_tests_have_a_row_per_layer_and_threshold(tmp_path: Path) -> None:
    scores = score(tmp_path, *planted(30))
    within = scores.tests["within_layers"]
    assert isinstance(within, list)
    assert [row["layer"] for row in within] == [0, 1, 2, 3]
    examples = pl.from_arrow(scores.examples)
    assert isinstance(examples, pl.DataFrame)
    assert scores.tests["layer_ranking_over_thresholds"] is not None
    over = scores.tests["layer_ranking_over_examples"]
    assert isinstance(over, dict)
    assert 0 < over["low"] <= over["tau"] <= 1
