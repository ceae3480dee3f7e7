"""Before and after: every calibrated model against the uncalibrated one, as rows of the page's tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import yaml
from pydantic import TypeAdapter

from headwise.benchmarks.registry import BENCHMARKS, authors_figures
from headwise.evaluation.compare import FORGETTING, SCALES, Comparison, Metric, compare
from headwise.evaluation.conditions import conditions
from headwise.evaluation.statistics import Statistics
from headwise.evaluation.table import BASE, Incomplete, answer_folders, read_answers
from headwise.report.records import Table, number

ORDER = ("top", "bottom", "random", "all")
TITLES = {"evaluation": "Evaluation: held-out examples of the same data", FORGETTING: "Forgetting probe: what was not calibrated"}
NOTES = {FORGETTING: "The loss that an interval on the forgetting probe still leaves open is its end on the losing side."}
MEASURES: dict[Metric, tuple[str, str]] = {
    "accuracy": ("Accuracy", "questions"),
    "perplexity": ("Caption perplexity", "captions"),
    "iou": ("Mean IoU", "questions"),
    "hallucination": ("Hallucinated of all mentioned objects (CHAIR_i)", "descriptions"),
}
Compared = list[tuple[str, Comparison]]
"""Each comparison with the arm that it is about."""


@dataclass(frozen=True)
class ArmRow:
    """One arm in one measure, as text.

    `detectable` is the smallest gain that the sample shows four times out of five; `mark` is the verdict's colour (gain, loss, unclear);
    `low`, `point`, `high` and `zero` are places on a bar of length 100, on one scale for all rows of the table with the same metric.
    """

    arm: str
    before: str
    after: str
    change: str
    interval: str
    p_holm: str
    p_not_worse: str
    detectable: str
    verdict: str
    mark: str
    low: float
    point: float
    high: float
    zero: float = 50.0


@dataclass(frozen=True)
class Measure:
    """One measure with a row per arm."""

    name: str
    sample: str
    rows: tuple[ArmRow, ...]


@dataclass(frozen=True)
class SplitResults:
    """The measures of one split, headlines before tasks; what is counted beside them, a column per model; and a note of what verdicts or a
    benchmark's figures mean.
    """

    title: str
    measures: tuple[Measure, ...]
    beside: Table | None
    note: str


@dataclass(frozen=True)
class Results:
    """The splits that could be compared, and the arms that could not."""

    splits: tuple[SplitResults, ...]
    left_over: tuple[str, ...]


def sort_arms(arms: Sequence[str]) -> list[str]:
    """Top, bottom, random, all, then any other by name."""
    return sorted(arms, key=lambda arm: (ORDER.index(arm) if arm in ORDER else len(ORDER), arm))


def read_results(data: Path, statistics: Statistics) -> Results:
    """Every arm compared with the uncalibrated model.

    An arm that was evaluated on other data, with another model or under other settings is left over from an earlier run: it is named
    instead of compared.
    """
    asked = sorted(path.parent.name for path in (data / "evaluations").glob("*/answers.parquet"))
    answers = {arm: found for arm in asked if (found := _complete(data, arm)) is not None}
    if BASE not in answers:
        return Results((), ())
    base, expected = answers.pop(BASE), _conditions(data, BASE)
    ids = set(base["example_id"])
    arms = sort_arms([arm for arm in asked if arm != BASE])
    same = [arm for arm in arms if arm in answers and _conditions(data, arm) == expected and set(answers[arm]["example_id"]) == ids]
    rows = [(arm, comparison) for arm in same for comparison in compare(base, answers[arm], statistics)]
    splits = list(dict.fromkeys(comparison.split for _, comparison in rows))
    models = {BASE: base, **{arm: answers[arm] for arm in same}}
    compared = tuple(_split_results(split, [row for row in rows if row[1].split == split], models) for split in splits)
    return Results(compared, tuple(arm for arm in arms if arm not in same))


def _complete(data: Path, arm: str) -> pl.DataFrame | None:
    """None where a run was cut short between the shards of a benchmark."""
    try:
        return read_answers(data, arm)
    except Incomplete:
        return None


def _conditions(data: Path, arm: str) -> dict[str, dict[str, object]]:
    return {asked: conditions(folder) for asked, folder in answer_folders(data, arm).items()}


def read_statistics(params: Path) -> Statistics:
    """The section `statistics` of the run's params.yaml, so that the page's intervals are those that decided; the defaults without one."""
    content = yaml.safe_load(params.read_text(encoding="utf-8")) if params.is_file() else None
    return TypeAdapter(Statistics).validate_python((content or {}).get("statistics", {}))


def _split_results(split: str, rows: Compared, models: Mapping[str, pl.DataFrame]) -> SplitResults:
    """The comparisons turned, so that the arms of a measure stand beneath each other."""
    note = NOTES.get(split, BENCHMARKS[split].protocol if split in BENCHMARKS else "")
    groups: dict[tuple[str, str | None], Compared] = {}
    for arm, comparison in rows:
        groups.setdefault((comparison.metric, comparison.task), []).append((arm, comparison))
    reach = {metric: max(_reach(comparison) for _, comparison in rows if comparison.metric == metric) for metric, _ in groups}
    measures = tuple(_measure(group, reach[metric]) for (metric, _), group in groups.items())
    try:
        beside = _beside(split, {arm: answers.filter(pl.col("split") == split) for arm, answers in models.items()})
    except ValueError as error:
        beside, note = None, f"{note}. {error}"
    return SplitResults(TITLES.get(split, f"Benchmark: {split}"), measures, beside, note)


def _beside(split: str, models: Mapping[str, pl.DataFrame]) -> Table | None:
    """The share of answers of the form asked for, and what a benchmark's authors report; None where nothing was answered."""
    answered = {arm: answers.drop_nulls("right") for arm, answers in models.items()}
    if any(answers.is_empty() for answers in answered.values()):
        return None
    figures = {arm: {"valid answers": _share(own["valid"]), **authors_figures(split, own)} for arm, own in answered.items()}
    rows = tuple((name, *(number(figures[arm].get(name)) for arm in figures)) for name in figures[BASE])
    return Table("Beside the accuracy", ("", *figures), rows)


