"""What is asked of lmms-eval, where its environment is, and its answers read back example by example."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from headwise.evaluation.table import ANSWERS

SAMPLES, RESULTS, IMAGES = "samples.json", "results.json", "images"
"""What the harness leaves in its output folder: the answers one by one, its own figures, each image once, named by its digest."""
TRACEBACK, PLAIN = "Traceback (most recent call last):", re.compile(r"^(?:[\w.]+\.)?(?:ValueError|BadExample): ")
HARNESS = "HEADWISE_HARNESS"
"""The variable that names the environment's folder; `.harness` beside the one that runs where it is not set."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A shard of a task of lmms-eval and the model that it is for.

    split: what the answers are called. folder: where the task is defined, empty for lmms-eval's own. limit: documents at most, drawn by
    the seed, of each task of a group; 0: all. shard, num_shards: every `num_shards`-th of them, from which one.
    """

    split: str
    task: str
    folder: str
    model: str
    adapter: str | None
    dtype: str
    batch_size: int
    limit: int
    seed: int
    shard: int
    num_shards: int


@dataclass(frozen=True)
class Found:
    """The ANSWERS table, sorted by example; the digest of the documents, what lmms-eval makes of the answers, its version with those of the
    tasks and the metrics that judge, the model's number type.
    """

    answers: pl.DataFrame
    documents: str
    figures: dict[str, Any]
    versions: dict[str, str]
    dtype: str


def harness_python() -> Path:
    """The interpreter of the harness's environment. Raises ValueError saying how it is made where there is none."""
    folder = Path(os.environ.get(HARNESS) or Path(sys.prefix).parent / ".harness")
    python = folder / "bin" / "python"
    if not python.is_file():
        raise ValueError(f"{folder}: lmms-eval has no environment here yet; `make harness` builds it")
    return python


def check_task(task: str, folder: str) -> None:
    """Raises ValueError if no file of lmms-eval, nor of the folder, names such a task, group or tag."""
    named = re.compile(rf"^(?:(?:task|group|tag)\s*:|\s*-)\s*[\"']?{re.escape(task)}[\"']?\s*$", re.MULTILINE)
    places = (
        [Path(folder).expanduser()] if folder else sorted(harness_python().parents[1].glob("lib/python*/site-packages/lmms_eval/tasks"))
    )
    files = (path for place in places for path in place.rglob("*") if path.is_file() and path.name.endswith("yaml"))
    if not any(named.search(path.read_text(encoding="utf-8", errors="replace")) for path in files):
        where = f"{folder} defines no task {task!r}" if folder else f"lmms-eval has no task {task!r}"
        raise ValueError(f"{where} (`.harness/bin/lmms-eval tasks list` shows its own)")


def ask_harness(request: Request, output: Path, log: Callable[[str], object]) -> Found:
    """Run the request in the harness's environment; its images and files are left in `output`, its lines handed to `log`.

    Raises ValueError with its first error if it failed.
    """
    command = [str(harness_python()), "-m", "headwise.harness.run", json.dumps(asdict(request)), str(output)]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            log(lines[-1])
    if process.returncode:
        raise ValueError(f"lmms-eval failed at {request.task}: {_reason(lines)}")
    samples, results = (json.loads((output / name).read_text(encoding="utf-8")) for name in (SAMPLES, RESULTS))
    content = sorted(f"{sample['task']}/{sample['document']} {sample['content']} {sample['image']}\n" for sample in samples)
    return Found(_table(request, samples), hashlib.sha256("".join(content).encode()).hexdigest(), **results)


def _reason(lines: Sequence[str]) -> str:
    """What the first traceback ends with, which caused the others; the last line where there is none."""
    said = [line for line in lines if line]
    if TRACEBACK in said:
        after = said[said.index(TRACEBACK) + 1 :]
        said = [line for line in after if not line.startswith(" ")][:1]
    return PLAIN.sub("", said[-1]) if said else "no word"


def _table(request: Request, samples: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """Raises ValueError unless every sample has a figure in [0, 1]."""
    rows = [_row(request, sample) for sample in samples]
    table = pl.from_arrow(pa.Table.from_pylist(sorted(rows, key=lambda row: row["example_id"]), schema=ANSWERS))
    assert isinstance(table, pl.DataFrame)
    return table


def _row(request: Request, sample: dict[str, Any]) -> dict[str, Any]:
    example_id, right = f"{request.split}/{sample['task']}/{sample['document']}", sample["right"]
    if right is None or not 0 <= right <= 1:
        what = f"{sample['metric']} is {right}" if right is not None else f"none of {', '.join(sample['metrics'])} is a number"
        raise ValueError(f"{example_id}: {what}, and only figures of single examples in [0, 1] can be compared")
    said = {"answer": sample["answer"], "right": right, "valid": None}  # no form is known
    unread = dict.fromkeys(("nats", "tokens", "part", "whole"))
    who = {"example_id": example_id, "image": sample["image"] or example_id, "split": request.split, "task": sample["task"]}
    return {**who, **said, **unread}
