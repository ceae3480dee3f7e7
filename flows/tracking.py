"""MLflow: one parent run per flow run, one nested run per stage; explicit ids, never the global active run.

`MLFLOW_TRACKING_URI` names the server or database; without it `.headwise/mlflow.db`, with the artifacts beside it.
"""

import contextlib
import fcntl
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.environment import state
from flows.graph import Locked
from flows.server import check_reachable

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "headwise"
DATA = "data/images"
UNSAFE = re.compile(r"[^\w. :/-]")
"""What MLflow allows in no name."""

LONGEST_VALUE = 6000
"""MLflow refuses longer parameter values."""


@dataclass(frozen=True)
class Record:
    """An open parent run in MLflow."""

    client: "MlflowClient"
    experiment_id: str
    run_id: str

    def stage(self, name: str, locked: Locked, metrics: Mapping[str, float], tags: Mapping[str, str]) -> str:
        """A nested run for one stage: its parameters, metrics, output digests as tags, and the data set it read; returns its id."""
        from mlflow.entities import Metric, Param, RunTag

        hashes = {f"dvc.md5.{path}": digest for path, digest in locked.outs.items()}
        run = self.client.create_run(self.experiment_id, run_name=name, tags={"mlflow.parentRunId": self.run_id})
        run_id, now = run.info.run_id, int(time.time() * 1000)
        self.client.log_batch(
            run_id,
            metrics=[Metric(_name(key), value, now, 0) for key, value in metrics.items() if math.isfinite(value)],
            params=[Param(_name(key), str(value)[:LONGEST_VALUE]) for key, value in locked.params.items()],
            tags=[RunTag(_name(key), value) for key, value in {**hashes, **tags}.items()],
        )
        if DATA in locked.deps:
            self._log_dataset(run_id, locked.deps[DATA])
        self.client.set_terminated(run_id)
        return run_id

    def _log_dataset(self, run_id: str, digest: str) -> None:
        """DVC's `<md5>.dir` is exactly the 36 characters that MLflow allows a digest."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(name="images", digest=digest, source_type="dvc", source=DATA)
        self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "input")])])

    def metrics(self, values: Mapping[str, float]) -> None:
        """Metrics of the parent run."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run_id, metrics=[Metric(_name(key), value, now, 0) for key, value in values.items()])

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags of the parent run."""
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in values.items()])

    def file(self, path: Path) -> None:
        """A file as an artifact of the parent run."""
        self.client.log_artifact(self.run_id, str(path))

    def folder(self, path: Path, name: str) -> None:
        """A folder's content as artifacts of the parent run, under `name`."""
        self.client.log_artifacts(self.run_id, str(path), name)


def _name(text: str) -> str:
    return UNSAFE.sub("-", text)


def tracking_uri() -> str:
    """Where MLflow keeps its runs: the environment's choice, or the database in the checkout."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{state() / 'mlflow.db'}"


def open_client() -> "MlflowClient":
    """A client of a reachable, up-to-date store. Raises Unreachable."""
    uri = tracking_uri()
    check_reachable(uri, "MLFLOW_TRACKING_URI")
    if uri.startswith("sqlite:///"):
        _upgrade_once(uri)
    from mlflow import MlflowClient

    return MlflowClient(uri, uri)


@contextlib.contextmanager
def recorded(client: "MlflowClient", name: str, tags: Mapping[str, str]) -> Iterator[Record]:
    """A parent run that ends FINISHED, FAILED, or KILLED where the process was asked to stop."""
    experiment_id = _experiment(client)
    run = client.create_run(experiment_id, run_name=name, tags=dict(tags))
    status = "KILLED"
    try:
        yield Record(client, experiment_id, run.info.run_id)
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        client.set_terminated(run.info.run_id, status=status)


def _experiment(client: "MlflowClient") -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is not None:
        return found.experiment_id
    is_local = tracking_uri() == f"sqlite:///{state() / 'mlflow.db'}"  # a server chooses its own place for artifacts
    return client.create_experiment(EXPERIMENT, artifact_location=(state() / "mlflow").as_uri() if is_local else None)


def _upgrade_once(uri: str) -> None:
    """Run `mlflow db upgrade` once per database and MLflow version: two writers that both create the tables spoil them."""
    from importlib.metadata import version

    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    done = database.with_name(f"{database.name}.version")
    with done.open("a+", encoding="utf-8") as stamp:
        fcntl.flock(stamp, fcntl.LOCK_EX)
        stamp.seek(0)
        if database.is_file() and stamp.read() == version("mlflow"):
            return
        result = subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", uri], capture_output=True, text=True, check=False)
        if result.returncode:
            raise ValueError(f"mlflow db upgrade {uri}: {(result.stderr.strip() or 'failed').splitlines()[-1]}")
        stamp.truncate(0)
        stamp.write(version("mlflow"))
