"""The paper's controls: does it matter which layers are calibrated? Every arm, seed and data set at equal steps and examples."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import pyarrow as pa
from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from pydantic import AfterValidator, Field

from flows.environment import state
from flows.graph import StageFailed
from flows.nightly import arm_stages, check_arms, night_stages, run_shared
from flows.parameters import COMPOSED, DEFAULTS, Kinds, Parameters, distinct
from flows.pipeline import Pipeline, started
from flows.workspace import CONTROLS as WORKSPACE
from headwise.evaluation.compare import Comparison, compare, paired
from headwise.evaluation.paired import holm
from headwise.evaluation.statistics import Statistics
from headwise.evaluation.table import BASE, read_answers
from headwise.files import new_file, write_table
from headwise.intervals import LEVEL

CONTROLS = pa.schema(
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
        ("p_value", pa.float64()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
    ]
)
"""controls.parquet: one row per data set, arm, the arm it is compared with (`base`, or an arm by the first one), seed (null: the mean over
`seeds` of them), split and metric, or with the `reason` of a failed cell."""

LEAST_SEEDS = 3
"""Training differs from seed to seed; fewer say nothing about that."""
ARMS = replace(DEFAULTS, arms=("top", "bottom", "random", "all"))
NOTE = (
    "Effect: a ratio of perplexities (better below 1) or a difference of accuracies (above 0), paired by example and averaged over the "
    "seeds. The interval is over images, for these seeds; how far the seeds differ stands beside it."
)
Row = dict[str, object]
Cell = Mapping[str, pl.DataFrame | str]
"""The answers of every arm, `base` among them; of an arm that failed, the reason."""


@flow(name="controls", persist_result=False)
def controls(
    settings: Parameters = ARMS,
    data: Kinds = COMPOSED,
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(distinct)] = (0, 1, 2),
) -> Path:
    """Calibrate every arm with every seed on every data set; compare each with the base model, and the first with the others, in one table.

    Args:
        settings: The parameters that all cells share; `arms` are the rows of the table, the first is compared with the others.
        data: The data sets, in their drift variant.
        seeds: The seeds of the random layers, the LoRA's first weights and the order of the examples.
    """
    rows: list[Row] = []
    images = {kind: replace(settings.images, kind=kind, variant="drift") for kind in data}  # refused here if one has no use for a field
    for kind in data:
        cells = {seed: run_cell(seed, replace(settings, images=images[kind])) for seed in seeds}
        rows += table_rows(kind, settings.arms, cells, settings.statistics)
    return publish(rows)


def run_cell(seed: int, settings: Parameters) -> Cell:
    """All arms of one data set and seed, in a workspace of their own; an arm that failed is its reason instead of its answers."""
    kind = settings.images.kind
    parameters = replace(
        settings,
        selection=replace(settings.selection, seed=seed),
        calibration=replace(settings.calibration, seed=seed),
    )
    try:
        with started(f"{WORKSPACE}{kind}-{seed}", parameters, night_stages(parameters)) as pipeline:
            run_shared(pipeline, parameters)
            base = read_answers(pipeline.workspace.folder / "data", BASE)
            return {BASE: base, **{arm: _answers_or_reason(pipeline, parameters, arm, base) for arm in parameters.arms}}
    except (StageFailed, ValueError) as error:
        get_run_logger().error("controls, %s, seed %d: %s", kind, seed, error)
        return dict.fromkeys((BASE, *parameters.arms), str(error))


def _answers_or_reason(pipeline: Pipeline, parameters: Parameters, arm: str, base: pl.DataFrame) -> pl.DataFrame | str:
    folder = pipeline.workspace.folder
    if reason := pipeline.attempt(arm_stages(arm, parameters)):
        return reason
    try:
        check_arms(folder, BASE, arm)
        answers = read_answers(folder / "data", arm)
        paired(base, answers)
    except ValueError as error:
        return str(error)
    return answers


def table_rows(kind: str, arms: Sequence[str], cells: Mapping[int, Cell], settings: Statistics) -> list[Row]:
    """The rows of one data set: every arm against the model as it was, then the first arm against every other one."""
    failed: list[Row] = [
        {"data": kind, "arm": arm, "against": BASE, "seed": seed, "seeds": 0, "reason": cell[arm]}
        for arm in arms
        for seed, cell in cells.items()
        if isinstance(cell[arm], str)
    ]
    pairs = [*((BASE, arm) for arm in arms), *((other, arms[0]) for other in arms[1:])]
    return failed + [row for before, after in pairs for row in _pair_rows(kind, before, after, cells, settings)]


def _pair_rows(kind: str, before: str, after: str, cells: Mapping[int, Cell], settings: Statistics) -> list[Row]:
    """Two arms compared: each seed in which neither failed, and the mean over those seeds."""
    rows: list[Row] = []
    done: list[tuple[pl.DataFrame, pl.DataFrame]] = []
    for seed, cell in cells.items():
        first, second = cell[before], cell[after]
        if isinstance(first, str) or isinstance(second, str):
            continue
        done.append((first, second))
        rows += [_row(kind, before, after, seed, 1, comparison) for comparison in _headlines(first, second, settings)]
    if done:
        first, second = (mean_answers([pair[side] for pair in done]) for side in (0, 1))
        rows += [_row(kind, before, after, None, len(done), comparison) for comparison in _headlines(first, second, settings)]
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


def _headlines(before: pl.DataFrame, after: pl.DataFrame, settings: Statistics) -> list[Comparison]:
    return [comparison for comparison in compare(before, after, settings) if comparison.task is None]


def _row(kind: str, before: str, after: str, seed: int | None, seeds: int, comparison: Comparison) -> Row:
    found = {**asdict(comparison), "verdict": comparison.verdict}
    return {
        "data": kind,
        "arm": after,
        "against": before,
        "seed": seed,
        "seeds": seeds,
        **{key: found[key] for key in CONTROLS.names if key in found},
    }


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
    """The means over seeds as a table, with the range of the single seeds beside them, the answer, and then the cells that failed."""
    columns = ("data", "arm", "against", "split", "metric", "before", "after", "effect", "95 % interval", "single seeds", "verdict")
    means = [row for row in rows if row.get("seed") is None]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [_markdown_line(mean, [row for row in rows if _key(row) == _key(mean) and row is not mean]) for mean in means]
    failed = [f"- {row['data']}, {row['arm']}, seed {row['seed']}: {row['reason']}" for row in rows if row.get("reason")]
    return "\n".join([*lines, "", NOTE, "", *answers(rows), *(["", "Cells that failed:", "", *failed] if failed else []), ""])


def answers(rows: Sequence[Row]) -> list[str]:
    """For each data set the paper's question in one sentence, answered by the caption perplexity of the first arm against the others'.

    It matters where the first arm differs from another one: by the p-values of the sign flips over images, adjusted over the arms (Holm,
    5 %), and in the same direction with every seed, of which there must be `LEAST_SEEDS`; else it was not shown. `all` is compared but
    does not decide: it differs in how many layers, too.
    """
    means, singles = [row for row in rows if row.get("seed") is None], [row for row in rows if row.get("seed") is not None]
    decisive = [row for row in means if row["against"] != BASE and (row["split"], row["metric"]) == ("evaluation", "perplexity")]
    sentences = []
    for kind in dict.fromkeys(row["data"] for row in decisive):
        found = [row for row in decisive if row["data"] == kind]
        others = [row for row in found if row["against"] != "all"]
        p_values = holm(np.array([row["p_value"] for row in others], dtype=np.float64))
        agreeing = [_one_direction([single for single in singles if _key(single) == _key(row)]) for row in others]
        answer = "yes" if (agreeing & (p_values < 1 - LEVEL)).any() else "not shown"
        sentences.append(
            f"Does it matter on {kind} which layers are calibrated? By the captions, {answer}: {'; '.join(map(_words, found))}."
        )
    return sentences


def _one_direction(singles: Sequence[Row]) -> bool:
    """Whether there are seeds enough, and each has its ratio of perplexities on the same side of 1."""
    below = [float(str(row["effect"])) < 1 for row in singles]
    return len(below) >= LEAST_SEEDS and len(set(below)) == 1


def _words(row: Row) -> str:
    relation = {"gain": "is better than", "loss": "is worse than"}.get(str(row["verdict"]), "is not shown to differ from")
    return f"{row['arm']} {relation} {row['against']} (ratio {row['effect']:.4f}, 95 % interval {row['low']:.4f} to {row['high']:.4f})"


def _key(row: Row) -> tuple[object, ...]:
    return tuple(row.get(name) for name in ("data", "arm", "against", "split", "metric"))


def _markdown_line(mean: Row, single: Sequence[Row]) -> str:
    effects = sorted(float(str(row["effect"])) for row in single)
    cells = [*map(str, _key(mean)), f"{mean['before']:.4g}", f"{mean['after']:.4g}", f"{mean['effect']:.4f}"]
    cells += [f"{mean['low']:.4f} to {mean['high']:.4f}", f"{effects[0]:.4f} to {effects[-1]:.4f} ({len(effects)})", str(mean["verdict"])]
    return f"| {' | '.join(cells)} |"
