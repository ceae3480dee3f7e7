"""Where a run keeps its things, and the variables that Prefect, MLflow and DVC read when they are imported: set here and nowhere else.

`flows/__init__.py` calls `set_defaults` before any module of this package imports Prefect. A variable that is already set stays as it is.
"""

import os
from pathlib import Path

from tasks.command import RESPONSES

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Nothing is reported to anybody, and no bar for copying a file."""


def set_defaults() -> None:
    """Telemetry off; inside a checkout Prefect's database and settings, and what models said, under `.headwise`."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    root = _find_checkout()
    if root is not None:
        (root / ".headwise").mkdir(exist_ok=True)  # Prefect makes its own home, but not the folder around it
        os.environ.setdefault("PREFECT_HOME", str(root / ".headwise" / "prefect"))
        os.environ.setdefault(RESPONSES, str(root / ".headwise" / "responses.sqlite"))


def checkout() -> Path:
    """The project that a command works on: the nearest folder upwards of the working directory with a `dvc.yaml`.

    Raises ValueError if there is none.
    """
    root = _find_checkout()
    if root is None:
        raise ValueError(f"{Path.cwd()}: no dvc.yaml here or above; run headwise inside its checkout")
    return root


def state() -> Path:
    """`.headwise` in the checkout: the runs' clones, the databases of Prefect and MLflow. Never committed."""
    return checkout() / ".headwise"


def _find_checkout() -> Path | None:
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "dvc.yaml").is_file()), None)
