import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from headwise.attention.schema import SCALARS
from headwise.files import read_table, sha256_file, write_table
from headwise.scores import impacts
from headwise.scores.head_impact import HeadImpact
from headwise.scores.schema import EXAMPLE_SCORES, HEADS, IMPACTS
from headwise.scores.scoring import Scores, score_heads
from headwise.scores.stability import image_draws
from tests.synthetic import draw_scalars, look_at, mask_frame, mask_row, one_view, square, stored, write_part

GRID = (8, 8)
SHAPE = (4, 3)
SETTINGS = HeadImpact(bootstrap=50, min_images=10)


def planted(number: int = 40, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Pixel masks of a 2 x 2 square somewhere, and maps in which only layer 1 looks at it."""
    rng = np.random.default_rng(seed)
    masks = {f"e{i:03d}": square(GRID, int(rng.integers(7)), int(rng.integers(7)), 2) for i in range(number)}
    return masks, {example_id: look_at(mask, GRID, rng, SHAPE) for example_id, mask in masks.items()}


def frame_of(masks: dict[str, np.ndarray]) -> pl.DataFrame:
    return mask_frame([mask_row(example_id, mask) for example_id, mask in masks.items()])


def score(tmp_path: Path, masks: dict[str, np.ndarray], maps: dict[str, np.ndarray], settings: HeadImpact = SETTINGS) -> Scores:
    part = write_part(tmp_path / "part.parquet", maps, one_view(*GRID))
    return score_heads([part], frame_of(masks), settings, tmp_path / "examples.parquet")


def examples_of(tmp_path: Path) -> pl.DataFrame:
    return read_table(tmp_path / "examples.parquet", EXAMPLE_SCORES)


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


def test_values_counts_and_intervals_are_those_of_the_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impacts, "BLOCK_EXAMPLES", 7)
    masks, maps = planted(25)
    scores = score(tmp_path, masks, maps)
    examples = examples_of(tmp_path)
    assert examples.select("example_id", "layer", "head").equals(examples.select("example_id", "layer", "head").sort(pl.all()))
    assert examples["image"].to_list() == [f"{example_id}.png" for example_id in examples["example_id"]]
    tail = stats.norm.cdf(-stats.t.ppf(0.975, 24) * np.sqrt(25 / 24))  # Hesterberg (2015), eq. 12
    draws = image_draws([f"{example_id}.png" for example_id in sorted(masks)], SETTINGS.bootstrap, SETTINGS.seed)[:, 1:].T
    for layer, head in np.ndindex(SHAPE):
        rows = examples.filter((pl.col("layer") == layer) & (pl.col("head") == head))
        impact = rows["head_impact"].to_numpy().astype(np.float64)
        resampled = [np.repeat(impact, row.astype(int)).mean() for row in draws]
        found = scores.heads.filter((pl.col("layer") == layer) & (pl.col("head") == head) & (pl.col("statistic") == "head_impact"))
        assert found.select("value", "low", "high").row(0) == pytest.approx((impact.mean(), *np.quantile(resampled, [tail, 1 - tail])))
        adjusted = (rows["head_impact"] - rows["chance"]).to_numpy().astype(np.float64)
        row = scores.heads.filter((pl.col("layer") == layer) & (pl.col("head") == head) & (pl.col("statistic") == "head_impact_adjusted"))
        assert row["value"][0] == pytest.approx(adjusted.mean(), abs=1e-7)
        assert row["n"][0] == 25


def test_means_are_over_all_observed_examples_and_have_no_interval(tmp_path: Path) -> None:
    masks, maps = planted(20)
    scored = {example_id: masks[example_id] for example_id in list(masks)[:15]}
    scores = score(tmp_path, scored, maps, HeadImpact(bootstrap=50, min_images=10, max_bad_share=0.25))
    expected = np.stack([draw_scalars(example_id, SHAPE) for example_id in maps]).mean(axis=0, dtype=np.float64)
    for index, name in enumerate(SCALARS):
        rows = scores.heads.filter(pl.col("statistic") == name).sort("layer", "head")
        np.testing.assert_allclose(rows["value"].to_numpy().reshape(SHAPE), expected[..., index], rtol=1e-12)
        assert rows["n"].unique().to_list() == [20]
        assert rows["low"].is_null().all()
        assert rows["high"].is_null().all()
    assert scores.heads.filter(pl.col("statistic") == "head_impact")["n"].unique().to_list() == [15]
    assert set(scores.bad) == set(maps) - set(scored)
    assert scores.tests["examples"] == {"observed": 20, "scored": 15, "images": 15, "left_out": {}, "bad": {"missing mask": 5}}


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
    assert examples_of(tmp_path)["head_impact_nosink"].null_count() == 12 * 12


def test_the_tables_fit_their_schemas(tmp_path: Path) -> None:
    scores = score(tmp_path, *planted(12))
    write_table(scores.heads, tmp_path / "heads.parquet", HEADS)
    assert len(read_table(tmp_path / "heads.parquet", HEADS)) == 12 * (len(IMPACTS) + len(SCALARS))
    assert len(examples_of(tmp_path)) == 12 * 12


@pytest.mark.parametrize("shares", [2, 3])
def test_scores_do_not_depend_on_how_the_examples_were_shared_out(tmp_path: Path, shares: int) -> None:
    masks, maps = planted(20)
    names = list(np.random.default_rng(shares).permutation(list(maps)))
    parts = [write_part(tmp_path / f"{i}.parquet", {name: maps[name] for name in names[i::shares]}, one_view(*GRID)) for i in range(shares)]
    settings = HeadImpact(bootstrap=20, min_images=10, chance_masks=5)
    whole, shared = score(tmp_path, masks, maps, settings), score_heads(parts, frame_of(masks), settings, tmp_path / "shared.parquet")
    assert whole.heads.equals(shared.heads)
    assert sha256_file(tmp_path / "examples.parquet") == sha256_file(tmp_path / "shared.parquet")
    assert whole.tests == shared.tests


def test_too_few_images_are_refused_with_the_causes_counted(tmp_path: Path) -> None:
    masks, maps = planted(20)
    rows = [mask_row(i, mask, image=f"{int(i[1:]) // 2}.png", reason="too small" if i > "e017" else None) for i, mask in masks.items()]
    part = write_part(tmp_path / "part.parquet", maps, one_view(*GRID))
    told = r"9 images \(18 of 20 observed examples\) can be scored, scores.min_images = 10 are needed; no usable mask: 2 "
    with pytest.raises(ValueError, match=told):
        score_heads([part], mask_frame(rows), SETTINGS, tmp_path / "examples.parquet")
    assert not (tmp_path / "examples.parquet").exists()
    score_heads([part], mask_frame(rows), HeadImpact(bootstrap=5, min_images=9), tmp_path / "examples.parquet")


def test_missing_and_unreadable_masks_beyond_the_share_fail_and_objects_smaller_than_the_cells_do_not(tmp_path: Path) -> None:
    masks, maps = planted(40)
    part = write_part(tmp_path / "part.parquet", maps, one_view(*GRID))
    speck = np.zeros((32, 32), dtype=bool)
    speck[0, 0] = True
    small = [mask_row(i, speck if n < 15 else mask) for n, (i, mask) in enumerate(masks.items())]
    scores = score_heads([part], mask_frame(small), SETTINGS, tmp_path / "examples.parquet")
    assert scores.tests["examples"] == {"observed": 40, "scored": 25, "images": 25, "left_out": {"too small for the grid": 15}, "bad": {}}
    two, three = ([row | ({"height": 33} if n == 30 else {}) for n, row in enumerate(small) if n not in gone] for gone in ({31}, {31, 32}))
    scores = score_heads([part], mask_frame(two), SETTINGS, tmp_path / "examples.parquet")
    assert set(scores.bad) == {"e030", "e031"}
    told = r"3 of 40 observed examples cannot be scored, more than max_bad_share = 0\.05 .*; missing mask: 2, unreadable mask: 1 \(such as"
    with pytest.raises(ValueError, match=told):
        score_heads([part], mask_frame(three), SETTINGS, tmp_path / "examples.parquet")


def test_questions_about_an_image_do_not_count_as_images(tmp_path: Path) -> None:
    """Asked twice, with the same maps: the values and the intervals are those of one question each, and n is doubled."""
    masks, maps = planted(20)
    once = score(tmp_path, masks, maps)
    again = {f"{i}{copy}": maps[i] for i in maps for copy in "xy"}
    rows = [mask_row(f"{i}{copy}", mask, image=f"{i}.png") for i, mask in masks.items() for copy in "xy"]
    twice = score_heads(
        [write_part(tmp_path / "twice.parquet", again, one_view(*GRID))], mask_frame(rows), SETTINGS, tmp_path / "twice-examples.parquet"
    )
    for statistic in IMPACTS:
        first, second = (scores.heads.filter(pl.col("statistic") == statistic) for scores in (once, twice))
        np.testing.assert_allclose(second.select("value", "low", "high"), first.select("value", "low", "high"), atol=1e-7)
        assert second["n"].to_list() == (2 * first["n"]).to_list()
    assert twice.tests["layer_ranking_over_images"] == pytest.approx(once.tests["layer_ranking_over_images"])


def test_an_example_takes_less_than_a_kilobyte(tmp_path: Path) -> None:
    """Its ids and its token mask; the counts of 200 resamples alone would be 1.6 KB, and the scores grow with the heads."""
    masks, maps = planted(300)
    frame = frame_of(masks)

    def peak(number: int) -> int:
        part = write_part(tmp_path / f"{number}.parquet", {i: maps[i] for i in list(maps)[:number]}, one_view(*GRID))
        tracemalloc.start()
        try:
            score_heads([part], frame.head(number), HeadImpact(bootstrap=200), tmp_path / "examples.parquet")
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(300)  # imports and caches
    assert (peak(300) - peak(150)) / 150 < 1000


def test_a_text_only_model_has_no_head_impact(tmp_path: Path) -> None:
    maps = {f"e{i:03d}": np.zeros((2, 2, 0), dtype=np.float16) for i in range(12)}
    part = write_part(tmp_path / "part.parquet", maps, ())
    with pytest.raises(ValueError, match=r"0 images \(0 of 12 observed examples\) can be scored.*no image: 12"):
        score_heads([part], frame_of({}), SETTINGS, tmp_path / "examples.parquet")


def test_the_tests_have_a_row_per_layer_and_threshold(tmp_path: Path) -> None:
    scores = score(tmp_path, *planted(30))
    within = scores.tests["within_layers"]
    assert isinstance(within, list)
    assert [row["layer"] for row in within] == [0, 1, 2, 3]
    assert scores.tests["layer_ranking_over_thresholds"] is not None
    over = scores.tests["layer_ranking_over_images"]
    assert isinstance(over, dict)
    assert 0 < over["low"] <= over["tau"] <= 1


@settings(max_examples=20)
@given(st.lists(st.integers(0, 6), min_size=24, max_size=24), st.permutations(range(7)), st.integers(0, 6))
def test_one_shard_equals_seven_to_the_last_bit_in_any_order_and_with_one_given_twice(
    shard_of: list[int], order: list[int], again: int
) -> None:
    masks, maps = planted(24)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = score(folder, masks, maps)
        one = sha256_file(folder / "examples.parquet")
        shards = [{i: maps[i] for i, own in zip(sorted(maps), shard_of, strict=True) if own == shard} for shard in range(7)]
        parts = [write_part(folder / f"{shard}.parquet", shards[shard], one_view(*GRID)) for shard in [*order, again] if shards[shard]]
        seven = score_heads(parts, frame_of(masks), SETTINGS, folder / "examples.parquet")
        assert sha256_file(folder / "examples.parquet") == one
    assert seven.heads.equals(whole.heads)
    assert seven.tests == whole.tests
