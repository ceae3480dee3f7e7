"""All judged runs in one table: a row per run, arm, split, metric and task, each arm against the model as it was."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pyarrow as pa

from flows.environment import state
from flows.parameters import Parameters, data_name, model_name
from flows.pipeline import Pipeline
from headwise.evaluation.compare import SCALES, Comparison
from headwise.evaluation.table import BASE, answer_folders
from headwise.files import MANIFEST, read_json, read_table, write_table

LEADERBOARD = pa.schema(
    [
        ("time", pa.timestamp("s", "UTC")),
        ("run", pa.string()),
        ("mlflow_run", pa.string()),
        ("commit", pa.string()),
        ("model", pa.string()),
        ("data", pa.string()),
        ("arm", pa.string()),
        ("split", pa.string()),
        ("metric", pa.string()),
        ("task", pa.string()),
        ("before", pa.float64()),
        ("after", pa.float64()),
        ("effect", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("detectable", pa.float64()),
        ("p_value", pa.float64()),
        ("p_holm", pa.float64()),
        ("p_mcnemar", pa.float64()),
        ("p_not_worse", pa.float64()),
        ("p_equivalent", pa.float64()),
        ("verdict", pa.string()),
        ("num_examples", pa.int32()),
        ("num_images", pa.int32()),
        ("protocol", pa.string()),
    ]
)
"""One file per MLflow run: runs that end together do not wait for each other. `protocol`: of a benchmark; `task` null: a headline."""
COLUMNS = ("time", "run", "model", "arm", "split", "metric", "questions", "before", "after", "95 % interval", "verdict")


def record(pipeline: Pipeline, settings: Parameters, comparisons: Mapping[str, Sequence[Comparison]]) -> Path:
    """Write the run's rows to `.headwise/leaderboard/MLFLOW_RUN.parquet`."""
    protocols = _protocols(pipeline.workspace.folder / "data")
    same = {
        "time": datetime.now(UTC).replace(microsecond=0),
        "run": pipeline.workspace.name,
        "mlflow_run": pipeline.record.run_id,
        "commit": pipeline.workspace.commit,
        "model": model_name(settings.attention.model),
        "data": data_name(settings.images),
    }
    rows = [
        {**same, "arm": arm, "protocol": protocols.get(comparison.split), **_figures(comparison)}
        for arm, own in comparisons.items()
        for comparison in own
    ]
    path = _folder() / f"{pipeline.record.run_id}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(pa.Table.from_pylist(rows, schema=LEADERBOARD), path, LEADERBOARD)
    return path


def read_leaderboard() -> pl.DataFrame:
    """The rows of all runs, the latest first. Raises ValueError if no run has been judged."""
    files = sorted(_folder().glob("*.parquet"))
    if not files:
        raise ValueError("no run has been judged yet: start with `headwise run`")
    return pl.concat([read_table(file, LEADERBOARD) for file in files]).sort("time", "run", "arm", descending=[True, False, False])


def ranked(split: str | None, metric: str | None, *, tasks: bool) -> tuple[pl.DataFrame, list[tuple[str, ...]]]:
    """The leaderboard's rows of a split and a metric (None: all), the best effect of each first; and as cells of COLUMNS.

    tasks: the tasks' rows too, named beside the split. Raises ValueError naming the splits or metrics that there are.
    """
    board = read_leaderboard()
    for column, wanted in (("split", split), ("metric", metric)):
        if wanted and wanted not in (known := board[column].unique().sort().to_list()):
            raise ValueError(f"no {column} {wanted!r}; there are {', '.join(known)}")
        board = board.filter(pl.col(column) == wanted) if wanted else board
    board = board if tasks else board.filter(pl.col("task").is_null())
    better = pl.col("metric").replace_strict({name: scale.better for name, scale in SCALES.items()}, return_dtype=pl.Int8)
    board = board.sort(pl.col("split"), pl.col("metric"), pl.col("task"), -better * pl.col("effect"), nulls_last=False)
    return board, [_cells(row) for row in board.iter_rows(named=True)]


def _cells(row: Mapping[str, object]) -> tuple[str, ...]:
    split = f"{row['split']}, {row['task']}" if row["task"] else str(row["split"])
    changed = row["metric"] == "perplexity" or row["low"] != 0 or row["high"] != 0
    interval = f"{row['low']:.4g} to {row['high']:.4g}" if changed else "no answer changed"
    figures = (str(row["num_examples"]), f"{row['before']:.4g}", f"{row['after']:.4g}", interval)
    who = (f"{row['time']:%Y-%m-%d %H:%M}", *(str(row[name]) for name in ("run", "model", "arm")))
    return (*who, split, str(row["metric"]), *figures, str(row["verdict"]))


def _figures(comparison: Comparison) -> dict[str, object]:
    return {name: getattr(comparison, name) for name in LEADERBOARD.names if hasattr(comparison, name)}


def _protocols(data: Path) -> dict[str, str]:
    """By the split of a benchmark's answers, which is its name."""
    manifests = {asked.partition(",")[0]: folder / MANIFEST for asked, folder in answer_folders(data, BASE).items()}
    found = {name: read_json(path).get("protocol") for name, path in manifests.items() if path.is_file()}
    return {name: protocol for name, protocol in found.items() if isinstance(protocol, str)}


def _folder() -> Path:
    return state() / "leaderboard"
