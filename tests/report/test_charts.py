"""Charts show the values that they were given."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from matplotlib import colormaps
from PIL import Image, ImageColor

from headwise.report.charts import BOTTOM, LEFT, RIGHT, TOP, WIDTH, heat_map, layer_strips, loss_lines, running_mean, score_grid
from headwise.report.themes import DARK, LIGHT, Theme

DPI = 200


def heads(values: np.ndarray, statistic: str = "head_impact") -> pl.DataFrame:
    layer, head = (index.reshape(-1).astype(np.int16) for index in np.indices(values.shape))
    return pl.DataFrame({"layer": layer, "head": head, "statistic": statistic, "value": values.reshape(-1)})


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).random((7, 4))


def cell_centres(picture: Image.Image, shape: tuple[int, int]) -> np.ndarray:
    """The pixel at the centre of every cell of the heat map."""
    left, top = LEFT * DPI, TOP * DPI
    width, height = (WIDTH - LEFT - RIGHT) * DPI, picture.height - (TOP + BOTTOM) * DPI
    rows = (top + (np.arange(shape[0]) + 0.5) * height / shape[0]).astype(int)
    columns = (left + (np.arange(shape[1]) + 0.5) * width / shape[1]).astype(int)
    return np.asarray(picture.convert("RGB"))[np.ix_(rows, columns)]


def test_the_grid_holds_each_value_at_its_place_whatever_the_order_of_the_rows(values: np.ndarray) -> None:
    shuffled = pl.concat([heads(values), heads(values + 9, "visual_mass")]).sample(fraction=1, shuffle=True, seed=1)
    assert np.array_equal(score_grid(shuffled, "head_impact"), values)


def test_a_head_without_a_value_is_a_gap(values: np.ndarray) -> None:
    grid = score_grid(heads(values).filter(~((pl.col("layer") == 2) & (pl.col("head") == 3))), "head_impact")
    assert np.isnan(grid[2, 3]) and np.isnan(grid).sum() == 1


def test_an_unknown_statistic_names_the_known(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"'caf'.*\['head_impact'\]"):
        score_grid(heads(values), "caf")


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_the_pixels_of_the_heat_map_are_the_values(values: np.ndarray, tmp_path: Path, theme: Theme) -> None:
    with Image.open(heat_map(heads(values), "head_impact", tmp_path / "heat.png", theme=theme)) as picture:
        found = cell_centres(picture, values.shape)
    scaled = (values - values.min()) / (values.max() - values.min())
    expected = np.asarray(colormaps["viridis"](scaled))[..., :3] * 255
    assert np.abs(found - expected).max() <= 1.5


def test_only_the_chosen_layers_are_framed(values: np.ndarray, tmp_path: Path) -> None:
    with Image.open(heat_map(heads(values), "head_impact", tmp_path / "heat.png", chosen=(1, 5))) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
        height = picture.height - (TOP + BOTTOM) * DPI
    left_edge = pixels[:, int(LEFT * DPI) - 1 : int(LEFT * DPI) + 2].reshape(len(pixels), -1, 3)
    framed = (np.abs(left_edge - ImageColor.getrgb(LIGHT.chosen)).sum(-1) < 12).any(1)
    centres = (TOP * DPI + (np.arange(7) + 0.5) * height / 7).astype(int)
    assert np.flatnonzero(framed[centres]).tolist() == [1, 5]


def test_a_gap_is_no_colour_of_the_scale(values: np.ndarray, tmp_path: Path) -> None:
    values[2, 3] = np.nan
    with Image.open(heat_map(heads(values), "head_impact", tmp_path / "heat.png")) as picture:
        assert tuple(cell_centres(picture, values.shape)[2, 3]) == ImageColor.getrgb(LIGHT.rule)


@pytest.mark.parametrize("shape", [(1, 1), (2, 40), (80, 64)])
def test_models_of_any_size_fit(shape: tuple[int, int], tmp_path: Path) -> None:
    table = heads(np.zeros(shape))
    sizes = []
    for draw in (heat_map, layer_strips):
        with Image.open(draw(table, "head_impact", tmp_path / "chart.png", (0,))) as picture:
            sizes.append(picture.size)
    assert sizes[0] == sizes[1] and sizes[0][0] == round(WIDTH * DPI) and sizes[0][1] <= 9 * DPI


def test_losses_of_one_step_and_of_many(tmp_path: Path) -> None:
    losses = {"top": pl.DataFrame({"step": [0], "loss": [2.0]}), "all": pl.DataFrame({"step": range(300), "loss": np.ones(300)})}
    assert loss_lines(losses, tmp_path / "losses.png").stat().st_size > 0


def test_the_running_mean_is_over_the_steps_so_far() -> None:
    assert running_mean(np.array([4.0, 2.0, 0.0, 6.0]), 2).tolist() == [4.0, 3.0, 1.0, 3.0]
    assert running_mean(np.array([4.0, 2.0]), 1).tolist() == [4.0, 2.0]
