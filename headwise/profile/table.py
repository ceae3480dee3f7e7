"""The profile on disk: written by one step, read by the calibrations that start from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float
from safetensors.numpy import load_file, save_file

from headwise.examples import Example
from headwise.files import read_table, write_table
from headwise.profile.sample import Question
from headwise.profile.schema import COSINES_FILE, SAMPLE, SAMPLE_FILE
from headwise.scores.schema import HEADS, HEADS_FILE

COSINES = "map_cosines"


@dataclass(frozen=True)
class Profiled:
    """What was measured: the rows of heads.parquet and sample.parquet, how alike the heads of all layers look, why examples were left out,
    and the cost in forward passes over the calibration set.
    """

    heads: pl.DataFrame
    sample: pl.DataFrame
    cosines: Float[np.ndarray, "own other"]
    bad: dict[str, str]
    forward_equivalents: dict[str, float]


@dataclass(frozen=True)
class HeadProfile:
    """I-SAL and both causal flows of every head, how alike the heads look, and the calibration set with the model's own answers."""

    isal: Float[np.ndarray, "layer head"]
    caf: Float[np.ndarray, "layer head"]
    caf_signed: Float[np.ndarray, "layer head"]
    cosines: Float[np.ndarray, "own other"]
    sample: Sequence[tuple[Question, str]]


def write_profile(profiled: Profiled, folder: Path) -> None:
    """Write heads.parquet, sample.parquet and cosines.safetensors."""
    write_table(profiled.heads, folder / HEADS_FILE, HEADS)
    write_table(profiled.sample, folder / SAMPLE_FILE, SAMPLE)
    save_file({COSINES: profiled.cosines.astype(np.float32)}, folder / COSINES_FILE)


def read_profile(folder: Path) -> HeadProfile:
    """Read a profile."""
    heads = read_table(folder / HEADS_FILE, HEADS)
    grids = {name: statistic_grid(heads, name) for name in ("isal", "caf", "caf_signed")}
    cosines = load_file(folder / COSINES_FILE)[COSINES].astype(np.float64)
    rows = read_table(folder / SAMPLE_FILE, SAMPLE).iter_rows(named=True)
    return HeadProfile(**grids, cosines=cosines, sample=[(_question(row), str(row["answer"])) for row in rows])


def statistic_grid(heads: pl.DataFrame, statistic: str) -> Float[np.ndarray, "layer head"]:
    """One statistic of heads.parquet by layer and head."""
    rows = heads.filter(pl.col("statistic") == statistic).sort("layer", "head")
    return rows["value"].to_numpy().reshape(rows["layer"].n_unique(), -1)


def _question(row: dict[str, object]) -> Question:
    values = {name: row[name] for name in ("image", "sha256", "task", "question")}
    example = Example(id=str(row["example_id"]), answers=(), phrase=None, split="calibration", **values)  # type: ignore[arg-type]
    return Question(example, blank=bool(row["blank"]))
