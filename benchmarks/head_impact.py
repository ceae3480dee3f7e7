"""Head Impact from a Parquet file under another threshold: the obvious loop over maps against headwise, without a model. Both work on one
core; ours decodes the next block of the file in a second thread meanwhile.

`python benchmarks/head_impact.py [EXAMPLES]` prints one JSON line last. Both sides do the same: HI, chance against the same other masks,
and HI without sinks, under one threshold. Ours also ranks the layers under the other thresholds, reads the file twice (sinks, scores) and
decodes a mask for every two examples inside the measured time; the loop is given sinks and masks. The whole of `score_heads`, with its
resampled images, rank tests and the table of the examples' scores, is a figure of its own. Per core second = of the process's own CPU
time, which a busy machine disturbs less than the clock on the wall.
"""

# ruff: noqa: E402  the numbers of threads are read when numpy and torch are imported
import json
import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from headwise.attention.schema import ATTENTION
from headwise.attention.table import part_writer
from headwise.files import read_table, write_table
from headwise.layout import View
from headwise.masks.rle import encode
from headwise.masks.table import MASKS
from headwise.scores.head_impact import HeadImpact
from headwise.scores.impacts import OtherMasks, head_impacts, other_masks, survey
from headwise.scores.schema import EXAMPLES_FILE
from headwise.scores.scoring import score_heads
from headwise.scores.sink_tokens import sink_tokens
from headwise.scores.stored import count_heads
from headwise.scores.token_masks import Target, token_masks

LAYERS, HEADS, SIDE, PIXELS = 30, 9, 10, 320
VISUAL, ROWS = SIDE * SIDE, LAYERS * HEADS
LAYOUT = (View(SIDE, SIDE),)
SAMPLE, RUNS = 6, 5
SETTINGS = HeadImpact(threshold="mean_plus_std", threshold_value=0.5)


def write_attention(path: Path, ids: list[str], rng: np.random.Generator) -> None:
    rows = len(ids) * ROWS
    maps = rng.lognormal(size=(rows, VISUAL)).astype(np.float32)
    maps[:, 90] *= 20  # a sink in the lower left corner
    maps = (maps / maps.max(axis=1, keepdims=True)).astype(np.float16).reshape(-1)
    lists = pa.ListArray.from_arrays(np.arange(0, rows * VISUAL + 1, VISUAL, dtype=np.int32), pa.array(maps))
    layers, heads = np.divmod(np.tile(np.arange(ROWS), len(ids)), HEADS)
    places = {"example_id": np.repeat(ids, ROWS), "layer": layers, "head": heads}
    views = pa.array([[asdict(view) for view in LAYOUT]], ATTENTION.field("views").type).take(pa.array(np.zeros(rows, dtype=np.int64)))
    scalars = {name: rng.random(rows) for name in ATTENTION.names if name not in places}
    arrays = {name: lists if name.endswith("map") else pa.array((places | scalars)[name]) for name in ATTENTION.names if name != "views"}
    table = pa.table({**arrays, "views": views}).select(ATTENTION.names).cast(ATTENTION)
    with part_writer(path) as writer:
        writer.write_table(table, row_group_size=64 * ROWS)


def write_masks(path: Path, ids: list[str], rng: np.random.Generator) -> pl.DataFrame:
    """An image with an ellipse for every two examples."""
    rows, ys, xs = [], *np.mgrid[:PIXELS, :PIXELS]
    for first in range(0, len(ids), 2):
        (x, y), (a, b) = rng.integers(60, 260, size=2), rng.integers(30, 60, size=2)
        mask = ((xs - x) / a) ** 2 + ((ys - y) / b) ** 2 < 1
        row = {"object": 0, "phrase": "thing", "key": True, "height": PIXELS, "width": PIXELS, "box": [0.0] * 4, "rle": encode(mask)}
        row |= {"image": f"{first}.png", "predicted_iou": None, "area": float(mask.mean()), "source": "exact", "reason": None}
        rows += [{"example_id": example_id, **row} for example_id in ids[first : first + 2]]
    write_table(pa.Table.from_pylist(rows, schema=MASKS), path, MASKS)
    return read_table(path, MASKS)


