"""The before/after table says what the answers say."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from headwise.evaluation.compare import compare
from headwise.evaluation.statistics import Statistics
from headwise.evaluation.table import ANSWERS
from headwise.files import MANIFEST, read_json, write_json, write_table
from headwise.report.results import Results, change, read_results, read_statistics, sort_arms
from tests.report.html_page import read_page

EMPTY = pl.DataFrame(ANSWERS.empty_table())
FEW = Statistics(bootstrap=200, sign_flips=200)


def answers(workspace: Path, arm: str, split: str) -> pl.DataFrame:
    return pl.read_parquet(workspace / "data/evaluations" / arm / "answers.parquet").filter(pl.col("split") == split)


def perplexity(frame: pl.DataFrame) -> float:
    captions = frame.filter(pl.col("task") == "caption")
    return math.exp(float(captions["nats"].sum()) / float(captions["tokens"].sum()))


def accuracy(frame: pl.DataFrame, task: str | None = None) -> float:
    closed = frame.filter(pl.col("task") == task if task else pl.col("task") != "caption")
    return float(closed["right"].to_numpy().astype(float).mean())


@pytest.mark.parametrize("split", ["evaluation", "forgetting"])
def test_the_numbers_are_those_of_the_answers(workspace: Path, page: Path, split: str) -> None:
    rows = read_page(page.read_text(encoding="utf-8")).rows
    base = answers(workspace, "base", split)
    for arm in ("top", "bottom"):
        after = answers(workspace, arm, split)
        ratio = 100 * (perplexity(after) / perplexity(base) - 1)
        expected = [arm, f"{perplexity(base):.2f}", f"{perplexity(after):.2f}", f"{ratio:+.1f} %".replace("-", "−")]
        assert expected in [row[:4] for row in rows]
        for task in (None, "colour", "count", "exists"):
            before, then = accuracy(base, task), accuracy(after, task)
            points = f"{100 * (then - before):+.1f} pts".replace("-", "−").replace("+0.0", "0.0")
            assert [arm, f"{100 * before:.1f} %", f"{100 * then:.1f} %", points] in [row[:4] for row in rows]


def test_the_intervals_are_those_of_the_comparison_that_decided(workspace: Path) -> None:
    settings = Statistics(bootstrap=1000, sign_flips=1000)
    assert read_statistics(workspace / "params.yaml") == settings
    base, top = (pl.read_parquet(workspace / "data/evaluations" / arm / "answers.parquet") for arm in ("base", "top"))
    expected = {(c.split, c.metric, c.task): f"{change(c, c.low)} to {change(c, c.high)}" for c in compare(base, top, settings)}
    measures = [measure for split in read_results(workspace / "data", settings).splits for measure in split.measures]
    found = [row.interval for measure in measures for row in measure.rows if row.arm == "top"]
    assert sorted(found) == sorted(expected.values())


def test_every_measure_has_every_arm_and_headlines_come_first(workspace: Path) -> None:
    for split in read_results(workspace / "data", FEW).splits:
        names = [measure.name for measure in split.measures]
        assert names == ["Caption perplexity", "Accuracy, all questions", "Accuracy, colour", "Accuracy, count", "Accuracy, exists"]
        assert all([row.arm for row in measure.rows] == ["top", "bottom"] for measure in split.measures)


def test_bars_stay_on_their_scale_and_on_the_side_of_the_effect(workspace: Path) -> None:
    for split in read_results(workspace / "data", FEW).splits:
        for row in (row for measure in split.measures for row in measure.rows):
            assert 2 <= row.low <= row.point <= row.high <= 98
            assert (row.low > row.zero) == (row.interval.startswith("+"))


def test_no_gain_on_the_forgetting_probe_is_no_loss(workspace: Path) -> None:
    frame = pl.read_parquet(workspace / "data/evaluations/base/answers.parquet")
    same = compare(frame, frame, FEW)
    assert {(c.split, c.verdict) for c in same} == {("evaluation", "no gain"), ("forgetting", "no loss shown")}
    worse = [replace(c, low=-0.3, high=-0.1) for c in same if c.metric == "accuracy"]
    assert {c.verdict for c in worse} == {"loss"}


def test_arms_are_in_the_order_of_the_question() -> None:
    assert sort_arms(["all", "zeta", "random", "bottom", "alpha", "top"]) == ["top", "bottom", "random", "all", "alpha", "zeta"]


def test_without_the_uncalibrated_model_or_an_arm_there_is_nothing_to_compare(workspace: Path, tmp_path: Path) -> None:
    evaluations = shutil.copytree(workspace / "data/evaluations", tmp_path / "evaluations")
    shutil.rmtree(evaluations / "top")
    assert arms(evaluations) == {"bottom"}
    shutil.rmtree(evaluations / "bottom")
    assert read_results(evaluations.parent, FEW) == Results((), ())
    assert read_results(tmp_path / "nowhere", FEW) == Results((), ())


def test_an_arm_of_an_earlier_run_is_named_and_not_compared(workspace: Path, tmp_path: Path) -> None:
    evaluations = shutil.copytree(workspace / "data/evaluations", tmp_path / "evaluations")
    fewer = pl.read_parquet(evaluations / "bottom/answers.parquet").head(9)
    write_table(fewer, evaluations / "bottom/answers.parquet", ANSWERS)
    assert arms(evaluations) == {"top"} and read_results(evaluations.parent, FEW).left_over == ("bottom",)
    manifest = read_json(evaluations / "top" / MANIFEST)
    write_json({**manifest, "model": "another"}, evaluations / "top" / MANIFEST)
    assert read_results(evaluations.parent, FEW) == Results((), ("top", "bottom"))


def arms(evaluations: Path) -> set[str]:
    return {row.arm for split in read_results(evaluations.parent, FEW).splits for measure in split.measures for row in measure.rows}


def test_without_parameters_the_statistics_are_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("shards: [0]\n", encoding="utf-8")
    assert read_statistics(tmp_path / "params.yaml") == read_statistics(tmp_path / "nowhere") == Statistics()


def asked(arm: str, name: str, said: dict[tuple[str, str], list[tuple[str, float]]]) -> pl.DataFrame:
    """From (image, task) to the answers there and whether they are right; an answer without a word is not valid."""
    rows = [
        {"example_id": f"{name}-{image}-{task}-{k}", "image": image, "split": name, "task": task, "answer": answer, "right": right}
        for (image, task), answers in said.items()
        for k, (answer, right) in enumerate(answers)
    ]
    unread = {"nats": None, "tokens": None, "part": None, "whole": None}
    return pl.DataFrame([{**row, "valid": bool(row["answer"]), **unread} for row in rows], schema=EMPTY.schema)


def with_benchmark(workspace: Path, out: Path, name: str, models: dict[str, pl.DataFrame]) -> Results:
    shutil.copytree(workspace / "data/evaluations", out / "data/evaluations")
    for arm, answers in models.items():
        folder = out / "data/benchmarks" / name / arm / "shard=00"
        folder.mkdir(parents=True)
        write_table(answers.to_arrow().cast(ANSWERS), folder / "answers.parquet", ANSWERS)
    return read_results(out / "data", FEW)


def test_a_benchmark_shows_its_authors_figures_and_the_valid_answers_of_every_model(workspace: Path, tmp_path: Path) -> None:
    base = {("a", "random"): [("yes", 1.0), ("yes", 0.0)], ("b", "random"): [("", 0.0), ("no", 1.0)]}
    better = {("a", "random"): [("yes", 1.0), ("no", 1.0)], ("b", "random"): [("yes", 1.0), ("no", 1.0)]}
    models = {arm: asked(arm, "pope", better if arm == "top" else base) for arm in ("base", "top", "bottom")}
    (pope,) = (split for split in with_benchmark(workspace, tmp_path, "pope", models).splits if split.title == "Benchmark: pope")
    assert pope.beside is not None and pope.beside.columns == ("", "base", "top", "bottom")
    rows = {row[0]: row[1:] for row in pope.beside.rows}
    assert rows["valid answers"] == ("0.75", "1", "0.75")
    assert rows["random, precision"] == ("0.3333", "1", "0.3333"), "yes, yes and, of neither word, yes again; one of them right"
    assert rows["random, f1"] == ("0.5", "1", "0.5") and "POPE (Li et al. 2023)" in pope.note


def test_figures_that_the_answers_are_not_enough_for_are_told_and_not_shown(workspace: Path, tmp_path: Path) -> None:
    models = {arm: asked(arm, "mme", {("a", "count"): [("Yes", 1.0)], ("b", "count"): [("No", 1.0)]}) for arm in ("base", "top", "bottom")}
    (mme,) = (split for split in with_benchmark(workspace, tmp_path, "mme", models).splits if split.title == "Benchmark: mme")
    assert mme.beside is None and "MME, count: a has 1 questions answered, where the score pairs two of each image" in mme.note
