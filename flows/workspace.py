"""A run's own clone of the project: only commits run, and nothing that the user edits meanwhile changes a run."""

import contextlib
import fcntl
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from flows.environment import checkout, state
from flows.graph import DVC, LOCK, PARAMS
from flows.parameters import Name
from headwise.files import new_file

NAME: TypeAdapter[str] = TypeAdapter(Name)
CONTROLS = "controls-"
"""What the names of the controls' workspaces begin with."""
ABLATIONS = "ablations-"
"""And those of the ablations of RAH-LoRA."""
STEERING = "steering-"
"""And those of ZeroTuning's comparison."""
MASKS = "masks-"
"""What the names of those begin with in which masks alone are made."""

UNFINISHED = "unfinished"
"""A file in the clone for as long as a run goes on, and after one that did not come to its end."""

CODE = ("flows/", "headwise/", "tasks/")


@dataclass(frozen=True)
class Workspace:
    """The clone of one run: its name and folder, the commit that its stages run, and the checkout's uncommitted files, unknown to them."""

    name: str
    folder: Path
    commit: str
    uncommitted: tuple[str, ...]

    @property
    def uncommitted_code(self) -> tuple[str, ...]:
        """The uncommitted files of the packages: the flow itself, which compares and judges, is imported from the checkout as it lies."""
        return tuple(path for path in self.uncommitted if path.startswith(CODE))

    def write_params(self, params: Mapping[str, object]) -> None:
        """Write `params.yaml`, where it says anything else."""
        path, text = self.folder / PARAMS, yaml.safe_dump(dict(params), sort_keys=False, allow_unicode=True)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            with new_file(path) as temporary:
                temporary.write_text(text, encoding="utf-8")


def runs_folder() -> Path:
    """`.headwise/runs`: one clone per run name."""
    return state() / "runs"


def find_run(name: str | None) -> Path:
    """The clone of the named run, or of the one that was opened last; a cell of the controls, or masks alone, have to be named.

    Raises ValueError naming the runs that exist.
    """
    runs = sorted((run for run in runs_folder().glob("[!.]*") if (run / PARAMS).is_file()), key=_opened)
    found = [run for run in runs if (run.name == name if name else not run.name.startswith((CONTROLS, ABLATIONS, STEERING, MASKS)))]
    if not found:
        known = ", ".join(sorted(run.name for run in runs)) or "none yet: start with `headwise run`"
        raise ValueError(f"no run named {name!r}; the runs are: {known}" if name else f"no run: {known}")
    return found[-1]


@contextlib.contextmanager
def open_workspace(name: str, params: Mapping[str, object]) -> Iterator[Workspace]:
    """The clone `.headwise/runs/NAME` at the checkout's HEAD with these parameters in `params.yaml`, held for this process alone.

    The same name finds the same clone with its `dvc.lock`, so an equal run recomputes nothing. The DVC cache is the checkout's. A block
    that ends in an error leaves the file `unfinished` behind.
    Raises ValueError on a name that is no file name, a checkout without a commit, or a workspace that another run holds.
    """
    try:
        NAME.validate_python(name)
    except ValidationError as error:
        raise ValueError(f"run name {name!r}: letters, digits, '.', '_' and '-', at most 80, the first a letter or digit") from error
    root, folder = checkout(), runs_folder() / name
    commit, uncommitted = _head(root), _uncommitted(root)
    with _held(folder):
        if not (folder / ".git").is_dir():
            _clone(root, folder, commit)
        elif git(folder, "rev-parse", "HEAD") != commit:
            _move(folder, commit)
        workspace = Workspace(name, folder, commit, uncommitted)
        workspace.write_params(params)
        (folder / UNFINISHED).touch()
        yield workspace
        (folder / UNFINISHED).unlink()


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
    """Every changed, new or deleted file, named plainly: no quotes, and a moved file under both its names."""
    entries = git(root, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--", ".").split("\0")
    return tuple(entry[3:] for entry in entries if entry)


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _opened(folder: Path) -> float:
    """When the workspace was last held by a run, in seconds since 1970."""
    lock = _lock_file(folder)
    return lock.stat().st_mtime if lock.is_file() else 0.0


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """An exclusive lock on the workspace, stamped with the time; the kernel drops it when the process ends, however it ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock_file(folder).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"run {folder.name!r} is already going on; wait for it, or choose another --name") from error
        _lock_file(folder).touch()
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
        exclude.write(f"/.dvc/config.local\n/lineage.json\n/report/\n/{UNFINISHED}\n")
    partial.rename(folder)


def _move(folder: Path, commit: str) -> None:
    """To another commit, keeping `dvc.lock`: it says what the outputs lying here were made from."""
    lock = folder / LOCK
    kept = lock.read_bytes() if lock.is_file() else None
    git(folder, "fetch", "--quiet", "origin", "HEAD")
    git(folder, "checkout", "--quiet", "--force", "--detach", commit)
    if kept is not None:
        lock.write_bytes(kept)
