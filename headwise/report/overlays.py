"""Attention over an image beside the exact mask, as pixels: pure functions from maps, images and masks to pictures."""

from collections.abc import Sequence

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, Int, UInt8
from matplotlib import colormaps
from scipy.ndimage import binary_dilation, binary_erosion

from headwise.attention.schema import read_layout
from headwise.layout import Layout

Head = tuple[int, int]
"""(layer, head), 0-based."""

INFERNO = np.asarray(colormaps["inferno"](np.arange(256))[:, :3] * 255, dtype=np.float32)
"""Perceptually uniform: equal steps of attention are equal steps for the eye."""

CYAN = (0, 229, 255)
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Grey from red, green and blue (ITU-R BT.601)."""


def rank_heads(heads: pl.DataFrame, statistic: str, layers: Sequence[int], num: int, *, best: bool) -> list[Head]:
    """The `num` heads of these layers with the highest (or lowest) value of the statistic; ties go to the earlier head."""
    rows = heads.filter((pl.col("statistic") == statistic) & pl.col("layer").is_in(list(layers)) & pl.col("value").is_not_nan())
    rows = rows.sort(["value", "layer", "head"], descending=[best, False, False]).head(num)
    return [(int(layer), int(head)) for layer, head in rows.select("layer", "head").iter_rows()]


def mean_map(attention: pl.DataFrame, heads: Sequence[Head], size: tuple[int, int]) -> Float[np.ndarray, "rows columns"]:
    """The mean attention of some heads, `map * map_max`, over one example's image of (rows, columns) pixels, as a `density`.

    `attention` holds the rows of one example. Raises ValueError if a head has no row, or a map does not fit the example's views.
    """
    wanted = pl.DataFrame(heads, schema={"layer": pl.Int16, "head": pl.Int16}, orient="row")
    rows = attention.join(wanted, on=["layer", "head"], how="semi", maintain_order="left")
    example_id, lengths = attention["example_id"][0], sorted(set(rows["map"].list.len()))
    if len(rows) != len(heads) or len(lengths) != 1:
        raise ValueError(f"{example_id}: {len(rows)} maps of {lengths} visual tokens for {len(heads)} heads")
    try:
        layout = read_layout(attention["views"][0].to_list(), lengths[0])
    except ValueError as error:
        raise ValueError(f"{example_id}: {error}") from error
    maps = np.stack([np.asarray(values, dtype=np.float64) for values in rows["map"]]) * rows["map_max"].to_numpy()[:, None]
    return density(maps.mean(axis=0), layout or (), size)


def density(attention: Float[np.ndarray, "visual"], layout: Layout, size: tuple[int, int]) -> Float[np.ndarray, "rows columns"]:
    """Attention as a density over an image of (rows, columns) pixels: every cell's is spread over its region, and the views add up.

    A pixel takes the value of the cell that its centre lies in: no detail that the views do not have. The unit is the attention of a cell
    of the first view's size, so that a view of the whole image shows its attention as it is. What lies outside the image is not drawn.
    """
    spread, start = np.zeros(size), 0
    for view in layout:
        weight = (view.cells / view.area) / (layout[0].cells / layout[0].area)
        cells = attention[start : start + view.cells].reshape(view.rows, view.columns) * weight
        start += view.cells
        rows, row_cells = _pixels(size[0], view.rows, view.top, view.bottom)
        columns, column_cells = _pixels(size[1], view.columns, view.left, view.right)
        spread[rows, columns] += cells[row_cells][:, column_cells]
    return spread


def _pixels(side: int, cells: int, start: float, stop: float) -> tuple[slice, Int[np.ndarray, "pixel"]]:
    """The pixels whose centres lie between start and stop (two tiles never share one), and the cell that each lies in."""
    centres = np.arange(side) + 0.5
    first, last = np.searchsorted(centres, [start * side, stop * side])
    place = (centres[first:last] - start * side) * cells / (side * (stop - start))
    return slice(first, last), np.minimum(place.astype(int), cells - 1)


def share_inside(spread: Float[np.ndarray, "rows columns"], mask: Bool[np.ndarray, "rows columns"]) -> float:
    """The part of a density's sum that lies on the mask; in [0, 1]."""
    total = float(spread.sum())
    return float(spread[mask].sum()) / total if total > 0 else 0.0


def paint_attention(
    image: UInt8[np.ndarray, "rows columns 3"], spread: Float[np.ndarray, "rows columns"], mask: Bool[np.ndarray, "rows columns"]
) -> UInt8[np.ndarray, "rows columns 3"]:
    """The image in grey under the density in colour (inferno, from 0 to its own maximum), the mask outlined."""
    level = spread / spread.max() if spread.max() > 0 else spread
    colour = INFERNO[np.rint(level * 255).astype(np.uint8)]
    grey = image.astype(np.float32) @ LUMA
    mixed = 0.4 * grey[..., None] + 0.6 * colour
    return draw_outline(mixed.astype(np.uint8), mask)


def draw_outline(
    image: UInt8[np.ndarray, "rows columns 3"], mask: Bool[np.ndarray, "rows columns"], colour: tuple[int, int, int] = CYAN
) -> UInt8[np.ndarray, "rows columns 3"]:
    """The mask's border, in cyan, which inferno does not hold, with a dark rim outside it, so that it shows on any ground."""
    drawn = image.copy()
    drawn[mask & ~binary_erosion(mask, iterations=3, border_value=1)] = colour
    drawn[binary_dilation(mask) & ~mask] = 16
    return drawn
