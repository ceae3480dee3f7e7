"""One night's workspace and its report, made once for all tests of the page."""

from pathlib import Path

import pytest

from headwise.report import write_report
from tests.report.artefacts import Size, write_workspace

RUN = {"verdict": "Not promoted: the interval touches no change.", "Prefect flow run": "b7a1<&>", "commit": "24ea403d1c"}
QUESTION = 'Is 2 < 3 & "<script>alert(1)</script>" written?'


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_workspace(tmp_path_factory.mktemp("workspace"), Size(), question=QUESTION)


@pytest.fixture(scope="session")
def page(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(workspace, tmp_path_factory.mktemp("site") / "report", RUN)
