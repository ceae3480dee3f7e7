"""Stored attention and masks made up by hand, written as the steps would write them; no model."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from headwise.attention.schema import ATTENTION, SCALARS
from headwise.layout import Layout, View
from headwise.masks.rle import encode
from headwise.masks.table import MASKS


def stored(maps: np.ndarray) -> np.ndarray:
    """Maps as the attention step stores them: divided by their maximum, 16 bit."""
    return (maps / maps.max(axis=-1, keepdims=True)).astype(np.float16)


def one_view(*grid: int) -> Layout:
    """One view of the whole image, of these rows and columns."""
    return (View(*grid),)


def attention_table(maps: Mapping[str, np.ndarray], layouts: Mapping[str, Layout], scalars: Mapping[str, np.ndarray]) -> pa.Table:
    """maps: per example (layer, head, visual), as stored; scalars: per example (layer, head, statistic in the order of SCALARS)."""
    rows = [
        {
            **{"example_id": example_id, "layer": layer, "head": head, "views": [asdict(view) for view in layouts[example_id]]},
            "map": maps[example_id][layer, head],
            "map_max": highest(example_id, layer, head),
            "text_image_map": maps[example_id][layer, head],
            "text_image_map_max": 0.5,
            **dict(zip(SCALARS, scalars[example_id][layer, head].tolist(), strict=True)),
        }
        for example_id in sorted(maps)
        for layer, head in np.ndindex(maps[example_id].shape[:2])
    ]
    columns = {name: [row[name] for row in rows] for name in ATTENTION.names}
    return pa.table({name: pa.array(columns[name], type=ATTENTION.field(name).type) for name in ATTENTION.names}, schema=ATTENTION)


def write_part(
    path: Path, maps: Mapping[str, np.ndarray], layout: Layout | Mapping[str, Layout], row_group_size: int | None = None
) -> Path:
    """One shard's part.parquet, its scalars drawn from the ids; one layout for all examples, or one for each."""
    layouts = layout if isinstance(layout, Mapping) else dict.fromkeys(maps, layout)
    path.parent.mkdir(parents=True, exist_ok=True)
    scalars = {example_id: draw_scalars(example_id, maps[example_id].shape[:2]) for example_id in maps}
    pq.write_table(attention_table(maps, layouts, scalars), path, row_group_size=row_group_size)
    return path


def highest(example_id: str, layer: int, head: int) -> float:
    """A made-up maximum of a map, another for each, exact in 32 bit."""
    return (1 + (len(example_id) + 3 * layer + 5 * head + sum(example_id.encode())) % 7) / 8


def draw_scalars(example_id: str, shape: tuple[int, ...]) -> np.ndarray:
    """The made-up scalar statistics of one example, (layer, head, statistic)."""
    rng = np.random.default_rng(list(example_id.encode()))
    return rng.random((*shape, len(SCALARS))).astype(np.float32)


def mask_row(example_id: str, mask: np.ndarray, **changes: object) -> dict[str, object]:
    """A row of masks.parquet: the key object of an image of its own, usable, unless `changes` say otherwise."""
    height, width = mask.shape
    row = {
        "example_id": example_id,
        "image": f"{example_id}.png",
        "object": 0,
        "phrase": "thing",
        "key": True,
        "height": height,
        "width": width,
        "box": [0.0] * 4,
    }
    return row | {"rle": encode(mask), "predicted_iou": None, "area": float(mask.mean()), "source": "exact", "reason": None} | changes


def mask_frame(rows: Sequence[dict[str, object]]) -> pl.DataFrame:
    """Rows of masks.parquet as a frame."""
    frame = pl.from_arrow(pa.Table.from_pylist(list(rows), schema=MASKS))
    assert isinstance(frame, pl.DataFrame)
    return frame


def square(grid: tuple[int, int], row: int, column: int, side: int, cell: int = 4) -> np.ndarray:
    """A pixel mask that covers side x side cells of the grid exactly; a cell is `cell` pixels wide."""
    mask = np.zeros((grid[0] * cell, grid[1] * cell), dtype=bool)
    mask[row * cell : (row + side) * cell, column * cell : (column + side) * cell] = True
    return mask


def look_at(mask: np.ndarray, grid: tuple[int, int], rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Maps (layer, head, visual) of noise, layer 1's raised where the mask is."""
    tokens = mask.reshape(grid[0], mask.shape[0] // grid[0], grid[1], -1).mean(axis=(1, 3)).reshape(-1) > 0.5
    maps = rng.uniform(0.1, 0.3, size=(*shape, tokens.size))
    maps[1] += 3.0 * tokens
    return stored(maps)
