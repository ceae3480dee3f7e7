"""The end of a night, on stages that take no time: DVC, git and MLflow for real, Prefect left out, made-up answers."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from mlflow import MlflowClient
from prefect.logging import disable_run_logger

import flows.nightly
import flows.pipeline
from flows.graph import StageRun, reproduce
from flows.inspection import write_run_report
from flows.leaderboard import ranked, read_leaderboard
from flows.nightly import Result, conclude
from flows.parameters import Night
from flows.pipeline import Pipeline
from flows.registry import find_champion, registered_name
from flows.tracking import open_client, recorded
from flows.workspace import open_workspace
from headwise.calibration.adapter import adapter_digest
from headwise.evaluation.statistics import Statistics
from headwise.evaluation.table import ANSWERS
from headwise.files import read_json, write_table
from tests.flows.project import commit

STAGES = """\
stages:
  baseline:
    cmd: >-
      mkdir -p data/evaluations/base && echo {} > data/evaluations/base/metrics.json &&
      cp prepared/2.0.parquet data/evaluations/base/answers.parquet
    deps: [prepared]
    outs: [data/evaluations/base]
  evaluation:
    matrix:
      arm: ${evaluated}
    cmd: >-
      mkdir -p data/evaluations/${item.arm} && echo {} > data/evaluations/${item.arm}/metrics.json &&
      cp prepared/$(cat data/adapters/${item.arm}/adapter_model.safetensors).parquet data/evaluations/${item.arm}/answers.parquet
    deps: [prepared, "data/adapters/${item.arm}"]
    outs: ["data/evaluations/${item.arm}"]
"""
NUM_IMAGES, NUM_QUESTIONS = 20, 20
NIGHT = Night(arms=("top",), statistics=Statistics(bootstrap=200, sign_flips=200), name="one")
NAME = registered_name(NIGHT)


def _answers(nats: float) -> pl.DataFrame:
    """A caption for every image, `nats` per token and some noise, and questions of the forgetting probe that nothing unlearns."""
    noise = np.random.default_rng(round(100 * nats)).normal(0, 0.01, NUM_IMAGES)
    rows = []
    for number in range(NUM_IMAGES):
        row = {"image": f"{number}", "answer": "", "valid": True, "tokens": 10, "part": None, "whole": None}
        caption = {"example_id": f"c{number}", "split": "evaluation", "task": "caption", "right": None, "nats": 10 * (nats + noise[number])}
        probe = {"split": "forgetting", "task": "colour", "right": float(number % 2), "nats": 1.0}
        rows += [{**row, **caption}, *({**row, **probe, "example_id": f"q{number}-{k}"} for k in range(NUM_QUESTIONS))]
    types = {"right": pl.Float32, "tokens": pl.Int32, "part": pl.Float64, "whole": pl.Float64}
    return pl.DataFrame(rows, schema_overrides=types).select(ANSWERS.names)


@pytest.fixture
def checkout(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for nats in ("2.0", "1.95", "1.9", "1.8"):
        write_table(_answers(float(nats)), project / "prepared" / f"{nats}.parquet", ANSWERS)
    (project / "dvc.yaml").write_text(STAGES)
    commit(project)
    monkeypatch.setattr(flows.pipeline, "run_stage", _run_stage)
    for module, name in ((flows.pipeline, "publish_table"), (flows.nightly, "publish_verdict"), (flows.nightly, "_publish_heat_map")):
        monkeypatch.setattr(module, name, lambda *_: None)
    with disable_run_logger():
        yield project


def _run_stage(name: str, folder: Path, up_to_date: bool) -> StageRun:
    assert not up_to_date
    return reproduce(name, folder, print)


def night(nats: str, settings: Night = NIGHT, base: str = "revision") -> Result:
    """A night whose calibration gives an adapter of which only its captions' nats per token are known."""
    with open_workspace(settings.name, settings.as_params()) as workspace, recorded(open_client(), settings.name, {}) as record:
        adapter = workspace.folder / "data/adapters/top"
        shutil.rmtree(adapter, ignore_errors=True)
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text("{}")
        (adapter / "adapter_model.safetensors").write_text(nats)
        (adapter / "calibration.json").write_text(json.dumps({"adapter_sha256": adapter_digest(adapter), "base_sha256": "weights"}))
        (adapter / "manifest.json").write_text(json.dumps({"model": base}))
        pipeline = Pipeline(workspace, record, print, frozenset())
        pipeline.run(["baseline", "evaluation@top"])
        failed = {arm: reason for arm in settings.arms[1:] if (reason := pipeline.attempt([f"evaluation@{arm}"]))}
        return conclude(pipeline, settings, failed)


def _champion(client: MlflowClient) -> str | None:
    found = find_champion(client, NAME)
    return str(found.version) if found else None


