from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from headwise.attention.observe import observe
from headwise.attention.schema import ATTENTION, SCALARS, read_layout
from headwise.attention.table import merge, part_writer, to_table
from headwise.files import read_table, write_table
from headwise.layout import View
from headwise.scores.stored import Heads, stored_examples
from headwise.vlm import encode
from tests.tiny import GRID, NUM_HEADS, NUM_LAYERS, image, tiny_vlm

IDS = ["b", "a", "c"]


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    batch = encode(tiny_vlm(), [image(0), image(1), None], ["What?", "Where is it?", "How many?"], ["red", "left", "three squares"])
    found = pl.from_arrow(to_table(observe(tiny_vlm(), batch), IDS))
    assert isinstance(found, pl.DataFrame)
    return found


def test_one_row_per_example_layer_and_head(frame: pl.DataFrame) -> None:
    assert frame.columns == ATTENTION.names
    assert frame.select("example_id", "layer", "head").rows() == [
        (i, layer, head) for i in IDS for layer in range(NUM_LAYERS) for head in range(NUM_HEADS)
    ]
    assert frame.select(SCALARS).null_count().sum_horizontal().item() == 0


def test_a_scaled_map_times_its_maximum_is_the_map(frame: pl.DataFrame) -> None:
    batch = encode(tiny_vlm(), [image(0)], ["What?"], ["red"])
    maps = observe(tiny_vlm(), batch).maps
    rows = frame.filter(pl.col("example_id") == "b")
    for name in ("map", "text_image_map"):
        scaled = np.array([list(values) for values in rows[name]], dtype=np.float64)
        highest = rows[f"{name}_max"].to_numpy()
        assert scaled.max(axis=1) == pytest.approx(1)
        restored = (scaled * highest[:, None]).reshape(NUM_LAYERS, NUM_HEADS, -1)
        np.testing.assert_allclose(restored, maps[name][0], rtol=1e-3, atol=1e-6)
    assert rows["map_max"].to_numpy() == pytest.approx(rows["map_max"].to_numpy())


def test_visual_mass_is_the_sum_of_the_map(frame: pl.DataFrame) -> None:
    sums = np.array([float(np.sum(np.asarray(values, dtype=np.float64))) for values in frame["map"]]) * frame["map_max"].to_numpy()
    np.testing.assert_allclose(sums, frame["visual_mass"].to_numpy(), rtol=2e-3, atol=1e-6)


def test_without_an_image_the_map_is_empty_and_there_is_no_view(frame: pl.DataFrame) -> None:
    rows = frame.filter(pl.col("example_id") == "c")
    assert rows["map"].list.len().unique().to_list() == [0]
    assert rows["views"].list.len().unique().to_list() == [0]
    assert set(rows.select("map_max", "visual_mass", "max_visual").unique().row(0)) == {0}
    assert frame.filter(pl.col("example_id") == "a")["views"].to_list() == [[asdict(View(*GRID))]] * NUM_LAYERS * NUM_HEADS


def test_merging_sorts_and_drops_what_came_twice(frame: pl.DataFrame) -> None:
    parts = [frame.filter(pl.col("example_id") == i) for i in IDS]
    merged = merge([*parts, parts[0], parts[2]])
    assert merged.equals(frame.sort("example_id", "layer", "head"))
    assert merge([frame.reverse()]).equals(merged)


def test_the_table_survives_the_disk(frame: pl.DataFrame, tmp_path: Path) -> None:
    write_table(merge([frame]), tmp_path / "part.parquet", ATTENTION)
    assert read_table(tmp_path / "part.parquet", ATTENTION).equals(merge([frame]))


LAYOUTS = [(View(1, 3, 0.0, -1 / 7, 1 / 3, 1.0), View(2, 3)), (), (View(3, 3),), None]
"""Of nine tokens each: a padded tile with the whole image, the queries of a Q-Former, one grid; then no image."""


def test_layouts_come_back_exactly_from_the_file_that_the_step_writes(tmp_path: Path) -> None:
    questions, pictures = ["What?"] * 4, [image(0), image(1), image(2), None]
    observed = observe(tiny_vlm(), encode(tiny_vlm(), pictures, questions, ["red"] * 4))
    found = pl.from_arrow(to_table(replace(observed, layouts=tuple(LAYOUTS)), list("abcd")))
    assert isinstance(found, pl.DataFrame)
    with part_writer(tmp_path / "part.parquet") as writer:
        writer.write_table(merge([found]).to_arrow().cast(ATTENTION))
    rows = read_table(tmp_path / "part.parquet", ATTENTION).filter(pl.col("layer") == 1, pl.col("head") == 2)
    assert [read_layout(row["views"], len(row["map"])) for row in rows.iter_rows(named=True)] == LAYOUTS
    stored = stored_examples([tmp_path / "part.parquet"], Heads(NUM_LAYERS, NUM_HEADS))
    assert [example.layout for example in stored] == LAYOUTS


def test_views_with_more_or_fewer_cells_than_the_map_are_refused() -> None:
    with pytest.raises(ValueError, match=r"maps of 9 visual tokens, its views have 10 cells \(2 x 2 at 0 0 1 0.5 \+ 2 x 3\)"):
        read_layout([asdict(View(2, 2, right=0.5)), asdict(View(2, 3))], 9)
    with pytest.raises(ValueError, match="maps of 0 visual tokens, its views have 6 cells"):
        read_layout([asdict(View(2, 3))], 0)
