"""A run's own clone of the project: only commits run, and nothing that the user edits meanwhile changes a run."""

import contextlib
import fcntl
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from flows.environment import checkout, state
from flows.graph import DVC, LOCK, PARAMS
from headwise.files import new_file

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


@dataclass(frozen=True)
class Workspace:
    """The clone of one run: its name and folder, the commit that runs, and the checkout's uncommitted files, which do not."""

    name: str
    folder: Path
    commit: str
    uncommitted: tuple[str, ...]


def runs_folder() -> Path:
    """`.headwise/runs`: one clone per run name."""
    return state() / "runs"


def find_run(name: str | None) -> Path:
    """The clone of the named run, or of the latest one.

    Raises ValueError naming the runs that exist.
    """
    runs = sorted((run for run in runs_folder().glob("[!.]*") if (run / PARAMS).is_file()), key=lambda run: (run / PARAMS).stat().st_mtime)
    found = [run for run in runs if name in (None, run.name)]
    if not found:
        known = ", ".join(sorted(run.name for run in runs)) or "none yet: start with `headwise run`"
        raise ValueError(f"no run named {name!r}; the runs are: {known}" if name else f"no run: {known}")
    return found[-1]


@contextlib.contextmanager
def open_workspace(name: str, params: Mapping[str, object]) -> Iterator[Workspace]:
    """The clone `.headwise/runs/NAME` at the checkout's HEAD with these parameters in `params.yaml`, held for this process alone.

    The same name finds the same clone with its `dvc.lock`, so an equal run recomputes nothing. The DVC cache is the checkout's.
    Raises ValueError on a name that is no file name, a checkout without a commit, or a workspace that another run holds.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"run name {name!r}: letters, digits, '.', '_' and '-', at most 80, the first a letter or digit")
    root, folder = checkout(), runs_folder() / name
    commit, uncommitted = _head(root), _uncommitted(root)
    with _held(folder):
        if not (folder / ".git").is_dir():
            _clone(root, folder, commit)
        elif git(folder, "rev-parse", "HEAD") != commit:
            _move(folder, commit)
        _write_if_changed(folder / PARAMS, yaml.safe_dump(dict(params), sort_keys=False, allow_unicode=True))
        yield Workspace(name, folder, commit, uncommitted)


def git(folder: Path, *arguments: str) -> str:
    """The output of a git command. Raises ValueError with git's message if it fails."""
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)} in {folder}: {done.stderr.strip()}")
    return done.stdout.rstrip("\n")


def _head(root: Path) -> str:
    try:
        return git(root, "rev-parse", "--verify", "HEAD")
    except ValueError as error:
        raise ValueError(f"{root}: only commits run, and this is no git checkout with a commit ({error})") from error


def _uncommitted(root: Path) -> tuple[str, ...]:
    lines = git(root, "status", "--porcelain", "--untracked-files=all", "--", ".").splitlines()
    return tuple(line[3:] for line in lines)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """An exclusive lock on the workspace; the kernel drops it when the process ends, however it ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"run {folder.name!r} is already going on; wait for it, or choose another --name") from error
        yield


def _clone(root: Path, folder: Path, commit: str) -> None:
    """Clone beside the final name, so that an interrupted clone is never taken for a whole one."""
    partial = folder.with_name(f".{folder.name}.partial")
    subprocess.run(["rm", "-rf", str(partial)], check=True)
    git(root, "clone", "--quiet", "--no-checkout", str(root), str(partial))
    git(partial, "checkout", "--quiet", "--detach", commit)
    cache = subprocess.run([*DVC, "cache", "dir"], cwd=root, capture_output=True, text=True, check=False)
    if cache.returncode:
        raise ValueError(f"{root}: {cache.stderr.strip().removeprefix('ERROR: ')}")
    local = f"[core]\n    site_cache_dir = {state() / 'dvc'}\n[cache]\n    dir = {cache.stdout.strip()}\n"
    (partial / ".dvc" / "config.local").write_text(local, encoding="utf-8")
    with (partial / ".git" / "info" / "exclude").open("a", encoding="utf-8") as exclude:
        exclude.write("/.dvc/config.local\n/lineage.json\n/report/\n")
    partial.rename(folder)


def _move(folder: Path, commit: str) -> None:
    """To another commit, keeping `dvc.lock`: it says what the outputs lying here were made from."""
    lock = folder / LOCK
    kept = lock.read_bytes() if lock.is_file() else None
    git(folder, "fetch", "--quiet", "origin", "HEAD")
    git(folder, "checkout", "--quiet", "--force", "--detach", commit)
    if kept is not None:
        lock.write_bytes(kept)


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with new_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
