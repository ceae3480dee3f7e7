from pathlib import Path

import numpy as np
import polars as pl
import pytest

from headwise.attention.observe import observe
from headwise.attention.schema import ATTENTION, SCALARS
from headwise.attention.table import merge, to_table
from headwise.files import read_table, write_table
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


def test_without_an_image_the_map_is_empty_and_the_grid_zero(frame: pl.DataFrame) -> None:
    rows = frame.filter(pl.col("example_id") == "c")
    assert rows["map"].list.len().unique().to_list() == [0]
    assert set(rows.select("grid_height", "grid_width", "map_max", "visual_mass", "max_visual").unique().row(0)) == {0}
    assert frame.filter(pl.col("example_id") == "a").select("grid_height", "grid_width").unique().rows() == [GRID]


def test_merging_sorts_and_drops_what_came_twice(frame: pl.DataFrame) -> None:
    parts = [frame.filter(pl.col("example_id") == i) for i in IDS]
    merged = merge([*parts, parts[0], parts[2]])
    assert merged.equals(frame.sort("example_id", "layer", "head"))
    assert merge([frame.reverse()]).equals(merged)


def test_the_table_survives_the_disk(frame: pl.DataFrame, tmp_path: Path) -> None:
    write_table(merge([frame]), tmp_path / "part.parquet", ATTENTION)
    assert read_table(tmp_path / "part.parquet", ATTENTION).equals(merge([frame]))
