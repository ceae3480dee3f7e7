"""Attention over an image beside the exact mask, as pixels: pure functions from maps, images and masks to pictures."""

from collections.abc import Sequence

import numpy as np
import polars as pl
from jaxtyping import Bool, Float, UInt8
from matplotlib import colormaps
from scipy.ndimage import binary_dilation, binary_erosion

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


def mean_map(attention: pl.DataFrame, heads: Sequence[Head]) -> Float[np.ndarray, "height width"]:
    """The mean attention of some heads on the cells of one example's grid: `map * map_max`, averaged over the heads.

    `attention` holds the rows of one example. Raises ValueError if a head has no row, or a map is not of the grid's size.
    """
    wanted = pl.DataFrame(heads, schema={"layer": pl.Int16, "head": pl.Int16}, orient="row")
    rows = attention.join(wanted, on=["layer", "head"], how="semi", maintain_order="left")
    example_id, height, width = (attention[name][0] for name in ("example_id", "grid_height", "grid_width"))
    lengths = set(rows["map"].list.len())
    if len(rows) != len(heads) or lengths != {height * width}:
        found = f"{len(rows)} maps of {sorted(lengths)} cells"
        raise ValueError(f"{example_id}: {found} for {len(heads)} heads on a grid of {height} x {width}")
    maps = np.stack([np.asarray(values, dtype=np.float64) for values in rows["map"]]) * rows["map_max"].to_numpy()[:, None]
    return maps.mean(axis=0).reshape(height, width)


def enlarge(attention: Float[np.ndarray, "height width"], size: tuple[int, int]) -> Float[np.ndarray, "rows columns"]:
    """The map on (rows, columns) pixels, each with the value of the cell that its centre lies in: no detail that the grid does not have."""
    rows, columns = (((np.arange(side) + 0.5) * cells / side).astype(int) for side, cells in zip(size, attention.shape, strict=True))
    return attention[rows][:, columns]


def share_inside(attention: Float[np.ndarray, "height width"], mask: Bool[np.ndarray, "rows columns"]) -> float:
    """The part of the map's sum that lies on the mask, each cell's attention spread evenly over its pixels; in [0, 1]."""
    spread = enlarge(attention, mask.shape)
    total = float(spread.sum())
    return float(spread[mask].sum()) / total if total > 0 else 0.0


def paint_attention(
    image: UInt8[np.ndarray, "rows columns 3"], attention: Float[np.ndarray, "height width"], mask: Bool[np.ndarray, "rows columns"]
) -> UInt8[np.ndarray, "rows columns 3"]:
    """The image in grey under the map in colour (inferno, from 0 to the map's own maximum), the mask outlined."""
    spread = enlarge(attention, mask.shape)
    level = spread / spread.max() if spread.max() > 0 else spread
    colour = INFERNO[np.rint(level * 255).astype(np.uint8)]
    grey = image.astype(np.float32) @ LUMA
    mixed = 0.4 * grey[..., None] + 0.6 * colour
    return draw_outline(mixed.astype(np.uint8), mask)


def draw_outline(image: UInt8[np.ndarray, "rows columns 3"], mask: Bool[np.ndarray, "rows columns"]) -> UInt8[np.ndarray, "rows columns 3"]:
    """The mask's border in cyan, which inferno does not hold, with a dark rim outside it, so that it shows on any ground."""
    drawn = image.copy()
    drawn[mask & ~binary_erosion(mask, iterations=3, border_value=1)] = CYAN
    drawn[binary_dilation(mask) & ~mask] = 16
    return drawn
