"""Where an adapter comes from: one JSON file that ties what DVC recorded of every stage to commit, weights and run ids."""

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from flows.graph import LOCK, PARAMS, read_lock
from flows.promotion import adapter_sha256
from flows.workspace import Workspace
from headwise.files import sha256_file, write_json

LINEAGE = "lineage.json"
LIBRARIES = ("torch", "transformers", "peft", "dvc", "prefect", "mlflow")


def write_lineage(workspace: Workspace, run_ids: Mapping[str, str], outcomes: Mapping[str, str]) -> Path:
    """Write `lineage.json` beside the clone's `dvc.lock`, which it describes.

    It holds the commit, the checkout's uncommitted files (they did not run), the sha256 of `dvc.lock` and `params.yaml`, every stage's
    hashes and outcome, each adapter's sha256, the versions that ran, and the ids of the Prefect and MLflow runs.
    """
    folder = workspace.folder
    content = {
        "run": workspace.name,
        "git_commit": workspace.commit,
        "dirty": bool(workspace.uncommitted),
        "uncommitted": list(workspace.uncommitted),
        "dvc_lock_sha256": sha256_file(folder / LOCK),
        "params_sha256": sha256_file(folder / PARAMS),
        "stages": {name: asdict(locked) for name, locked in read_lock(folder).items() if name in outcomes},
        "outcomes": dict(outcomes),
        "adapters": {path.name: adapter_sha256(path) for path in sorted((folder / "data" / "adapters").glob("[!.]*"))},
        "ids": dict(run_ids),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "host": {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()},
    }
    write_json(content, folder / LINEAGE)
    return folder / LINEAGE
