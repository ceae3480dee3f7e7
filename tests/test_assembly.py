"""The cache of the assembled embedded model: what it is keyed on, and that it is made once."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import transformers

from headwise import smol
from headwise.files import new_folder


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were assembled, by a stand-in that takes its time."""
    folders: list[Path] = []

    def assemble(folder: Path) -> None:
        folders.append(folder)
        with new_folder(folder) as temporary:
            time.sleep(0.2)
            (temporary / "config.json").write_text("{}")

    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smol, "_assemble", assemble)
    return folders


def test_of_two_at_once_one_assembles_and_the_other_waits(made: list[Path]) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: smol.smol_path(), range(4)))
    assert found == set(made) and len(made) == 1
    assert (made[0] / "config.json").is_file()


def test_other_weights_code_or_transformers_make_another_folder(made: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert smol.smol_path() == smol.smol_path()
    with monkeypatch.context() as patch:
        patch.setattr(transformers, "__version__", "0.0")
        smol.smol_path()
    for name, content in (("WEIGHTS", "weights"), ("__file__", "code")):
        (tmp_path / content).write_text(content)
        with monkeypatch.context() as patch:
            patch.setattr(smol, name, tmp_path / content)
            smol.smol_path()
    assert len(set(made)) == len(made) == 4


def test_only_the_load_report_is_unsaid_and_only_inside(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(caplog.handler)
    try:
        with smol._without_load_report():
            logger.warning("Model LOAD REPORT from: None")
            logger.warning("something else")
        logger.warning("Model LOAD REPORT from: a folder")
    finally:
        logger.removeHandler(caplog.handler)
    assert "from: None" not in caplog.text
    assert "something else" in caplog.text and "from: a folder" in caplog.text
