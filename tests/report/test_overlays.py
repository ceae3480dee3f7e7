"""Overlays show the attention that was stored, on the pixels of the image that it belongs to."""

import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from headwise.attention.schema import ATTENTION
from headwise.files import sha256_tree, write_table
from headwise.layout import Layout, View
from headwise.report.gallery import draw_gallery
from headwise.report.overlays import CYAN, INFERNO, density, draw_outline, mean_map, paint_attention, rank_heads, share_inside
from headwise.scores.schema import HEADS
from tests.report.artefacts import Size


def attention(maps: dict[tuple[int, int], list[float]], layout: Layout) -> pl.DataFrame:
    rows = [
        {"example_id": "a", "layer": layer, "head": head, "views": [asdict(view) for view in layout], "map": values, "map_max": 0.5}
        for (layer, head), values in maps.items()
    ]
    return pl.DataFrame(rows).with_columns(pl.col("layer", "head").cast(pl.Int16))


def test_the_mean_map_is_the_mean_of_the_attention_itself() -> None:
    rows = attention({(0, 0): [1.0, 0.0, 0.5, 0.5], (0, 1): [0.0, 1.0, 0.0, 1.0], (1, 0): [9.0] * 4}, (View(2, 2),)).with_columns(
        map_max=pl.Series([0.5, 0.1, 1.0])
    )
    expected = (np.array([1.0, 0.0, 0.5, 0.5]) * 0.5 + np.array([0.0, 1.0, 0.0, 1.0]) * 0.1) / 2
    assert np.allclose(mean_map(rows, [(0, 1), (0, 0)], (2, 2)), expected.reshape(2, 2))


def test_a_map_that_does_not_fit_its_views_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a: maps of 3 visual tokens, its views have 4 cells \(2 x 2\)"):
        mean_map(attention({(0, 0): [1.0, 0.0, 0.5]}, (View(2, 2),)), [(0, 0)], (2, 2))
    with pytest.raises(ValueError, match=r"a: 1 maps of \[4\] visual tokens for 2 heads"):
        mean_map(attention({(0, 0): [1.0] * 4}, (View(2, 2),)), [(0, 0), (3, 3)], (2, 2))
    with pytest.raises(ValueError, match=r"a: 2 maps of \[3, 4\] visual tokens for 2 heads"):
        mean_map(attention({(0, 0): [1.0] * 4, (0, 1): [1.0] * 3}, (View(2, 2),)), [(0, 0), (0, 1)], (2, 2))


def test_heads_are_ranked_within_the_layers_and_ties_go_to_the_earlier() -> None:
    values = [(0, 0, 0.9), (1, 0, 0.2), (1, 1, 0.7), (2, 0, 0.7), (2, 1, None)]
    rows = [{"layer": layer, "head": head, "statistic": "s", "value": value, "n": 1} for layer, head, value in values]
    table = pl.DataFrame(rows).with_columns(pl.col("layer", "head").cast(pl.Int16))
    assert set(table.columns) < set(HEADS.names)
    assert rank_heads(table, "s", (1, 2), 2, best=True) == [(1, 1), (2, 0)]
    assert rank_heads(table, "s", (1, 2), 9, best=False) == [(1, 0), (1, 1), (2, 0)]


