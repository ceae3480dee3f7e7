"""What a stage's outputs say in a few numbers: metrics for MLflow, and the rows of a table for a reader."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import polars as pl

from flows.graph import flatten
from headwise.attention.schema import PART
from headwise.calibration.rah_lora.schema import TARGETS, TARGETS_FILE
from headwise.evaluation.table import METRICS_FILE
from headwise.examples import EXAMPLES, INDEX
from headwise.files import read_json, read_table
from headwise.masks.table import plain_reason, read_masks, written_shards
from headwise.profile.schema import PROFILE_FILE
from headwise.scores.schema import HEADS, HEADS_FILE, TESTS_FILE
from headwise.selection import SELECTION_FILE

Rows = list[dict[str, object]]
METRICS = {"scores": TESTS_FILE, **dict.fromkeys(("calibration", "rah_lora", "zerotuning"), "calibration.json"), "profile": PROFILE_FILE}
"""Where a stage's metrics are, if not in metrics.json; what else lies in its folder is settings."""


def stage_metrics(name: str, outputs: Iterable[Path]) -> dict[str, float]:
    """Every finite number in the file of metrics that the stage wrote, under its dotted name; none where it wrote no such file."""
    files = [output / METRICS.get(name.partition("@")[0], METRICS_FILE) for output in outputs]
    pairs = [pair for file in files if file.is_file() for pair in flatten(read_json(file))]
    return {key: float(value) for key, value in pairs if isinstance(value, (int, float)) and math.isfinite(value)}


def stage_table(name: str, outputs: Iterable[Path]) -> Rows:
    """The rows that describe a stage: counts, scores per layer or metrics per task; for other stages its metrics."""
    folders = list(outputs)
    describe = TABLES.get(name.partition("@")[0])
    if describe is None or not folders:
        return [{"quantity": key, "value": value} for key, value in stage_metrics(name, folders).items()]
    return describe(folders[0])


def _images(folder: Path) -> Rows:
    index = read_table(folder / INDEX, EXAMPLES)
    counts = index.group_by("split", "task").agg(examples=pl.len(), images=pl.col("image").n_unique())
    return counts.sort("split", "task").to_dicts()


def mask_states(folder: Path) -> Rows:
    """How many masks of all shards are usable, and how many are not, by the reason."""
    return _states(read_masks(written_shards(folder)))


def _masks(folder: Path) -> Rows:
    return _states(read_masks([folder]))


def _cause(reason: str) -> str:
    return plain_reason(reason).partition(":")[0]


def _states(masks: pl.DataFrame) -> Rows:
    reason = pl.col("reason").map_elements(_cause, return_dtype=pl.String).fill_null("usable")
    counts = masks.group_by(reason.alias("state")).agg(rows=pl.len(), mean_area=pl.col("area").cast(pl.Float64).mean().round(4))
    return counts.sort("rows", descending=True).to_dicts()


def _attention(folder: Path) -> Rows:
    """Per layer, where the answers' attention falls."""
    masses = ("visual_mass", "text_mass", "system_mass", "initial_mass")
    rows = pl.scan_parquet(folder / PART).group_by("layer")
    counts = rows.agg(pl.col("example_id").n_unique().alias("examples"), *(pl.col(name).mean().round(4) for name in masses))
    return counts.sort("layer").collect().to_dicts()


def _scores(folder: Path) -> Rows:
    heads = read_table(folder / HEADS_FILE, HEADS)
    return heads.pivot(on="statistic", index="layer", values="value", aggregate_function="mean").sort("layer").to_dicts()


def _evaluation(folder: Path) -> Rows:
    metrics = read_json(folder / METRICS_FILE)
    rows: Rows = []
    for split, content in sorted(metrics.items()):
        assert isinstance(content, Mapping)
        rows.append({"split": split, "task": "all", **{key: value for key, value in content.items() if key != "tasks"}})
        tasks: Mapping[str, Mapping[str, object]] = content.get("tasks", {})
        rows += [{"split": split, "task": task, **values} for task, values in sorted(tasks.items())]
    return rows


def _selection(folder: Path) -> Rows:
    selection = read_json(folder / SELECTION_FILE)
    return [{key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in selection.items()}]


def _targets(folder: Path) -> Rows:
    """The calibrated heads, one by one."""
    columns = ("layer", "head", "isal", "caf", "gap", "outcome", "reason", "effective_rank", "alpha", "kl_before", "kl_after")
    return read_table(folder / TARGETS_FILE, TARGETS).select(columns).to_dicts()


TABLES: dict[str, Callable[[Path], Rows]] = {
    "images": _images,
    "masks": _masks,
    "attention": _attention,
    "scores": _scores,
    "profile": _scores,
    "rah_lora": _targets,
    "selection": _selection,
    "evaluation": _evaluation,
    "baseline": _evaluation,
    "benchmark": _evaluation,
    "benchmark_base": _evaluation,
}
