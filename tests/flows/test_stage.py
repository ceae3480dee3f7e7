"""The Prefect task and the pipeline for real: Prefect's own test server, DVC, MLflow on sqlite."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, LogFilter, LogFilterFlowRunId
from prefect.runtime import flow_run

from flows.graph import StageFailed, StageRun, reproduce, stale_stages
from flows.lineage import write_lineage
from flows.pipeline import Pipeline
from flows.stage import run_stage
from flows.tracking import open_client, recorded
from flows.workspace import open_workspace
from headwise.files import read_json, sha256_file
from tests.flows.project import CONTENT, ROOT

STAGES = ("prepare", "judge@top")

pytestmark = pytest.mark.usefixtures("prefect_server")


@flow(persist_result=False)
def one_stage(name: str, folder: Path) -> tuple[StageRun, str]:
    return run_stage(name, folder), str(flow_run.id)


@flow(persist_result=False)
def two_stages(folder: Path) -> dict[str, str]:
    with open_workspace("one", CONTENT) as workspace, recorded(open_client(), "one", {}) as record:
        shown: list[str] = []
        pipeline = Pipeline(workspace, record, shown.append, set(STAGES) - (stale_stages(workspace.folder) or set(STAGES)))
        pipeline.run(STAGES)
        assert tuple(shown) == STAGES
        write_lineage(workspace, pipeline.outcomes, {"mlflow_run": record.run_id}, {"verdict": "Champion."})
        return dict(pipeline.outcomes)


@flow(persist_result=False)
def a_failing_attempt() -> tuple[str | None, bool, str | None, bool]:
    with open_workspace("one", CONTENT) as workspace, recorded(open_client(), "one", {}) as record:
        pipeline = Pipeline(workspace, record, print, frozenset())
        done = pipeline.attempt(STAGES)
        failed = pipeline.attempt([*STAGES, "failing"])
        kept = failed is not None and (workspace.folder / "data/evaluations/top").exists()
        (workspace.folder / "source.txt").unlink()
        return done, kept, pipeline.attempt(STAGES), (workspace.folder / "data/evaluations/top").exists()


def test_a_stages_lines_reach_the_runs_log_and_its_failure_is_one_sentence(project: Path) -> None:
    result, run_id = one_stage("prepare", project)
    assert (result.name, result.outcome) == ("prepare", "computed")
    assert any("cp source.txt" in line for line in _log_of(run_id))
    with pytest.raises(StageFailed, match=r"^stage failing failed: ValueError: no such image$"):
        one_stage("failing", project)


def test_a_busy_stage_is_tried_again(project: Path) -> None:
    (project / "dvc.yaml").write_text("stages:\n  slow:\n    cmd: sleep 3 && echo done > slow.txt\n    outs: [slow.txt]\n")
    first = threading.Thread(target=reproduce, args=("slow", project, print))
    first.start()
    lock = project / ".dvc/tmp/rwlock"
    while not (lock.is_file() and "slow.txt" in lock.read_text()):
        time.sleep(0.05)
    result, _ = one_stage("slow", project)
    first.join()
    assert result.outcome == "up to date"


def test_the_second_run_of_a_workspace_asks_dvc_once_and_recomputes_nothing(project: Path) -> None:
    assert two_stages(project) == dict.fromkeys(STAGES, "computed")
    folder = project / ".headwise/runs/one"
    lineage = read_json(folder / "lineage.json")
    assert lineage["dvc_lock_sha256"] == sha256_file(folder / "dvc.lock") and lineage["params_sha256"] == sha256_file(
        folder / "params.yaml"
    )
    assert lineage["outcomes"] == dict.fromkeys(STAGES, "computed") and lineage["dirty"] is False and lineage["verdict"] == "Champion."
    assert lineage["requirements_sha256"] == sha256_file(project / "requirements.lock")
    assert set(lineage["stages"]) == set(STAGES)  # pyright: ignore[reportArgumentType]  JSON
    assert two_stages(project) == dict.fromkeys(STAGES, "up to date")
    client = open_client()
    experiment = client.get_experiment_by_name("headwise")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.outcome = 'computed'")
    assert sorted(str(run.info.run_name) for run in runs) == sorted(STAGES)
    assert {run.data.metrics.get("loss.value") for run in runs} == {2.0, None}
    with get_client(sync_client=True) as prefect:
        artifacts = prefect.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["judge-top"])))
    assert [artifact.data for artifact in artifacts] == ['[{"quantity": "loss.value", "value": 2.0}]'] * 2


def test_a_stage_that_the_rest_can_do_without_leaves_its_reason_and_no_old_outputs(project: Path) -> None:
    done, kept, reason, left = a_failing_attempt()
    assert done is None and kept and reason is not None and "source.txt" in reason and not left


SLEEP = """
from pathlib import Path
from flows.cli import app
from flows.console import plain_errors
from flows.terminal import without_tracebacks
from tests.flows.test_stage import one_stage

@app.command()
def sleep() -> None:
    with plain_errors(), without_tracebacks():
        one_stage("sleeping", Path())

app(["sleep"])
"""


@pytest.mark.parametrize(("number", "word"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_asked_to_stop_a_command_says_so_in_a_line_and_takes_its_stage_along(project: Path, number: signal.Signals, word: str) -> None:
    with get_client(sync_client=True) as client:
        environment = {**os.environ, "PREFECT_API_URL": str(client.api_url), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", SLEEP], env=environment, stderr=subprocess.PIPE, text=True)
    pid_file = project / "sleeper.pid"
    while not (pid_file.is_file() and pid_file.read_text().strip()):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert f"headwise: stopped by {word}" in errors and "Traceback" not in errors and len(errors.splitlines()) < 12
    with pytest.raises(ProcessLookupError):
        while True:  # until init has collected it
            os.kill(int(pid_file.read_text()), 0)
            time.sleep(0.05)


def _log_of(run_id: str) -> list[str]:
    from uuid import UUID

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with get_client(sync_client=True) as client:
            lines = [log.message for log in client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[UUID(run_id)])))]
        if any("computed" in line for line in lines):
            return lines
        time.sleep(0.2)
    return []
