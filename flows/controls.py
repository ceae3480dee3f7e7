"""The paper's controls: does it matter which layers are calibrated? Every arm, seed and data set at equal steps and examples."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import polars as pl
import pyarrow as pa
from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from pydantic import AfterValidator, Field

from flows.environment import state
from flows.graph import StageFailed
from flows.nightly import BASE, arm_stages, read_answers, shared_stages, started
from flows.parameters import COMPOSED, DEFAULTS, Composed, Kinds, Parameters, distinct
from flows.pipeline import Pipeline
from headwise.evaluation.compare import Comparison, compare
from headwise.evaluation.settings import Evaluation
from headwise.files import new_file, write_table

CONTROLS = pa.schema(
    [
        ("data", pa.string()),
        ("arm", pa.string()),
        ("seed", pa.int32()),
        ("seeds", pa.int32()),
        ("split", pa.string()),
        ("metric", pa.string()),
        ("before", pa.float64()),
        ("after", pa.float64()),
        ("effect", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("p_value", pa.float64()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
    ]
)
"""controls.parquet: one row per data set, arm, seed (null: the mean over `seeds` of them), split and metric, or with the `reason` of a
failed cell."""

ARMS = replace(DEFAULTS, arms=("top", "bottom", "random", "all"))
Row = dict[str, object]
Cell = Mapping[str, pl.DataFrame | str]
"""The answers of every arm, `base` among them; of an arm that failed, the reason."""


@flow(name="controls", persist_result=False)
def controls(
    settings: Parameters = ARMS,
    data: Kinds = COMPOSED,
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(distinct)] = (0, 1, 2),
) -> Path:
    """Calibrate every arm with every seed on every data set, and put the paired differences from the base model into one table.

    Args:
        settings: The parameters that all cells share; `arms` are the rows of the table.
        data: The data sets, in their drift variant.
        seeds: The seeds of the random layers, the LoRA's first weights and the order of the examples.
    """
    rows: list[Row] = []
    for kind in data:
        cells = {seed: run_cell(kind, seed, settings) for seed in seeds}
        rows += table_rows(kind, settings.arms, cells, settings.evaluation)
    return publish(rows)


def run_cell(kind: Composed, seed: int, settings: Parameters) -> Cell:
    """All arms of one data set and seed, in a workspace of their own; an arm that failed is its reason instead of its answers."""
    parameters = replace(
        settings,
        images=replace(settings.images, kind=kind, variant="drift"),
        selection=replace(settings.selection, seed=seed),
        calibration=replace(settings.calibration, seed=seed),
    )
    try:
        with started(f"controls-{kind}-{seed}", parameters) as pipeline:
            pipeline.run(shared_stages(parameters))
            base = read_answers(pipeline.workspace.folder, BASE)
            return {BASE: base, **{arm: _answers_or_reason(pipeline, arm) for arm in parameters.arms}}
    except (StageFailed, ValueError) as error:
        get_run_logger().error("controls, %s, seed %d: %s", kind, seed, error)
        return dict.fromkeys((BASE, *parameters.arms), str(error))


def _answers_or_reason(pipeline: Pipeline, arm: str) -> pl.DataFrame | str:
    try:
        pipeline.run(arm_stages(arm))
    except StageFailed as error:
        get_run_logger().error("%s: %s", pipeline.workspace.name, error)
        return str(error)
    return read_answers(pipeline.workspace.folder, arm)


def table_rows(kind: str, arms: Sequence[str], cells: Mapping[int, Cell], settings: Evaluation) -> list[Row]:
    """The rows of one data set: for each arm every seed, and the mean over the seeds that did not fail."""
    rows: list[Row] = []
    for arm in arms:
        done: list[tuple[pl.DataFrame, pl.DataFrame]] = []
        for seed, cell in cells.items():
            base, answers = cell[BASE], cell[arm]
            if isinstance(base, str) or isinstance(answers, str):
                rows.append({"data": kind, "arm": arm, "seed": seed, "seeds": 0, "reason": answers})
                continue
            done.append((base, answers))
            rows += [_row(kind, arm, seed, 1, comparison) for comparison in _headlines(base, answers, settings)]
        if done:
            before, after = (mean_answers([pair[side] for pair in done]) for side in (0, 1))
            rows += [_row(kind, arm, None, len(done), comparison) for comparison in _headlines(before, after, settings)]
    return rows


def mean_answers(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """The same examples answered by several models, each example's nats and accuracy averaged over the models.

    Comparing two such tables gives the mean effect of these seeds, and the interval that other images would put it in.
    """
    together = pl.concat(frames)
    averaged = together.group_by("example_id").agg(
        pl.col("image", "split", "task", "answer", "tokens").first(), pl.col("right", "nats").mean(), pl.col("valid").all()
    )
    return averaged.sort("example_id").select(frames[0].columns)


def _headlines(before: pl.DataFrame, after: pl.DataFrame, settings: Evaluation) -> list[Comparison]:
    return [comparison for comparison in compare(before, after, settings) if comparison.task is None]


def _row(kind: str, arm: str, seed: int | None, seeds: int, comparison: Comparison) -> Row:
    found = {**asdict(comparison), "verdict": comparison.verdict}
    return {"data": kind, "arm": arm, "seed": seed, "seeds": seeds, **{key: found[key] for key in CONTROLS.names if key in found}}


def publish(rows: Sequence[Row]) -> Path:
    """Write `.headwise/controls/controls.parquet` and `controls.md`, show the latter in Prefect, and return its path."""
    folder = state() / "controls"
    whole = [{name: row.get(name) for name in CONTROLS.names} for row in rows]
    write_table(pa.Table.from_pylist(whole, schema=CONTROLS), folder / "controls.parquet", CONTROLS)
    text = as_markdown(rows)
    with new_file(folder / "controls.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    create_markdown_artifact(text, key="controls")
    return folder / "controls.md"


def as_markdown(rows: Sequence[Row]) -> str:
    """The means over seeds as a table, with the range of the single seeds beside them, and then the cells that failed."""
    columns = ("data", "arm", "split", "metric", "base", "calibrated", "effect", "95 % interval", "single seeds", "verdict")
    means = [row for row in rows if row.get("seed") is None]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [_markdown_line(mean, [row for row in rows if _key(row) == _key(mean) and row is not mean]) for mean in means]
    failed = [f"- {row['data']}, {row['arm']}, seed {row['seed']}: {row['reason']}" for row in rows if row.get("reason")]
    note = "Effect: a ratio of perplexities (better below 1) or a difference of accuracies (above 0), paired by example."
    return "\n".join([*lines, "", note, *(["", "Cells that failed:", "", *failed] if failed else []), ""])


def _key(row: Row) -> tuple[object, ...]:
    return tuple(row.get(name) for name in ("data", "arm", "split", "metric"))


def _markdown_line(mean: Row, single: Sequence[Row]) -> str:
    effects = sorted(float(str(row["effect"])) for row in single)
    cells = [*map(str, _key(mean)), f"{mean['before']:.4g}", f"{mean['after']:.4g}", f"{mean['effect']:.4f}"]
    cells += [f"{mean['low']:.4f} to {mean['high']:.4f}", f"{effects[0]:.4f} to {effects[-1]:.4f} ({len(effects)})", str(mean["verdict"])]
    return f"| {' | '.join(cells)} |"
