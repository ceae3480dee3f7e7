"""Overlays show the attention that was stored, on the pixels of the image that it belongs to."""

import shutil
import subprocess
import sys
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
from headwise.report.gallery import draw_gallery
from headwise.report.overlays import CYAN, INFERNO, draw_outline, enlarge, mean_map, paint_attention, rank_heads, share_inside
from headwise.scores.schema import HEADS
from tests.report.artefacts import Size


def attention(maps: dict[tuple[int, int], list[float]], grid: tuple[int, int]) -> pl.DataFrame:
    rows = [
        {"example_id": "a", "layer": layer, "head": head, "grid_height": grid[0], "grid_width": grid[1], "map": values, "map_max": 0.5}
        for (layer, head), values in maps.items()
    ]
    return pl.DataFrame(rows).with_columns(pl.col("layer", "head").cast(pl.Int16))


def test_the_mean_map_is_the_mean_of_the_attention_itself() -> None:
    rows = attention({(0, 0): [1.0, 0.0, 0.5, 0.5], (0, 1): [0.0, 1.0, 0.0, 1.0], (1, 0): [9.0] * 4}, (2, 2)).with_columns(
        map_max=pl.Series([0.5, 0.1, 1.0])
    )
    expected = (np.array([1.0, 0.0, 0.5, 0.5]) * 0.5 + np.array([0.0, 1.0, 0.0, 1.0]) * 0.1) / 2
    assert np.allclose(mean_map(rows, [(0, 1), (0, 0)]), expected.reshape(2, 2))


def test_a_map_that_does_not_fit_its_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a: 1 maps of \[3\] cells for 1 heads on a grid of 2 x 2"):
        mean_map(attention({(0, 0): [1.0, 0.0, 0.5]}, (2, 2)), [(0, 0)])
    with pytest.raises(ValueError, match="1 maps"):
        mean_map(attention({(0, 0): [1.0] * 4}, (2, 2)), [(0, 0), (3, 3)])


def test_heads_are_ranked_within_the_layers_and_ties_go_to_the_earlier() -> None:
    values = [(0, 0, 0.9), (1, 0, 0.2), (1, 1, 0.7), (2, 0, 0.7), (2, 1, None)]
    rows = [{"layer": layer, "head": head, "statistic": "s", "value": value, "n": 1} for layer, head, value in values]
    table = pl.DataFrame(rows).with_columns(pl.col("layer", "head").cast(pl.Int16))
    assert set(table.columns) < set(HEADS.names)
    assert rank_heads(table, "s", (1, 2), 2, best=True) == [(1, 1), (2, 0)]
    assert rank_heads(table, "s", (1, 2), 9, best=False) == [(1, 0), (1, 1), (2, 0)]


@given(
    arrays.arrays(np.float64, arrays.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(0, 1)),
    st.integers(1, 5),
    st.integers(1, 5),
)
def test_enlarging_keeps_each_cell_and_its_share(map_: np.ndarray, tall: int, wide: int) -> None:
    large = enlarge(map_, (map_.shape[0] * tall, map_.shape[1] * wide))
    assert np.array_equal(large[tall // 2 :: tall, wide // 2 :: wide], map_)
    assert np.isclose(large.mean(), map_.mean())


def test_enlarging_to_sizes_that_do_not_divide_stays_in_order() -> None:
    assert enlarge(np.arange(3.0)[None, :], (2, 7)).tolist() == [[0, 0, 1, 1, 1, 2, 2]] * 2


def test_the_share_inside_is_the_sum_on_the_mask() -> None:
    mask = np.zeros((4, 4), dtype=bool)
    mask[:2, :2] = True
    assert share_inside(np.array([[3.0, 1.0], [1.0, 3.0]]), mask) == 3 / 8
    assert share_inside(np.ones((2, 2)), mask) == mask.mean()
    assert share_inside(np.zeros((2, 2)), mask) == 0


def test_the_brightest_cell_is_the_most_attended() -> None:
    image, mask = np.zeros((40, 40, 3), dtype=np.uint8), np.zeros((40, 40), dtype=bool)
    map_ = np.array([[0.1, 0.2], [0.4, 0.05]])
    painted = paint_attention(image, map_, mask)
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


def test_a_model_that_saw_no_image_has_nothing_to_draw(workspace: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(workspace / "data", tmp_path / "data")
    for part in (copy / "attention").glob("*/part.parquet"):
        table = pl.read_parquet(part).with_columns(pl.lit(0, pl.Int16).alias("grid_height"), pl.lit(0, pl.Int16).alias("grid_width"))
        write_table(table, part, ATTENTION)
    assert draw_gallery(copy, tmp_path, [(2, 1)], [(0, 0)], 5) == []
