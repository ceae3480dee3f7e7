"""Pretraining puts its weights into the package whole or not at all."""

import shutil
from pathlib import Path

import pytest

import flows.pretrain
from flows.pretrain import pretrain

NAMES = ("adapter_config.json", "adapter_model.safetensors")


def test_a_copy_that_breaks_off_leaves_the_weights_in_use(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, used = project / "trained", project / "used"
    for folder in (trained, used):
        folder.mkdir()
        for name in NAMES:
            (folder / name).write_text(folder.name)
    monkeypatch.setattr(flows.pretrain, "train", lambda *_: trained)
    monkeypatch.setattr(flows.pretrain, "WEIGHTS", used)
    monkeypatch.setattr(flows.pretrain, "smol_path", lambda: used)

    def half(_source: Path, target: Path) -> None:
        Path(target).write_text("tra")
        raise OSError("no space left on the device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(shutil, "copyfile", half)
        pretrain.fn()
    assert {path.name: path.read_text() for path in used.iterdir()} == dict.fromkeys(NAMES, "used")
    pretrain.fn()
    assert {path.name: path.read_text() for path in used.iterdir()} == dict.fromkeys(NAMES, "trained")