def test_a_champion_is_replaced_only_by_one_that_beats_it(checkout: Path) -> None:
    first = night("1.9")
    client = open_client()
    assert first.sentence.startswith("Champion: against the base model") and _champion(client) == "1"
    for report in (first.report, write_run_report("one", None)):  # the verdict stands in the report, also in one that is written again
        assert "against the base model" in report.read_text(encoding="utf-8")
    worse = night("1.95")
    assert worse.sentence.startswith("No champion: against the base model") and "is a gain, and forgetting" in worse.sentence
    assert "; against version 1, the champion so far, evaluation caption perplexity" in worse.sentence and "is no gain" in worse.sentence
    assert set(worse.comparisons) == {"top", "champion"} and _champion(client) == "1"
    assert set(read_json(worse.folder / "lineage.json")["adapters"]) == {"top", "champion"}  # pyright: ignore[reportArgumentType]  JSON
    better = night("1.8")
    assert better.sentence.startswith("Champion: ") and "against version 1, the champion so far" in better.sentence
    assert _champion(client) == "3"
    other = night("1.95", base="another revision")
    assert other.sentence.startswith("Champion: ") and "version 3, the champion so far, is for another revision" in other.sentence


def test_a_control_that_failed_is_left_out_and_the_candidate_is_judged(checkout: Path) -> None:
    result = night("1.9", replace(NIGHT, arms=("top", "bottom")))  # nobody made an adapter for the bottom layers
    assert set(result.comparisons) == {"top"} and result.sentence.startswith("Champion: ")
    assert set(result.failed) == {"bottom"} and "data/adapters/bottom" in result.failed["bottom"]
    assert read_json(result.folder / "lineage.json")["failed"] == result.failed


def test_a_judgement_is_made_once_and_anew_when_a_rule_changes_or_it_was_cut_short(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(flows.nightly, "promote", killed)
        night("1.9")
    client = open_client()
    assert _champion(client) is None
    made = night("1.9")  # nothing is computed, yet the report, the lineage and the registry are not this night's: all are made
    assert made.recomputed == () and _champion(client) == "1"
    lineage = read_json(made.folder / "lineage.json")
    nothing_changed = f"Nothing changed: the adapter is version 1 of {NAME!r} already, "
    assert night("1.9").sentence.startswith(f"{nothing_changed}champion is version 1. Champion: ")
    assert read_json(made.folder / "lineage.json") == lineage
    client.delete_registered_model_alias(NAME, "champion")
    assert night("1.9").sentence.startswith(f"{nothing_changed}no version is champion. ") and _champion(client) is None
    stricter = night("1.9", replace(NIGHT, statistics=replace(NIGHT.statistics, margin=0.01)))
    assert "within the margin of 0.01" in stricter.sentence and _champion(client) == "1"
    rules: Any = read_json(made.folder / "lineage.json")["rules"]
    assert rules["statistics"]["margin"] == 0.01


def test_nothing_is_promoted_by_uncommitted_code_or_over_a_champion_that_cannot_be_asked(checkout: Path) -> None:
    (checkout / "flows").mkdir()
    (checkout / "flows/promotion.py").write_text("")
    refused = night("1.9")
    client = open_client()
    assert refused.sentence.startswith("No champion: ") and "not committed (flows/promotion.py)" in refused.sentence
    assert _champion(client) is None and read_json(refused.folder / "lineage.json")["uncommitted_code"] == ["flows/promotion.py"]
    commit(checkout)
    assert night("1.9").sentence.startswith("Champion: ") and _champion(client) == "1"
    shutil.move(checkout / ".headwise/mlflow", checkout / "away")
    lost = night("1.8")
    assert lost.sentence.startswith("No champion: ") and "version 1, the champion so far, could not be asked" in lost.sentence
    assert _champion(client) == "1"
    shutil.copytree(checkout / "away", checkout / ".headwise/mlflow", dirs_exist_ok=True)
    found = night("1.8")  # nothing else has changed, and yet it is judged again
    assert found.sentence.startswith("Champion: ") and _champion(client) == "2"


def test_every_judged_run_stands_on_the_leaderboard_once(checkout: Path) -> None:
    with pytest.raises(ValueError, match="no run has been judged yet"):
        read_leaderboard()
    first, _, second = night("1.9"), night("1.9"), night("1.8", replace(NIGHT, name="two"))
    board = read_leaderboard()
    assert set(board["run"]) == {"one", "two"} and board["mlflow_run"].n_unique() == 2
    for result, name in ((first, "one"), (second, "two")):
        own = board.filter(run=name, arm="top", split="evaluation", metric="perplexity")
        expected = next(c for c in result.comparisons["top"] if c.metric == "perplexity" and c.split == "evaluation")
        assert (own["effect"][0], own["low"][0], own["verdict"][0]) == (expected.effect, expected.low, expected.verdict)
    best, rows = ranked("evaluation", "perplexity", tasks=False)
    assert best["run"].to_list()[0] == "two" and len(rows) == len(best) and rows[0][1] == "two"
    assert ranked(None, None, tasks=True)[0]["task"].is_not_null().any()
    with pytest.raises(ValueError, match="no split 'pope'; there are evaluation, forgetting"):
        ranked("pope", None, tasks=False)