def whole(map_: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The density of a view of the whole image."""
    return density(map_.reshape(-1), (View(*map_.shape),), size)


@given(
    arrays.arrays(np.float64, arrays.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(0, 1)),
    st.integers(1, 5),
    st.integers(1, 5),
)
def test_a_view_of_the_whole_image_keeps_each_cell_and_its_share(map_: np.ndarray, tall: int, wide: int) -> None:
    large = whole(map_, (map_.shape[0] * tall, map_.shape[1] * wide))
    assert np.array_equal(large[tall // 2 :: tall, wide // 2 :: wide], map_)
    assert np.isclose(large.mean(), map_.mean())


@given(st.tuples(st.integers(1, 40), st.integers(1, 40)), st.integers(1, 90), st.integers(1, 90))
def test_a_view_of_the_whole_image_takes_the_cell_at_each_pixels_centre(grid: tuple[int, int], tall: int, wide: int) -> None:
    map_ = np.random.default_rng(0).random(grid)
    rows, columns = (((np.arange(side) + 0.5) * cells / side).astype(int) for side, cells in zip((tall, wide), map_.shape, strict=True))
    assert np.array_equal(whole(map_, (tall, wide)), map_[rows][:, columns])


def test_sizes_that_do_not_divide_stay_in_order() -> None:
    assert whole(np.arange(3.0)[None, :], (2, 7)).tolist() == [[0, 0, 1, 1, 1, 2, 2]] * 2


def test_tiles_and_a_global_view_add_up_as_densities() -> None:
    """Two tiles of a cell each, side by side, and one cell over all: as much attention on twice the area is half as dense."""
    layout = (View(1, 1, right=0.5), View(1, 1, left=0.5), View(1, 1))
    assert density(np.array([3.0, 1.0, 4.0]), layout, (2, 4)).tolist() == [[5, 5, 3, 3]] * 2


def test_what_lies_outside_the_image_is_not_drawn() -> None:
    padded = (View(4, 1, top=-0.5, bottom=1.5),)
    assert density(np.array([9.0, 1.0, 2.0, 9.0]), padded, (4, 1))[:, 0].tolist() == [1, 1, 2, 2]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 60), st.integers(1, 60))
def test_tiles_leave_no_pixel_out_and_share_none(rows: int, columns: int, tall: int, wide: int) -> None:
    places = [(i / rows, j / columns, (i + 1) / rows, (j + 1) / columns) for i in range(rows) for j in range(columns)]
    layout = tuple(View(2, 2, *place) for place in places)
    np.testing.assert_allclose(density(np.ones(4 * len(layout)), layout, (tall, wide)), 1, rtol=1e-9)


def test_the_share_inside_is_the_sum_on_the_mask() -> None:
    mask = np.zeros((4, 4), dtype=bool)
    mask[:2, :2] = True
    assert share_inside(whole(np.array([[3.0, 1.0], [1.0, 3.0]]), (4, 4)), mask) == 3 / 8
    assert share_inside(np.ones((4, 4)), mask) == mask.mean()
    assert share_inside(np.zeros((4, 4)), mask) == 0


def test_the_brightest_cell_is_the_most_attended() -> None:
    image, mask = np.zeros((40, 40, 3), dtype=np.uint8), np.zeros((40, 40), dtype=bool)
    map_ = np.array([[0.1, 0.2], [0.4, 0.05]])
    painted = paint_attention(image, whole(map_, (40, 40)), mask)
    for row, column in np.ndindex(2, 2):
        level = round(float(map_[row, column]) / 0.4 * 255)
        assert np.abs(painted[10 + 20 * row, 10 + 20 * column] - 0.6 * INFERNO[level]).max() <= 1


def test_the_outline_is_on_the_border_and_the_rest_is_untouched() -> None:
    image, mask = np.full((30, 30, 3), 100, dtype=np.uint8), np.zeros((30, 30), dtype=bool)
    mask[10:20, 10:20] = True
    drawn = draw_outline(image, mask)
    assert tuple(drawn[10, 15]) == CYAN and tuple(drawn[9, 15]) == (16, 16, 16)
    assert tuple(drawn[15, 15]) == tuple(drawn[5, 5]) == (100, 100, 100)
    assert (image == 100).all()


def test_planted_heads_look_at_the_object_and_the_others_do_not(workspace: Path, tmp_path: Path) -> None:
    planted, others = list(Size().planted), [(0, 0), (1, 2)]
    overlays = draw_gallery(workspace / "data", tmp_path, planted, others, 50)
    assert len(overlays) == Size().examples
    for overlay in overlays:
        assert overlay.top_share > 2 * overlay.bottom_share and overlay.top_share > 2 * overlay.area
        with Image.open(tmp_path / Path(overlay.top).name) as picture:
            assert max(picture.size) == 320


def test_the_draw_is_seeded_and_bounded(workspace: Path, tmp_path: Path) -> None:
    draws = []
    for name in ("first", "second"):
        (tmp_path / name / "overlays").mkdir(parents=True)
        draws.append(draw_gallery(workspace / "data", tmp_path / name / "overlays", [(2, 1)], [(0, 0)], 5))
    assert draws[0] == draws[1] and len(draws[0]) == 5
    assert sha256_tree(tmp_path / "first") == sha256_tree(tmp_path / "second")


@pytest.mark.parametrize("missing", ["images", "masks", "attention"])
def test_without_images_masks_or_attention_there_is_nothing_to_draw(workspace: Path, tmp_path: Path, missing: str) -> None:
    copy = shutil.copytree(workspace / "data", tmp_path / "data")
    shutil.rmtree(copy / missing)
    assert draw_gallery(copy, tmp_path, [(2, 1)], [(0, 0)], 5) == []


def test_an_unreadable_image_is_passed_over(workspace: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(workspace / "data", tmp_path / "data")
    (copy / "images/images/0003.png").write_bytes(b"")
    assert len(draw_gallery(copy, tmp_path, [(2, 1)], [(0, 0)], 50)) == Size().examples - 1


def test_attention_of_another_schema_is_refused_by_name(workspace: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(workspace / "data", tmp_path / "data")
    part = copy / "attention/shard=01/part.parquet"
    pl.read_parquet(part).drop("visual_mass").write_parquet(part)
    with pytest.raises(ValueError, match=r"shard=01/part\.parquet: missing columns \['visual_mass'\]"):
        draw_gallery(copy, tmp_path, [(2, 1)], [(0, 0)], 5)


def test_a_report_loads_no_model_library() -> None:
    code = "import sys, headwise.report; assert not {'torch', 'transformers'} & set(sys.modules), 'loaded'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_attention_without_a_place_on_the_image_is_not_drawn(workspace: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(workspace / "data", tmp_path / "data")
    for part in (copy / "attention").glob("*/part.parquet"):
        table = pl.read_parquet(part)
        write_table(table.with_columns(views=table["views"].list.head(0)), part, ATTENTION)
    assert draw_gallery(copy, tmp_path, [(2, 1)], [(0, 0)], 5) == []
