"""answers.parquet and metrics.json: what one model answered, example by example and summed up."""

from collections import Counter
from pathlib import Path

import polars as pl
import pyarrow as pa

from headwise.evaluation.perplexity import corpus_perplexity
from headwise.examples import CAPTION
from headwise.files import MANIFEST, read_json, read_table

ANSWERS_FILE, METRICS_FILE = "answers.parquet", "metrics.json"
BASE, CHAMPION, FOREIGN = "base", "champion", "foreign"
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
        ("part", pa.float64()),
        ("whole", pa.float64()),
    ]
)
"""One row per example. `image` is the cluster (the example's own id where there is no image); `split` is a benchmark's name where it is
one's; `right` is in [0, 1] by the task's rule, null for captions, which are read and not generated (empty `answer`); `valid` is null where
no form of an answer is known; `nats` is the negative log-likelihood of the first reference over `tokens` tokens, its end of turn included,
null where it is not read; `part` of `whole` is what a rule counts beside `right`, to be summed before it is divided: an IoU of 1, the
hallucinated of all objects mentioned."""


class Incomplete(ValueError):
    """Some shards of a benchmark have answers and others have none: what there is says nothing of the whole."""


def answer_folders(data: Path, arm: str) -> dict[str, Path]:
    """Where an arm's answers are, by what was asked: its own data, and each shard of a benchmark."""
    own = {"data": data / "evaluations" / arm} if (data / "evaluations" / arm / ANSWERS_FILE).is_file() else {}
    shards = sorted((data / "benchmarks").glob(f"*/{arm}/shard=*"))
    return own | {f"{shard.parent.parent.name}, {shard.name}": shard for shard in shards if (shard / ANSWERS_FILE).is_file()}


def read_answers(data: Path, arm: str) -> pl.DataFrame:
    """All that an arm answered, benchmarks included.

    Raises ValueError if there is nothing, or naming a file that cannot be read, and Incomplete where a shard of a benchmark has no answers.
    """
    folders = answer_folders(data, arm)
    if not folders:
        raise ValueError(f"{data}: no answers of {arm!r}")
    shards = Counter(asked.partition(",")[0] for asked in folders)
    for asked, folder in folders.items():
        wanted = read_json(folder / MANIFEST).get("shards") if (folder / MANIFEST).is_file() else None
        if wanted is not None and wanted != shards[asked.partition(",")[0]]:
            raise Incomplete(f"{folder.parent}: {shards[asked.partition(',')[0]]} of {wanted} shards have answers")
    return pl.concat([read_table(folder / ANSWERS_FILE, ANSWERS) for folder in folders.values()])


def metrics(answers: pl.DataFrame) -> dict[str, dict[str, object]]:
    """metrics.json. Per split: `perplexity` of the captions, `accuracy` and share of `valid` answers of the closed questions (null where
    the split has none), `n`, and the same for each of its `tasks`, with the `ratio` of what its rule counts beside that.
    """
    return {str(split): _split_metrics(rows) for (split,), rows in sorted(answers.group_by("split"), key=lambda group: str(group[0][0]))}


def _split_metrics(answers: pl.DataFrame) -> dict[str, object]:
    captions, closed = answers.filter(pl.col("task") == CAPTION), answers.filter(pl.col("task") != CAPTION)
    tasks = sorted(answers.group_by("task"), key=lambda group: str(group[0][0]))
    return {
        "perplexity": _perplexity(captions),
        "accuracy": _mean(closed, "right"),
        "valid": _mean(closed, "valid"),
        "n": len(answers),
        "tasks": {str(task): _task_metrics(rows) for (task,), rows in tasks},
    }


def _task_metrics(answers: pl.DataFrame) -> dict[str, object]:
    return {
        "perplexity": _perplexity(answers),
        "accuracy": _mean(answers, "right"),
        "ratio": ratio(answers),
        "valid": _mean(answers, "valid"),
        "n": len(answers),
    }


def ratio(answers: pl.DataFrame) -> float | None:
    """The sum of `part` over the sum of `whole`; None where no rule counts them, or there is nothing to divide by."""
    part, whole = (float(answers[column].sum()) for column in ("part", "whole"))
    return part / whole if whole else None


def _perplexity(answers: pl.DataFrame) -> float | None:
    read = answers.drop_nulls("tokens")
    return corpus_perplexity(read) if len(read) else None


def _mean(answers: pl.DataFrame, column: str) -> float | None:
    values = answers[column].cast(pl.Float64).drop_nulls()
    return float(values.to_numpy().mean()) if len(values) else None
