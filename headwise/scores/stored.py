"""Read stored attention one example at a time, in the order of example ids, in memory that does not grow with their number."""

import heapq
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float32, Float64

from headwise.attention.schema import SCALARS, read_layout
from headwise.layout import Layout

BLOCK_ROWS = 8_192
"""Rows that are read at once: under 2 MB of 100-token maps."""
MAP = ["example_id", "layer", "head", "map"]
NUMBERS = ["map_max", *SCALARS]
VIEWS = "views"


@dataclass(frozen=True)
class StoredExample:
    """What attention stored of one example, rows in the order of (layer, head).

    maps: attention to each visual token, mean over the answer's rows, divided by its maximum; widened from 16 bit to double. What a
    threshold does not need is read only if asked for: layout, where the visual tokens lie on the image (None without one, too); highest,
    the maxima that the maps were divided by; scalars, the columns named in `SCALARS`, in that order.
    """

    example_id: str
    maps: Float64[np.ndarray, "row visual"]
    layout: Layout | None
    highest: Float32[np.ndarray, "row"] | None
    scalars: Float32[np.ndarray, "row statistic"] | None


@dataclass(frozen=True)
class Heads:
    """How many layers and heads a model has; every example has one row for each pair."""

    num_layers: int
    num_heads: int

    @property
    def rows(self) -> int:
        """Rows per example."""
        return self.num_layers * self.num_heads


def count_heads(parts: Sequence[Path]) -> Heads:
    """The layers and heads of the parts' examples, from the files' footers alone.

    Raises ValueError if no part has a row, or a part was written without statistics.
    """
    for part in parts:
        metadata = _open(part).metadata
        if metadata.num_rows:
            return Heads(*(_highest(metadata, name, part) + 1 for name in ("layer", "head")))
    raise ValueError(f"no attention is stored in {[str(part) for part in parts]}")


def _highest(metadata: pq.FileMetaData, name: str, part: Path) -> int:
    """The largest value of a column over all row groups."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [group.column(metadata.schema.names.index(name)).statistics for group in groups if group.num_rows]
    if not all(chunk is not None and chunk.has_min_max for chunk in chunks):
        raise ValueError(f"{part}: no statistics of column {name!r} in the file; run the attention step again")
    return max(chunk.max for chunk in chunks)


def stored_examples(parts: Sequence[Path], heads: Heads, *, maps_only: bool = False) -> Iterator[StoredExample]:
    """Every example of the parts once, in the order of ids, so that results do not depend on how the examples were shared out.

    Raises ValueError if a part is not sorted, an example lacks rows, or a map does not fit its views or is not finite.
    """
    last = None
    for example in heapq.merge(*(_read_part(part, heads, maps_only) for part in parts), key=lambda example: example.example_id):
        if example.example_id != last:  # a shard that was observed twice counts once
            yield example
        last = example.example_id


def _open(part: Path) -> pq.ParquetFile:
    """Raises ValueError if the file is broken or lacks a column."""
    try:
        file = pq.ParquetFile(part, buffer_size=1 << 20, pre_buffer=False)  # column chunks are streamed, however long
    except pa.ArrowInvalid as error:
        raise ValueError(f"{part}: not a readable Parquet file ({error})") from error
    missing = {*MAP, VIEWS, *NUMBERS} - set(file.schema_arrow.names)
    if missing:
        raise ValueError(f"{part}: missing columns {sorted(missing)}")
    return file


def _read_part(part: Path, heads: Heads, maps_only: bool) -> Iterator[StoredExample]:
    """The examples of one part; the file is read as a stream, whatever the size of its row groups."""
    columns = MAP if maps_only else [*MAP, VIEWS, *NUMBERS]
    file = _open(part)
    held: pa.Table | None = None
    last = ""
    for batch in _ahead(file.iter_batches(batch_size=max(1, BLOCK_ROWS // heads.rows) * heads.rows, columns=columns)):
        fresh = pa.Table.from_batches([batch])
        table = fresh if held is None else pa.concat_tables([held, fresh])
        whole = table.num_rows // heads.rows * heads.rows
        for example in _split(table.slice(0, whole).combine_chunks(), heads, part) if whole else ():
            if example.example_id <= last:
                raise ValueError(f"{part}: {example.example_id!r} comes after {last!r}; the rows must be sorted by example_id")
            last = example.example_id
            yield example
        held = table.slice(whole)
    if held is not None and held.num_rows:
        found = f"{held.num_rows} of its {heads.rows} rows ({heads.num_layers} layers x {heads.num_heads} heads)"
        raise ValueError(f"{part}: {held['example_id'][0].as_py()!r} has {found}; was the attention step interrupted?")


def _ahead(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The batches; the next one is decoded in a thread while this one is worked on."""
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = reader.submit(next, batches, None)
            yield batch


