"""A real git and DVC project with stages that take no time, to try out everything that surrounds a stage."""

import os
import shutil
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
STAGES = """\
stages:
  prepare:
    cmd: mkdir -p data/images && cp source.txt data/images/all.txt
    deps: [source.txt]
    params: [images]
    outs: [data/images]
  judge:
    matrix:
      arm: ${arms}
    cmd: |-
      mkdir -p data/evaluations/${item.arm} && echo '{"loss":{"value":${scale}}}' > data/evaluations/${item.arm}/metrics.json
    deps: [data/images]
    params: [scale]
    outs: ["data/evaluations/${item.arm}"]
"""
OTHER_STAGES = """\
  failing:
    cmd: |-
      echo working; echo "ValueError: no such image" >&2; exit 3
  sleeping:
    cmd: sleep 600 & echo $! > sleeper.pid; wait
"""
PARAMS = "images: {size: 3}\nscale: 2\narms: [top, bottom]\n"
CONTENT = yaml.safe_load(PARAMS)


def make_project(folder: Path) -> Path:
    """Commit the project in `folder`, with this repository's DVC settings."""
    folder.mkdir(parents=True)
    shutil.copytree(ROOT / ".dvc", folder / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache", "config.local"))
    (folder / "dvc.yaml").write_text(STAGES + OTHER_STAGES)
    (folder / "params.yaml").write_text(PARAMS)
    (folder / "source.txt").write_text("one\n")
    (folder / "requirements.lock").write_text("torch==2.14.1\n")
    (folder / ".gitignore").write_text("/.headwise/\n/data/\nsleeper.pid\n")
    git(folder, "init", "--quiet", "--initial-branch=main")
    commit(folder)
    return folder


def commit(folder: Path) -> str:
    """Commit everything; returns the commit."""
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=change")
    return git(folder, "rev-parse", "HEAD")


def git(folder: Path, *arguments: str) -> str:
    """The output of a git command by an author of no machine's configuration."""
    names = {
        f"GIT_{role}_{field}": value for role in ("AUTHOR", "COMMITTER") for field, value in (("NAME", "T"), ("EMAIL", "t@example.org"))
    }
    done = subprocess.run(["git", "-C", str(folder), *arguments], env={**os.environ, **names}, capture_output=True, text=True, check=True)
    return done.stdout.strip()
