"""Which layers are calibrated: those whose heads score highest, and the controls that the choice has to beat."""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import polars as pl
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from headwise.files import read_json, sha256_file, write_json

LayerArm = Literal["top", "bottom", "random", "all"]
SELECTION_FILE = "selection.json"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class Criterion:
    """What ranks the layers, and how many are taken."""

    statistic: Annotated[
        Literal["head_impact", "head_impact_adjusted", "head_impact_nosink", "visual_mass"],
        Field(description="the score of a head; a layer's score is the mean over its heads"),
    ] = "head_impact"
    k: Annotated[int, Field(ge=1, description="number of layers to take")] = 4
    seed: Annotated[int, Field(ge=0, description="seed of the random control")] = 0


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class Selection:
    """The chosen layers of the language model, sorted, 0-based; `scores_sha256` names the table they were chosen by, where it is a file."""

    arm: LayerArm
    criterion: Criterion
    layers: tuple[int, ...]
    num_layers: int
    scores_sha256: str | None = None


def layer_scores(heads: pl.DataFrame, statistic: str) -> list[float]:
    """The mean of a statistic over the heads of each layer, by layer.

    Raises ValueError if the table lacks the statistic, a layer, or the value of a head.
    """
    rows = heads.filter(pl.col("statistic") == statistic).sort("layer", "head")
    if rows.is_empty():
        raise ValueError(f"the scores have no {statistic!r}; they have {heads['statistic'].unique().sort().to_list()}")
    missing = rows.filter(pl.col("value").is_null() | pl.col("value").is_nan())
    if len(missing):
        first = missing.row(0, named=True)
        raise ValueError(f"{statistic} of layer {first['layer']}, head {first['head']} has no value: no example defines it")
    layers = rows["layer"].unique().sort().to_list()
    if layers != list(range(len(layers))):
        raise ValueError(f"the scores skip layers: {statistic} is given for {layers}")
    return [float(np.mean(rows.filter(pl.col("layer") == layer)["value"].to_numpy())) for layer in layers]


def select(heads: pl.DataFrame, criterion: Criterion, arm: LayerArm) -> Selection:
    """Choose k layers by their scores (rows of heads.parquet): the highest, the lowest, k at random among all layers, or all layers.

    Of equal layers the lower one ranks higher, so `top` and `bottom` share no layer while 2 k <= the number of layers. `random` depends on
    the seed alone. Raises ValueError if k exceeds the number of layers, or a score is missing.
    """
    scores = layer_scores(heads, criterion.statistic)
    num_layers = len(scores)
    if arm != "all" and criterion.k > num_layers:
        raise ValueError(f"k = {criterion.k} layers asked for, the model has {num_layers}")
    ranked = sorted(range(num_layers), key=lambda layer: (-scores[layer], layer))
    if arm == "top":
        chosen = ranked[: criterion.k]
    elif arm == "bottom":
        chosen = ranked[-criterion.k :]
    elif arm == "random":
        chosen = np.random.default_rng(criterion.seed).choice(num_layers, size=criterion.k, replace=False).tolist()
    else:
        chosen = ranked
    return Selection(arm=arm, criterion=criterion, layers=tuple(sorted(chosen)), num_layers=num_layers)


def write_selection(selection: Selection, scores: Path, path: Path) -> None:
    """Write selection.json with the digest of the score table it came from."""
    content = TypeAdapter(Selection).dump_python(selection, mode="json")
    write_json({**content, "scores_sha256": sha256_file(scores)}, path)


def read_selection(path: Path) -> Selection:
    """Read selection.json. Raises ValueError if a field is missing, unknown or of another type."""
    return TypeAdapter(Selection).validate_python(read_json(path))
