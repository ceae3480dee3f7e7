"""The attention table: one row per example, layer and head."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from headwise.attention.observe import Observed
from headwise.attention.schema import ATTENTION, MAPS, SCALARS, VIEW

KEY = ("example_id", "layer", "head")


def part_writer(path: Path) -> pq.ParquetWriter:
    """A writer of row groups of this table. Ids and views repeat: dictionaries of the maps' values would make reading 3.5 times slower."""
    repeated = ["example_id", *(f"views.list.element.{field.name}" for field in VIEW)]
    return pq.ParquetWriter(path, ATTENTION, compression="zstd", use_dictionary=repeated)  # pyright: ignore[reportArgumentType]


def to_table(observed: Observed, example_ids: Sequence[str]) -> pa.Table:
    """The rows of a batch's examples, in the batch's order, by layer and head."""
    examples, layers, heads = observed.scalars[SCALARS[0]].shape
    assert len(example_ids) == examples
    example, layer, head = (index.reshape(-1) for index in np.indices((examples, layers, heads)))
    views = pa.array([[asdict(view) for view in layout or ()] for layout in observed.layouts], type=ATTENTION.field("views").type)
    columns: dict[str, pa.Array | np.ndarray | list[str]] = {
        "example_id": [example_ids[i] for i in example],
        "layer": layer,
        "head": head,
        "views": views.take(pa.array(example)),
    }
    for name in MAPS:
        columns[name], columns[f"{name}_max"] = _scaled(observed.maps[name])
    columns |= {name: observed.scalars[name].reshape(-1) for name in SCALARS}
    return pa.table({field.name: pa.array(columns[field.name]).cast(field.type) for field in ATTENTION}, schema=ATTENTION)


def _scaled(maps: Sequence[Float[np.ndarray, "layer head _"]]) -> tuple[pa.ListArray, Float[np.ndarray, "row"]]:
    """Each map over its maximum in fp16, and the maxima."""
    highest = [map_.max(axis=-1, keepdims=True, initial=0) for map_ in maps]
    scaled = [map_ / np.where(top > 0, top, 1) for map_, top in zip(maps, highest, strict=True)]
    lengths = np.concatenate([np.full(map_.shape[0] * map_.shape[1], map_.shape[2]) for map_ in maps])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = np.concatenate([map_.reshape(-1) for map_ in scaled]).astype(np.float16)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)), np.concatenate([top.reshape(-1) for top in highest])


def merge(parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Parts of the table as one, sorted by example id, layer and head; rows that a retry gave twice are kept once, the first."""
    return pl.concat(parts).unique(subset=KEY, keep="first", maintain_order=True).sort(KEY)
