"""What the README draws is what is there, and the repository stays light."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAX_TRACKED_MB = 24


def tracked() -> list[str]:
    return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def drawn() -> list[str]:
    """The README's tree: every word that names a file or folder, with its folder before it."""
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The house")[1].split("```")[1]
    folder, names = "", []
    for line in tree.strip("\n").splitlines():
        if not line.startswith(" "):
            folder = line.split()[0] if line.split()[0].endswith("/") else ""
            names += [line.split()[0], *re.findall(r"\b[a-z]+\.(?:yaml|toml)\b|\b[a-z]+/(?=\s)", line.partition(" ")[2])]
        else:
            names += [folder + name for name in re.findall(r"\b[a-z_0-9]+(?:\.py|/)(?=\s)", line)]
    return names


def test_everything_drawn_in_the_readme_exists() -> None:
    names = drawn()
    assert len(names) > 25, names
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not missing


def test_every_top_level_folder_is_drawn() -> None:
    folders = {name.split("/")[0] + "/" for name in tracked() if "/" in name and not name.startswith(".")}
    assert folders <= set(drawn())


def test_no_large_file_is_tracked() -> None:
    heavy = [name for name in tracked() if (ROOT / name).is_file() and (ROOT / name).stat().st_size > MAX_TRACKED_MB * 1_000_000]
    assert not heavy
