"""Tables of experiments: every cell is a run of some arms on one data set with one seed, and every effect is paired with its interval."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import polars as pl
import pyarrow as pa
from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact

from flows.environment import state
from flows.graph import StageFailed
from flows.nightly import arm_stages, check_arms, gain_stages
from flows.parameters import Parameters
from flows.pipeline import Pipeline, started
from headwise.evaluation.compare import Comparison, compare, paired
from headwise.evaluation.statistics import Statistics
from headwise.evaluation.table import BASE, read_answers
from headwise.examples import CAPTION
from headwise.files import new_file, write_table

EFFECTS = pa.schema(
    [
        ("data", pa.string()),
        ("arm", pa.string()),
        ("against", pa.string()),
        ("seed", pa.int32()),
        ("seeds", pa.int32()),
        ("split", pa.string()),
        ("metric", pa.string()),
        ("before", pa.float64()),
        ("after", pa.float64()),
        ("effect", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("detectable", pa.float64()),
        ("p_value", pa.float64()),
        ("p_equivalent", pa.float64()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
    ]
)
"""One row per data set, arm, the arm it is compared with (`base`, or another), seed (null: the mean over `seeds` of them), split and
metric, or with the `reason` of a failed cell."""

LEAST_SEEDS = 3
"""Runs differ from seed to seed; fewer say nothing about that."""
CLOSED = ", answers"
"""Added to a split's name: its closed questions' reference answers, by their perplexity."""
NOTE = (
    "Effect: a ratio of perplexities (better below 1) or a difference of accuracies (above 0), paired by example and averaged over the "
    "seeds. The interval is over images, for these seeds; how far the seeds differ stands beside it."
)
Row = dict[str, object]
Cell = Mapping[str, pl.DataFrame | str]
"""The answers of every arm, `base` among them; of an arm that failed, the reason."""
Pair = tuple[str, str]
"""The arm that another is compared with, and that other."""
Compare = Callable[[pl.DataFrame, pl.DataFrame, Statistics], list[Comparison]]


def run_cell(name: str, parameters: Parameters, planned: Sequence[str], prepare: Callable[[Pipeline], object]) -> Cell:
    """All arms in a workspace of their own; an arm that failed is its reason instead of its answers.

    planned: every stage that may run there. prepare: runs what the arms stand on, the answers of the model as it is among it.
    """
    try:
        with started(name, parameters, planned) as pipeline:
            prepare(pipeline)
            base = read_answers(pipeline.workspace.folder / "data", BASE)
            found = {arm: _answers_or_reason(pipeline, parameters, arm, base) for arm in parameters.arms}
            pipeline.attempt(gain_stages(parameters, [arm for arm, answers in found.items() if isinstance(answers, str)]))
            return {BASE: base, **found}
    except (StageFailed, ValueError) as error:
        get_run_logger().error("%s: %s", name, error)
        return dict.fromkeys((BASE, *parameters.arms), str(error))


def _answers_or_reason(pipeline: Pipeline, parameters: Parameters, arm: str, base: pl.DataFrame) -> pl.DataFrame | str:
    reason = pipeline.attempt(arm_stages(arm, parameters))
    return reason or answers_or_reason(pipeline.workspace.folder, arm, base)


def answers_or_reason(folder: Path, arm: str, base: pl.DataFrame) -> pl.DataFrame | str:
    """What an arm of a workspace answered, or why that cannot be compared with the model as it is."""
    try:
        check_arms(folder, BASE, arm)
        answers = read_answers(folder / "data", arm)
        paired(base, answers)
    except ValueError as error:
        return str(error)
    return answers


def headlines(before: pl.DataFrame, after: pl.DataFrame, settings: Statistics) -> list[Comparison]:
    """The comparisons of whole splits."""
    return [comparison for comparison in compare(before, after, settings) if comparison.task is None]


def compared(before: pl.DataFrame, after: pl.DataFrame, settings: Statistics) -> list[Comparison]:
    """The headlines, and of the closed questions the perplexity of their reference answers: small changes move it long before an answer."""
    closed = [
        answers.filter(pl.col("task") != CAPTION).with_columns(
            task=pl.lit(CAPTION), split=pl.col("split") + CLOSED, right=pl.lit(None, answers["right"].dtype)
        )
        for answers in (before, after)
    ]
    return headlines(before, after, settings) + headlines(closed[0], closed[1], settings)


def table_rows(
    kind: str, pairs: Sequence[Pair], cells: Mapping[int, Cell], settings: Statistics, compared: Compare = headlines
) -> list[Row]:
    """The rows of one data set: the cells that failed, then every pair that is asked for, in each seed that has both."""
    failed: list[Row] = [
        {"data": kind, "arm": arm, "against": BASE, "seed": seed, "seeds": 0, "reason": found}
        for arm in dict.fromkeys(after for _, after in pairs)
        for seed, cell in cells.items()
        if isinstance(found := cell.get(arm), str)
    ]
    return failed + [row for before, after in pairs for row in _pair_rows(kind, before, after, cells, settings, compared)]


def _pair_rows(kind: str, before: str, after: str, cells: Mapping[int, Cell], settings: Statistics, compared: Compare) -> list[Row]:
    """Two arms compared: each seed in which neither failed, and the mean over those seeds."""
    rows: list[Row] = []
    done: list[tuple[pl.DataFrame, pl.DataFrame]] = []
    for seed, cell in cells.items():
        first, second = cell.get(before), cell.get(after)
        if isinstance(first, pl.DataFrame) and isinstance(second, pl.DataFrame):
            done.append((first, second))
            rows += [_row(kind, before, after, seed, 1, comparison) for comparison in compared(first, second, settings)]
    if done:
        first, second = (mean_answers([pair[side] for pair in done]) for side in (0, 1))
        rows += [_row(kind, before, after, None, len(done), comparison) for comparison in compared(first, second, settings)]
    return rows


def mean_answers(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """The same examples answered by several models, each example's nats and accuracy averaged over the models.

    Comparing two such tables gives the mean effect of these seeds, and the interval that other images would put it in.
    """
    together = pl.concat(frames)
    averaged = together.group_by("example_id").agg(
        pl.col("image", "split", "task", "answer", "tokens").first(), pl.col("right", "nats", "part", "whole").mean(), pl.col("valid").all()
    )
    return averaged.sort("example_id").select(frames[0].columns)


def _row(kind: str, before: str, after: str, seed: int | None, seeds: int, comparison: Comparison) -> Row:
    found = {**asdict(comparison), "verdict": comparison.verdict}
    same = {"data": kind, "arm": after, "against": before, "seed": seed, "seeds": seeds}
    return {**same, **{key: found[key] for key in EFFECTS.names if key in found}}


def publish(name: str, rows: Sequence[Row], text: str) -> Path:
    """Write `.headwise/NAME/NAME.parquet` and `NAME.md`, show the latter in Prefect, and return its path."""
    folder = state() / name
    whole = [{column: row.get(column) for column in EFFECTS.names} for row in rows]
    write_table(pa.Table.from_pylist(whole, schema=EFFECTS), folder / f"{name}.parquet", EFFECTS)
    with new_file(folder / f"{name}.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    create_markdown_artifact(text, key=name)
    return folder / f"{name}.md"


def as_markdown(rows: Sequence[Row], sentences: Sequence[str]) -> str:
    """The means over seeds as a table, with the range of the single seeds beside them, the sentences, and then the cells that failed."""
    columns = ("data", "arm", "against", "split", "metric", "before", "after", "effect", "95 % interval", "single seeds", "verdict")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [_markdown_line(mean, singles(mean, rows)) for mean in means(rows)]
    failed = failures(rows)
    return "\n".join([*lines, "", NOTE, "", *sentences, *(["", "Cells that failed:", "", *failed] if failed else []), ""])


def failures(rows: Sequence[Row]) -> list[str]:
    """A line for each cell that failed, with the reason."""
    return [f"- {row['data']}, {row['arm']}, seed {row['seed']}: {row['reason']}" for row in rows if row.get("reason")]


def means(rows: Sequence[Row]) -> list[Row]:
    """The rows over all seeds."""
    return [row for row in rows if row.get("seed") is None]


def one_direction(mean: Row, rows: Sequence[Row]) -> bool:
    """Whether a comparison was made with at least `LEAST_SEEDS` seeds and came out on the same side of no change with every one."""
    neutral = 1.0 if mean["metric"] == "perplexity" else 0.0
    effects = [float(str(row["effect"])) for row in singles(mean, rows)]
    return len(effects) >= LEAST_SEEDS and len({effect > neutral for effect in effects if effect != neutral}) == 1


def singles(mean: Row, rows: Sequence[Row]) -> list[Row]:
    """The rows of single seeds that a mean is over."""
    return [row for row in rows if row.get("seed") is not None and key_of(row) == key_of(mean)]


def key_of(row: Row) -> tuple[object, ...]:
    """What a row is about, whatever the seed."""
    return tuple(row.get(name) for name in ("data", "arm", "against", "split", "metric"))


def _markdown_line(mean: Row, single: Sequence[Row]) -> str:
    effects = sorted(float(str(row["effect"])) for row in single)
    cells = [*map(str, key_of(mean)), f"{mean['before']:.4g}", f"{mean['after']:.4g}", f"{mean['effect']:.4f}"]
    cells += [f"{mean['low']:.4f} to {mean['high']:.4f}", f"{effects[0]:.4f} to {effects[-1]:.4f} ({len(effects)})", str(mean["verdict"])]
    return f"| {' | '.join(cells)} |"


def markdown_table(lines: Sequence[Row]) -> str:
    """Rows of the same columns; nothing where there are none."""
    if not lines:
        return ""
    columns = list(lines[0])
    cells = [[_cell(line[column]) for column in columns] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *cells])


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
