"""answers.parquet and metrics.json: what one model answered, example by example and summed up."""

import polars as pl
import pyarrow as pa

from headwise.evaluation.perplexity import corpus_perplexity
from headwise.examples import CAPTION

ANSWERS_FILE, METRICS_FILE = "answers.parquet", "metrics.json"
BASE, CHAMPION = "base", "champion"
"""Arms that nobody selects layers for: the model without an adapter, and with the one that is in use so far."""

ANSWERS = pa.schema(
    [
        ("example_id", pa.string()),
        ("image", pa.string()),
        ("split", pa.string()),
        ("task", pa.string()),
        ("answer", pa.string()),
        ("right", pa.float32()),
        ("valid", pa.bool_()),
        ("nats", pa.float64()),
        ("tokens", pa.int32()),
    ]
)
"""One row per example. `image` is the cluster (the example's own id where there is no image); `right` is the soft accuracy, null for
captions, which are read and not generated (empty `answer`); `nats` is the negative log-likelihood of the first reference over `tokens`
tokens, its end of turn included."""


def metrics(answers: pl.DataFrame) -> dict[str, dict[str, object]]:
    """metrics.json. Per split: `perplexity` of the captions, `accuracy` and share of `valid` answers of the closed questions (null where
    the split has none), `n`, and the same for each of its `tasks`.
    """
    return {str(split): _split_metrics(rows) for (split,), rows in sorted(answers.group_by("split"), key=lambda group: str(group[0][0]))}


def _split_metrics(answers: pl.DataFrame) -> dict[str, object]:
    captions, closed = answers.filter(pl.col("task") == CAPTION), answers.filter(pl.col("task") != CAPTION)
    tasks = sorted(answers.group_by("task"), key=lambda group: str(group[0][0]))
    return {
        "perplexity": corpus_perplexity(captions) if len(captions) else None,
        "accuracy": _mean(closed, "right"),
        "valid": _mean(closed, "valid"),
        "n": len(answers),
        "tasks": {str(task): _task_metrics(rows) for (task,), rows in tasks},
    }


def _task_metrics(answers: pl.DataFrame) -> dict[str, object]:
    return {
        "perplexity": corpus_perplexity(answers),
        "accuracy": _mean(answers, "right"),
        "valid": _mean(answers, "valid"),
        "n": len(answers),
    }


def _mean(answers: pl.DataFrame, column: str) -> float | None:
    values = answers[column].cast(pl.Float64).drop_nulls()
    return float(values.to_numpy().mean()) if len(values) else None