def _split(table: pa.Table, heads: Heads, part: Path) -> Iterator[StoredExample]:
    """The examples of a table of one chunk that holds whole examples."""
    ids = _example_ids(table, heads, part)
    maps = table["map"].chunk(0)
    lengths = maps.value_lengths().to_numpy().reshape(-1, heads.rows)
    values, stops = torch.from_dlpack(maps.flatten()), lengths.sum(axis=1).cumsum()  # torch widens 16 bit five times faster than numpy
    rest = _rest(table, heads) if VIEWS in table.column_names else None
    for index, example_id in enumerate(ids):
        tokens = int(lengths[index, 0])
        if (lengths[index] != tokens).any():
            raise ValueError(f"{part}: {example_id!r} has maps of unlike lengths: {sorted(set(lengths[index].tolist()))} visual tokens")
        example = values[stops[index] - heads.rows * tokens : stops[index]].view(heads.rows, tokens).double().numpy()
        if not np.isfinite(example.sum()):
            raise ValueError(f"{part}: {example_id!r} has a map that is not finite")
        if rest is None:
            yield StoredExample(example_id, example, None, None, None)
        else:
            views, numbers = rest[0][index], rest[1][index]
            yield StoredExample(example_id, example, _layout(views, tokens, example_id, part), numbers[:, 0], numbers[:, 1:])


def _rest(table: pa.Table, heads: Heads) -> tuple[list[list[dict[str, Any]]], Float32[np.ndarray, "example row column"]]:
    """What is read beside the maps: each example's views, of which its first row stands for all, and its `NUMBERS`."""
    views = table[VIEWS].take(pa.array(np.arange(0, table.num_rows, heads.rows))).to_pylist()
    numbers = np.stack([table[name].to_numpy() for name in NUMBERS], axis=1)
    return views, numbers.reshape(-1, heads.rows, len(NUMBERS))


def _layout(views: list[dict[str, Any]], tokens: int, example_id: str, part: Path) -> Layout | None:
    try:
        return read_layout(views, tokens)
    except ValueError as error:
        raise ValueError(f"{part}: {example_id!r} has {error}") from error


def _example_ids(table: pa.Table, heads: Heads, part: Path) -> list[str]:
    """The id of each run of `heads.rows` rows. Raises ValueError if a run is not one example's rows in the order of (layer, head)."""
    frame = pl.from_arrow(table.select(["example_id", "layer", "head"]))
    assert isinstance(frame, pl.DataFrame)
    ids = frame["example_id"].gather_every(heads.rows)
    layers, numbers = np.divmod(np.arange(heads.rows), heads.num_heads)
    expected = {"layer": np.tile(layers, len(ids)), "head": np.tile(numbers, len(ids))}
    same = (frame["example_id"] == ids.gather(np.repeat(np.arange(len(ids)), heads.rows))).to_numpy()
    for name, numbers in expected.items():
        same = same & (frame[name].to_numpy() == numbers)
    if not same.all():
        wrong = frame["example_id"][int(np.argmin(same))]
        raise ValueError(f"{part}: {wrong!r} does not have one row per layer and head, in order ({heads.num_layers} x {heads.num_heads})")
    return ids.to_list()