def ours(part: Path, masks: pl.DataFrame) -> np.ndarray:
    heads = count_heads([part])
    found = survey([part], heads)
    targets = token_masks(masks, found.layouts, SETTINGS).examples
    blocks = [np.stack([b.head_impact, b.chance, b.nosink], axis=-1) for b in head_impacts([part], heads, found, targets, SETTINGS)]
    return np.concatenate(blocks)


def whole(part: Path, masks: pl.DataFrame) -> np.ndarray:
    examples = part.with_name(EXAMPLES_FILE)
    score_heads([part], masks, SETTINGS, examples)
    table = pq.read_table(examples, columns=["head_impact", "chance", "head_impact_nosink"])
    return np.stack([column.to_numpy() for column in table.columns], axis=-1).reshape(-1, ROWS, 3)


def obvious(part: Path, examples: int, targets: Mapping[str, Target], others: OtherMasks, sinks: np.ndarray) -> np.ndarray:
    """Map by map, as the formula reads; the masks are given."""
    batch = next(pq.ParquetFile(part).iter_batches(batch_size=examples * ROWS, columns=["example_id", "map"]))
    scores = []
    for example_id, values in zip(batch["example_id"].to_pylist(), batch["map"].to_pylist(), strict=True):
        map_, target = np.array(values, dtype=np.float64), targets[example_id]
        looked = above(map_)
        elsewhere = [mask for image, mask in zip(others.images, others.masks, strict=True) if image != target.image]
        chance = np.mean([jaccard(looked, mask) for mask in elsewhere])
        scores.append((jaccard(looked, target.tokens), chance, jaccard(above(map_[~sinks]), target.tokens[~sinks])))
    return np.array(scores).reshape(examples, ROWS, 3)


def above(map_: np.ndarray) -> np.ndarray:
    return map_ > map_.mean() + SETTINGS.threshold_value * map_.std()


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))


def timed(function: Callable[[], np.ndarray]) -> tuple[float, float, np.ndarray]:
    wall, core = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - wall, time.process_time() - core, result


def main(examples: int) -> None:
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    rng = np.random.default_rng(0)
    ids = [f"example-{i:06d}" for i in range(examples)]
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.parquet"
        write_attention(part, ids, rng)
        masks = write_masks(Path(folder) / "masks.parquet", ids, rng)
        found = survey([part], count_heads([part]))
        targets = token_masks(masks, found.layouts, SETTINGS).examples
        sinks = sink_tokens(found.mean_maps[LAYOUT], LAYOUT, SETTINGS.sink_fence)
        others = other_masks(targets, found.layouts, SETTINGS)[LAYOUT]
        ours(part, masks)  # imports and caches
        whole(part, masks)
        sides = (lambda: ours(part, masks), lambda: obvious(part, SAMPLE, targets, others, sinks), lambda: whole(part, masks))
        runs = [[timed(side) for side in sides] for _ in range(RUNS)]
    difference = float(max(np.abs(runs[0][side][2][:SAMPLE] - runs[0][1][2]).max() for side in (0, 2)))
    assert difference < 1e-6, difference
    wall, core = statistics.median(run[0][0] for run in runs), statistics.median(run[0][1] for run in runs)
    whole_core = statistics.median(run[2][1] for run in runs)
    slow_wall, slow_core = statistics.median(run[1][0] for run in runs), statistics.median(run[1][1] for run in runs)
    result = {
        "maps": examples * ROWS,
        "visual_tokens": VISUAL,
        "headwise_maps_per_second": round(examples * ROWS / wall),
        "headwise_maps_per_core_second": round(examples * ROWS / core),
        "whole_step_maps_per_core_second": round(examples * ROWS / whole_core),
        "loop_maps_per_second": round(SAMPLE * ROWS / slow_wall),
        "loop_maps_per_core_second": round(SAMPLE * ROWS / slow_core),
        "times_faster": round(slow_core / (SAMPLE * ROWS) / (core / (examples * ROWS)), 1),
        "largest_difference": difference,
        "runs": RUNS,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