def _share(values: pl.Series) -> float | None:
    known = values.cast(pl.Float64).drop_nulls()
    return float(known.to_numpy().mean()) if len(known) else None


def _reach(comparison: Comparison) -> float:
    neutral = SCALES[comparison.metric].neutral
    return max(abs(value - neutral) for value in (comparison.low, comparison.effect, comparison.high))


def _measure(group: Compared, reach: float) -> Measure:
    first = group[0][1]
    name, unit = MEASURES[first.metric]
    name = f"{name}, {first.task or 'all questions'}" if first.metric == "accuracy" else name
    sample = f"{first.num_examples} {unit}, {first.num_images} images"
    return Measure(name, sample, tuple(_arm_row(arm, comparison, reach) for arm, comparison in group))


def _arm_row(arm: str, comparison: Comparison, reach: float) -> ArmRow:
    neutral, scale = SCALES[comparison.metric].neutral, 48.0 / reach if reach > 0 else 0.0
    low, point, high = (round(50 + scale * (value - neutral), 2) for value in (comparison.low, comparison.effect, comparison.high))
    unit = "%" if comparison.metric == "perplexity" else "pts"
    return ArmRow(
        arm=arm,
        before=level(comparison, comparison.before),
        after=level(comparison, comparison.after),
        change=f"{change(comparison, comparison.effect)} {unit}",
        interval=f"{change(comparison, comparison.low)} to {change(comparison, comparison.high)}",
        p_holm=_p_value(comparison.p_holm),
        p_not_worse=_p_value(comparison.p_not_worse),
        detectable=f"{change(comparison, comparison.detectable)} {unit}",
        verdict=comparison.verdict,
        mark=comparison.verdict if comparison.gain or comparison.loss else "unclear",
        low=low,
        point=point,
        high=high,
    )


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def level(comparison: Comparison, value: float) -> str:
    """A perplexity to two decimals, an accuracy in percent."""
    return f"{value:.2f}" if comparison.metric == "perplexity" else f"{100 * value:.1f} %"


def change(comparison: Comparison, value: float) -> str:
    """An effect with its sign: a ratio of perplexities as a change in percent, a difference of accuracies in points."""
    text = f"{100 * (value - SCALES[comparison.metric].neutral):+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")
