"""MLflow for real, on sqlite."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from flows.graph import Locked
from flows.server import Unreachable, check_reachable
from flows.tracking import DATA, Record, open_client, recorded

DIGEST = "d41d8cd98f00b204e9800998ecf8427e.dir"


@contextmanager
def _run(client: MlflowClient) -> Iterator[Record]:
    with recorded(client, "night", {"git.commit": "abc"}) as record:
        yield record


def _found(client: MlflowClient) -> dict[str, Run]:
    experiment = client.get_experiment_by_name("headwise")
    assert experiment is not None
    return {str(run.info.run_name): run for run in client.search_runs([experiment.experiment_id])}


def test_a_parent_run_holds_a_nested_run_per_stage(project: Path) -> None:
    client = open_client()
    locked = Locked("cmd", {DATA: DIGEST}, {"data/attention/shard=00": DIGEST}, {"scores.threshold": "mean", "long": "x" * 7000})
    with _run(client) as record:
        record.stage("scores", locked, {"evaluation.mean + 1 std": 0.5, "nothing": float("nan")}, {"outcome": "computed"})
        (project / "lineage.json").write_text("{}")
        record.file(project / "lineage.json")
        record.tags({"verdict": "none"})
    runs = _found(client)
    parent, stage = runs["night"], runs["scores"]
    assert parent.info.status == stage.info.status == "FINISHED"
    assert (parent.data.tags["git.commit"], parent.data.tags["verdict"]) == ("abc", "none")
    assert stage.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert stage.data.tags["dvc.md5.data/attention/shard-00"] == DIGEST and stage.data.tags["outcome"] == "computed"
    assert stage.data.metrics == {"evaluation.mean - 1 std": 0.5}
    assert stage.data.params["scores.threshold"] == "mean" and len(stage.data.params["long"]) == 6000
    assert stage.inputs is not None
    assert [(read.dataset.name, read.dataset.digest) for read in stage.inputs.dataset_inputs] == [("images", DIGEST)]
    assert (project / ".headwise/mlflow" / parent.info.run_id / "artifacts/lineage.json").is_file()


@pytest.mark.parametrize(("raised", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")])
def test_a_run_never_stays_running(project: Path, raised: type[BaseException], status: str) -> None:
    client = open_client()
    with pytest.raises(raised), _run(client):
        raise raised
    assert _found(client)["night"].info.status == status


def test_the_database_is_upgraded_once(project: Path) -> None:
    open_client()
    stamp = project / ".headwise/mlflow.db.version"
    before = stamp.stat().st_mtime_ns
    open_client()
    assert stamp.stat().st_mtime_ns == before and stamp.read_text().startswith("3.")


def test_a_server_that_does_not_answer_is_named_before_any_work(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match=r"MLFLOW_TRACKING_URI = http://127\.0\.0\.1:9: no answer .* nothing was run"):
        open_client()
    assert not (project / ".headwise").exists()


def test_only_servers_are_asked_for_their_health() -> None:
    check_reachable("sqlite:////nowhere/mlflow.db", "MLFLOW_TRACKING_URI")
