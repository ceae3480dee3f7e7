"""Where an adapter comes from: one JSON file that ties what DVC recorded of every stage to commit, weights, verdict and run ids."""

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from flows.graph import LOCK, PARAMS, read_lock
from flows.registry import read_adapter
from flows.workspace import Workspace
from headwise.evaluation.conditions import conditions
from headwise.evaluation.table import BASE
from headwise.files import read_json, sha256_file, write_json

LINEAGE = "lineage.json"
REQUIREMENTS = "requirements.lock"
LIBRARIES = ("torch", "transformers", "peft", "dvc", "prefect", "mlflow")


def judgement_digest(workspace: Workspace, stages: Iterable[str], rules: Mapping[str, object]) -> str:
    """SHA-256 of all that a verdict depends on: what `dvc.lock` recorded of the stages, the commit, uncommitted code, the rules.

    While it stays the same, report, lineage and registry are those of this judgement.
    """
    lock = read_lock(workspace.folder)
    content = {
        "stages": {name: asdict(lock[name]) for name in stages},
        "commit": workspace.commit,
        "uncommitted_code": workspace.uncommitted_code,
        "rules": rules,
    }
    return sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def write_lineage(workspace: Workspace, outcomes: Mapping[str, str], ids: Mapping[str, str], judged: Mapping[str, object]) -> Path:
    """Write `lineage.json` beside the clone's `dvc.lock`, which it describes.

    It holds the commit, the checkout's uncommitted files (the stages ran without them; the flow itself is imported from the checkout, so
    `uncommitted_code` judged), the sha256 of `dvc.lock`, `params.yaml` and `requirements.lock`, every stage's hashes and outcome, the
    conditions of the evaluations with the model's revision, each adapter's sha256 and that of its base weights, the versions that ran,
    the ids of the Prefect and MLflow runs, and what was judged: by which rules, the verdict, its digest and the arms that failed.
    """
    folder = workspace.folder
    arms = [name.partition("@")[2] for name in outcomes if name.startswith("evaluation@")]
    adapters = {arm: read_adapter(folder / "data" / "adapters" / arm) for arm in arms}
    content = {
        "run": workspace.name,
        "git_commit": workspace.commit,
        "dirty": bool(workspace.uncommitted),
        "uncommitted": list(workspace.uncommitted),
        "uncommitted_code": list(workspace.uncommitted_code),
        "dvc_lock_sha256": sha256_file(folder / LOCK),
        "params_sha256": sha256_file(folder / PARAMS),
        "requirements_sha256": sha256_file(folder / REQUIREMENTS),
        "stages": {name: asdict(locked) for name, locked in read_lock(folder).items() if name in outcomes},
        "outcomes": dict(outcomes),
        "evaluated": conditions(folder / "data" / "evaluations" / BASE),
        "adapters": {arm: {"sha256": adapter.sha256, "base_sha256": adapter.base_sha256} for arm, adapter in adapters.items()},
        "ids": dict(ids),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "host": {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count()},
        **judged,
    }
    write_json(content, folder / LINEAGE)
    return folder / LINEAGE


def read_lineage(folder: Path) -> dict[str, object]:
    """The lineage of a clone; empty before its first run was judged."""
    return read_json(folder / LINEAGE) if (folder / LINEAGE).is_file() else {}


def report_ids(lineage: Mapping[str, object]) -> dict[str, str]:
    """What the report shows of a run: the ids of its origin, and the verdict that stands at the top."""
    ids = lineage.get("ids", {})
    assert isinstance(ids, Mapping)
    shown = {**ids, "verdict": lineage.get("verdict")}
    return {str(name): str(value) for name, value in shown.items() if value is not None}
