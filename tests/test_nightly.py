"""The whole night for real, on a tiny model with random weights: Prefect, DVC, MLflow, every step in a process of its own."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import polars as pl
import pytest
from mlflow import MlflowClient
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from flows.ablations import ablations
from flows.cells import Cell
from flows.controls import run_seed
from flows.nightly import Result, arm_stages, nightly, shared_stages
from flows.parameters import Night as Settings
from flows.parameters import Parameters
from flows.registry import registered_name
from flows.steering import steering
from flows.tracking import open_client
from headwise.arms import HEAD_ARMS
from headwise.benchmarks.benchmark import Source
from headwise.calibration.adapter import load
from headwise.calibration.rah_lora.settings import RahLora
from headwise.calibration.settings import Lora
from headwise.calibration.zerotuning.settings import ZeroTuning
from headwise.data import DataSource
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.statistics import Statistics
from headwise.files import read_json, sha256_tree
from headwise.observation import Observation
from headwise.profile.settings import Profile
from headwise.scores.head_impact import HeadImpact
from headwise.selection import Criterion
from headwise.vlm import load_vlm
from tests import tiny
from tests.flows.project import ROOT, commit, git
from tests.test_texts import sst2

pytestmark = pytest.mark.timeout(1500)


@dataclass(frozen=True)
class Night:
    """A checkout in which the nightly flow ran twice with the same parameters."""

    checkout: Path
    parameters: Settings
    first: Result
    second: Result
    second_seconds: float

    @property
    def folder(self) -> Path:
        return self.first.folder

    @property
    def registered(self) -> str:
        return registered_name(self.parameters)


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Iterator[Night]:
    root = tmp_path_factory.mktemp("night")
    model = tiny.save(tiny.new_tiny_vlm(), root / "model")
    parameters = Settings(
        images=DataSource(calibration=16, evaluation=24, forgetting=16),
        attention=Observation(model=str(model), dtype="float32"),
        scores=HeadImpact(mask_threshold=0, min_images=5, bootstrap=20),
        selection=Criterion(k=2),
        calibration=Lora(steps=2, batch_size=4),
        evaluation=Evaluation(max_new_tokens=2),
        statistics=Statistics(bootstrap=200, sign_flips=200, margin=0.5),
        benchmarks=(Source(name="pope", limit=6),),
        profile=Profile(examples=6, probes=3, max_new_tokens=3),
        rah_lora=RahLora(p_isal=40.0, p_caf=20.0, layers=(0.0, 1.0), beta=0.0, delta=1.0),
        arms=("top", "rah"),
        name="tiny",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(_checkout(root / "checkout"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        first = _run(parameters)
        start = time.monotonic()
        second = _run(parameters)
        yield Night(root / "checkout", parameters, first, second, time.monotonic() - start)


def _checkout(folder: Path) -> Path:
    """This repository's graph and steps, as they lie here, in a commit."""
    skipped = shutil.ignore_patterns("__pycache__", "weights", "tmp", "cache", "config.local")
    for name in ("headwise", "tasks", ".dvc"):
        shutil.copytree(ROOT / name, folder / name, ignore=skipped)
    for name in ("dvc.yaml", "params.yaml", ".dvcignore", ".gitignore", "data/.gitignore", "requirements.lock", "infra/harness.lock"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    git(folder, "init", "--quiet", "--initial-branch=main")
    commit(folder)
    return folder


def _run(parameters: Settings) -> Result:
    result = nightly(parameters)
    assert isinstance(result, Result)
    return result


def of_the_arms(night: Night) -> list[str]:
    return [stage for arm in night.parameters.arms for stage in arm_stages(arm, night.parameters)]


def test_every_stage_ran_and_the_second_run_recomputed_nothing(night: Night) -> None:
    assert list(night.first.recomputed) == [*shared_stages(night.parameters), *of_the_arms(night)]
    assert night.second.recomputed == ()
    assert night.second.comparisons == night.first.comparisons


def test_the_adapter_loads_in_the_model_and_is_the_one_that_was_traced(night: Night) -> None:
    adapter = night.folder / "data/adapters/top"
    assert load(load_vlm(night.parameters.attention.model, dtype="float32"), adapter).num_layers == tiny.NUM_LAYERS
    digest = read_json(adapter / "calibration.json")["adapter_sha256"]
    base_digest = read_json(adapter / "calibration.json")["base_sha256"]
    traced = read_json(night.folder / "lineage.json")["adapters"]
    assert isinstance(traced, dict) and set(traced) == {"top", "rah"}
    assert traced["top"] == {"sha256": digest, "base_sha256": base_digest} and traced["rah"]["base_sha256"] == base_digest
    evaluated = read_json(night.folder / "data/evaluations/top/manifest.json")["inputs"]
    assert isinstance(evaluated, dict) and evaluated["adapter"] == sha256_tree(adapter)
    version = open_client().get_model_version_by_alias(night.registered, "challenger")
    assert (str(version.version), version.tags["adapter.sha256"]) == ("1", digest)
    assert len(open_client().search_model_versions(f"name = '{night.registered}'")) == 1


def test_rah_lora_calibrated_heads_without_labels(night: Night) -> None:
    adapter = night.folder / "data/adapters/rah"
    assert load(load_vlm(night.parameters.attention.model, dtype="float32"), adapter).num_layers == tiny.NUM_LAYERS
    found = read_json(adapter / "calibration.json")
    assert found["accepted"] and 0 < float(str(found["kl"])) <= night.parameters.rah_lora.delta
    assert "arm “rah” calibrated" in night.first.report.read_text(encoding="utf-8")


def test_the_registered_model_answers(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.pyfunc import load_model

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{night.checkout / '.headwise/mlflow.db'}")
    image = next((night.folder / "data/images/images").glob("*.png"))
    answers = load_model(f"models:/{night.registered}@challenger").predict([{"image": str(image), "question": "What colour?"}])
    assert len(answers) == 1 and isinstance(answers[0], str)


def test_mlflow_holds_a_parent_and_a_nested_run_per_stage_of_each_night(night: Night) -> None:
    client: MlflowClient = open_client()
    experiment = client.get_experiment_by_name("headwise")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    parents = {run.info.run_id: run for run in runs if run.info.run_name == "tiny"}
    assert sorted(run.data.tags["recomputed"] == "nothing" for run in parents.values()) == [False, True]
    stages = [*shared_stages(night.parameters), *of_the_arms(night)]
    for parent in parents:
        nested = {str(run.info.run_name): run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent}
        assert sorted(nested) == sorted(stages)
        assert nested["evaluation@top"].data.metrics["evaluation.perplexity"] > 1
        assert nested["calibration@top"].data.params["calibration.steps"] == "2"
        assert nested["scores"].data.tags["dvc.md5.data/scores"].endswith(".dir")


def test_lineage_names_the_run_that_computed(night: Night) -> None:
    lineage = read_json(night.folder / "lineage.json")
    assert lineage["git_commit"] == git(night.checkout, "rev-parse", "HEAD")
    assert set(lineage["outcomes"].values()) == {"computed"}  # pyright: ignore[reportAttributeAccessIssue]  JSON
    stages = lineage["stages"]
    assert isinstance(stages, dict)
    weights = stages["attention@0"]["deps"][night.parameters.attention.model]
    assert {stage["deps"].get(night.parameters.attention.model, weights) for stage in stages.values()} == {weights}


def test_the_report_and_prefects_artifacts_are_there(night: Night) -> None:
    assert "<html" in night.first.report.read_text(encoding="utf-8").lower()
    with get_client(sync_client=True) as client:
        wanted = ["images", "masks-0", "scores", "attention-0", "evaluation-top", "baseline", "heat-map", "verdict"]
        chosen = ArtifactFilter(key=ArtifactFilterKey(any_=wanted))
        found = {artifact.key: artifact for artifact in client.read_artifacts(artifact_filter=chosen)}
    assert set(found) == set(wanted)
    assert str(found["heat-map"].data).startswith("data:image/png;base64,")
    assert "95 % interval" in str(found["verdict"].data)


def test_a_run_that_changes_nothing_takes_seconds(night: Night) -> None:
    """Without the imports, and however busy the machine is: a stage that DVC is asked about one by one would cost 12 times a second."""
    assert night.second_seconds < 60


def test_a_night_of_rah_lora_alone_makes_no_masks_and_is_judged(night: Night) -> None:
    alone = replace(night.parameters, arms=("rah",), measured=("rah",), benchmarks=(), name="heads")
    result = _run(alone)
    assert not {name.partition("@")[0] for name in result.recomputed} & {"masks", "attention", "scores", "selection", "calibration"}
    assert (result.folder / "data/gains/rah/gains.parquet").is_file() and {"rah"} <= set(result.comparisons) <= {"rah", "champion"}
    assert result.sentence.startswith(("No champion:", "Champion:")) and "calibrated heads" in result.report.read_text(encoding="utf-8")


def test_a_failed_cell_of_the_controls_is_a_cell_with_its_reason(night: Night) -> None:
    impossible = replace(night.parameters, selection=Criterion(k=99), arms=("top", "bottom"))
    cell = one_cell(impossible)
    assert isinstance(cell, dict) and isinstance(cell["base"], pl.DataFrame)
    assert all("k = 99 layers asked for, the model has 4" in str(cell[arm]) for arm in impossible.arms)


@pytest.mark.slow
def test_the_ablations_end_in_a_page_though_an_arm_fails(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it: both data sets, a greedy arm, shuffled and blank images, the adapter of the other data, what single heads bring."""
    monkeypatch.setitem(HEAD_ARMS, "rah-random", {"rank": -1})  # pyright: ignore[reportArgumentType, reportIndexIssue]  a dict
    settings = replace(night.parameters, benchmarks=(), arms=("rah", "rah-random", "rah-greedy-2"), measured=("rah",))
    plain = Parameters(**{field.name: getattr(settings, field.name) for field in fields(Parameters)})
    page = ablations(plain, data=("scenes", "photos"), seeds=(7,))
    assert isinstance(page, Path)
    text = page.read_text(encoding="utf-8")
    lines = {tuple(line.split(" | ")[:3]) for line in text.splitlines() if line.startswith("| scenes") or line.startswith("| photos")}
    others = ("rah on shuffled pairs", "rah on blank images", "rah of the other data")
    assert {("| scenes", arm, "base") for arm in ("rah", "rah-greedy-2", *others)} <= lines
    assert {("| photos", arm, "base") for arm in ("rah", "rah of the other data")} <= lines
    assert "- scenes, rah-random, seed 7: " in text and "rank" in text and not [line for line in lines if line[1] == "rah-random"]
    assert "scenes, single heads:" in text and "photos, single heads:" in text and "scenes, singular values:" in text


@pytest.mark.slow
def test_steering_is_judged_on_texts_and_ends_in_a_page(night: Night, tmp_path: Path) -> None:
    """A night whose candidate steers a text-only model, and the comparison with its controls and with an arm that fails."""
    model = tiny.save(tiny.new_tiny_lm(), tmp_path / "lm")
    settings = replace(
        night.parameters,
        images=DataSource(kind="texts", texts="sst2", path=str(sst2(tmp_path / "files", 60)), calibration=30, evaluation=30),
        attention=Observation(model=str(model), dtype="float32", chat_template=False),
        evaluation=Evaluation(closed="labels"),
        zerotuning=ZeroTuning(examples=20, shares=(0.3,), up=(2.0,), down=(0.5,)),
        benchmarks=(),
        arms=("zero", "label-bias"),
        name="steered",
    )
    result = _run(settings)
    assert set(result.comparisons) == {"zero", "label-bias"} and result.sentence.startswith("No champion:")
    assert "Steering, arm by arm" in result.report.read_text(encoding="utf-8")
    plain = Parameters(**{field.name: getattr(settings, field.name) for field in fields(Parameters)})
    page = steering(replace(plain, arms=("zero", "zero-exact", "label-bias", "temperature", "auto-pasta")), seeds=(7, 8))
    assert isinstance(page, Path)
    text = page.read_text(encoding="utf-8")
    arms = [line.split(" | ")[0] for line in text.partition("\n\n")[0].splitlines()[2:]]
    assert arms == [f"| {arm}" for arm in ("base", "zero", "zero-exact", "label-bias", "temperature", "auto-pasta")]
    assert "zero against the control label-bias" in text and "zero against zero-exact" in text and "rank correlation" in text


@flow(persist_result=False)
def one_cell(settings: Parameters) -> Cell:
    return run_seed(0, settings)
