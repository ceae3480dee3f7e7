"""Tiles with a global view, and the queries of a Q-Former, from the stored table to the scores and the pictures."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from headwise.attention.schema import ATTENTION, SCALARS
from headwise.examples import BAD
from headwise.files import read_json, read_table, write_table
from headwise.layout import Layout, View
from headwise.masks.table import MASKS
from headwise.report.overlays import mean_map, share_inside
from headwise.scores.head_impact import HeadImpact
from headwise.scores.schema import EXAMPLE_SCORES, HEADS
from headwise.scores.token_masks import NO_PLACE, token_masks
from headwise.segments import coverage
from headwise.selection import Criterion, select
from tasks.scores import write_scores
from tests.synthetic import draw_scalars, mask_frame, mask_row, square, stored, write_part

SHAPE = (3, 2)
TILES: Layout = (View(4, 4, right=0.5), View(4, 4, left=0.5), View(4, 4))
"""Two tiles side by side and the whole image: the object of 2 x 2 tile cells is 2 x 1 cells of the global view."""
SETTINGS = HeadImpact(bootstrap=20, min_images=10, sink_fence=5)


def write_inputs(folder: Path, layout: Layout, tokens: int) -> dict[str, np.ndarray]:
    """Attention and masks of 14 examples; layer 1 looks at the object in every view, or the queries at anything."""
    rng = np.random.default_rng(0)
    masks = {f"e{i:02d}": square((4, 8), int(rng.integers(3)), 2 * int(rng.integers(4)), 2, cell=8) for i in range(14)}
    maps = {}
    for example_id, mask in masks.items():
        array = rng.uniform(0.1, 0.3, size=(*SHAPE, tokens))
        array[1] += 3 * (coverage(mask, layout) > 0.5) if layout else 0
        array[0, :, -1] = 2  # the last token, in the lower right corner of the last view, draws the eye of layer 0
        maps[example_id] = stored(array)
    write_part(folder / "shard/part.parquet", maps, layout)
    (folder / "masks").mkdir()
    write_table(mask_frame([mask_row(example_id, mask) for example_id, mask in masks.items()]), folder / "masks/masks.parquet", MASKS)
    return masks


def test_tiles_with_a_global_view_are_scored_and_drawn(tmp_path: Path) -> None:
    masks = write_inputs(tmp_path, TILES, 48)
    write_scores([tmp_path / "masks"], [tmp_path / "shard"], tmp_path / "scores", SETTINGS)
    impact = read_table(tmp_path / "scores/heads.parquet", HEADS).filter(pl.col("statistic") == "head_impact")
    assert impact.filter(pl.col("layer") == 1)["value"].to_list() == [1, 1]
    assert impact.filter(pl.col("layer") != 1)["value"].max() < 0.3  # type: ignore[operator]
    assert read_json(tmp_path / "scores/tests.json")["sink_tokens"] == {"4 x 4 at 0 0 1 0.5 + 4 x 4 at 0 0.5 1 1 + 4 x 4": [47]}
    for (example_id,), rows in read_table(tmp_path / "shard/part.parquet", ATTENTION).group_by("example_id"):
        mask = masks[str(example_id)]
        looking, other = (share_inside(mean_map(rows, heads, mask.shape), mask) for heads in ([(1, 0), (1, 1)], [(0, 0), (2, 1)]))
        assert looking > 0.6 > 0.2 > other


def test_a_token_is_meant_in_each_view_that_shows_the_object() -> None:
    mask = square((4, 8), 1, 4, 2, cell=8)  # the first two columns of the right tile
    tokens = token_masks(mask_frame([mask_row("a", mask)]), {"a": TILES}, HeadImpact()).examples["a"].tokens
    assert np.flatnonzero(tokens).tolist() == [16 + 4, 16 + 5, 16 + 8, 16 + 9, 32 + 6, 32 + 10]


def test_queries_without_a_place_keep_the_means_of_the_attention_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_inputs(tmp_path, (), 32)
    write_scores([tmp_path / "masks"], [tmp_path / "shard"], tmp_path / "scores", SETTINGS)
    heads = read_table(tmp_path / "scores/heads.parquet", HEADS)
    assert set(heads["statistic"]) == set(SCALARS)
    expected = np.mean([draw_scalars(f"e{i:02d}", SHAPE) for i in range(14)], axis=0, dtype=np.float64)
    for index, name in enumerate(SCALARS):
        rows = heads.filter(pl.col("statistic") == name).sort("layer", "head")
        np.testing.assert_allclose(rows["value"].to_numpy().reshape(SHAPE), expected[..., index], rtol=1e-12)
    assert read_table(tmp_path / "scores/examples.parquet", EXAMPLE_SCORES).is_empty()
    assert set(read_table(tmp_path / "scores/bad.parquet", BAD)["reason"]) == {NO_PLACE}
    counts = {"observed": 14, "scored": 0, "images": 0, "left_out": {"no place": 14}, "bad": {}}
    assert read_json(tmp_path / "scores/tests.json") == {"examples": counts, "sink_tokens": {}}
    said = capsys.readouterr().out
    assert "14 examples have no score, no place\n" in said
    assert f"holds no head_impact, head_impact_adjusted, head_impact_nosink, {NO_PLACE}" in said
    assert len(select(heads, Criterion(statistic="visual_mass", k=1), "top").layers) == 1
    with pytest.raises(ValueError, match="the scores have no 'head_impact'; they have"):
        select(heads, Criterion(k=1), "top")


def test_a_map_that_does_not_fit_its_views_is_told_with_file_and_example(tmp_path: Path) -> None:
    write_inputs(tmp_path, TILES, 48)
    table = pl.read_parquet(tmp_path / "shard/part.parquet")
    broken = table.with_columns(views=pl.when(pl.col("example_id") == "e03").then(pl.col("views").list.head(2)).otherwise("views"))
    write_table(broken, tmp_path / "shard/part.parquet", ATTENTION)
    told = r"shard/part\.parquet: 'e03' has maps of 48 visual tokens, its views have 32 cells \(4 x 4 at 0 0 1 0\.5 \+"
    with pytest.raises(ValueError, match=told):
        write_scores([tmp_path / "masks"], [tmp_path / "shard"], tmp_path / "scores", SETTINGS)
    assert not (tmp_path / "scores").exists()
