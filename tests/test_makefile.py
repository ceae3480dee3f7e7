"""What the targets of the Makefile would do, as `make -n` tells."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def commands(*arguments: str) -> str:
    return subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_a_folder_with_spaces_is_one_argument() -> None:
    assert "headwise run --data 'My photos'\n" in commands("run", "DATA=My photos")
    assert "apt-get" not in commands("run", "DATA=My photos")
    assert all(package in commands("run", "DATA=photos") for package in ("tuxpaint", "lomiri", "mate-backgrounds"))


def test_clean_keeps_every_run_and_forget_asks_first() -> None:
    assert ".headwise" not in commands("clean") and ".dvc" not in commands("clean")
    refused = subprocess.run(["make", "forget", "FORCE="], cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode and "make forget FORCE=1" in refused.stderr
