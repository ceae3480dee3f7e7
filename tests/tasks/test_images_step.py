"""The images step on disk: the manifest, and a full disk."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headwise.cutouts import Photographs, read_photographs
from headwise.data import DataSource
from headwise.files import read_json, sha256_tree
from tasks.images import run

SMALL = DataSource(calibration=3, evaluation=2, forgetting=2)

FULL_DISK = """
import resource, sys
from pathlib import Path
from headwise.data import DataSource
from tasks.images import run
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    run(DataSource(calibration=3, evaluation=2, forgetting=2, seed=1), Path(sys.argv[1]))
except OSError as error:
    sys.exit(f"{type(error).__name__}: {error.strerror}")
"""


def test_a_disk_that_fills_leaves_the_old_data_whole(tmp_path: Path) -> None:
    """A limit on the size of a file fails a write in the middle, as a full disk does, and needs no rights."""
    out = tmp_path / "images"
    run(SMALL, out)
    before = sha256_tree(out)
    room = max(path.stat().st_size for path in out.rglob("*.png")) // 2
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(out), str(room)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "File too large" in done.stderr
    assert sha256_tree(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_the_manifest_names_the_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = some_photographs(tmp_path / "found")
    monkeypatch.setattr("headwise.data.installed_photographs", lambda: found)
    run(DataSource(kind="photos", calibration=2, evaluation=2, forgetting=2), tmp_path / "images")
    assert read_json(tmp_path / "images" / "manifest.json")["inputs"] == {"photographs": found.digest()}


def some_photographs(root: Path) -> Photographs:
    rng = np.random.default_rng(0)
    for folder in ("cutouts", "backgrounds"):
        (root / folder).mkdir(parents=True)
    for number in range(24):
        Image.new("RGBA", (40, 40), (*(int(c) for c in rng.integers(0, 256, 3)), 255)).save(
            root / "cutouts" / f"thing-{chr(97 + number)}.png"
        )
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(root / "backgrounds" / f"{number}.jpg")
    return read_photographs(root / "cutouts", root / "backgrounds")
