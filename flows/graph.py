"""The graph of dvc.yaml: what is stale, bringing one stage up to date in a process group of its own, and what `dvc.lock` recorded."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

PARAMS, LOCK = "params.yaml", "dvc.lock"
Outcome = Literal["computed", "restored", "up to date"]
"""What DVC did: ran the command, took the outputs of an equal earlier run from its cache, or found nothing changed."""

MARKS: dict[str, Outcome] = {"Running stage '": "computed", "is cached - skipping run": "restored", "didn't change, skipping": "up to date"}
BUSY = ("is busy, it is being blocked by", "Unable to acquire lock")
FAILED = re.compile("ERROR: failed to reproduce .*: failed to run: ")
"""DVC's line where the command itself failed, which has said why."""
HINTS = (
    "To track the changes",
    "git add",
    "To enable auto staging",
    "dvc config",
    "Use `dvc push`",
    "Updating lock",
    "Generating lock",
)
"""DVC's advice to somebody who works by hand; no news in a run's log."""

DVC = (sys.executable, "-m", "dvc")
PATIENCE_S = 10.0
"""How long a process group may take to end after SIGTERM."""


class StageFailed(RuntimeError):
    """The stage's command failed; the message is its own last line."""


class Busy(RuntimeError):
    """Another DVC process holds the stage's files; worth another try."""


@dataclass(frozen=True)
class StageRun:
    """What became of one stage: its name in dvc.yaml, what DVC did, and the seconds it took."""

    name: str
    outcome: Outcome
    seconds: float


def reproduce(name: str, folder: Path, log: Callable[[str], object]) -> StageRun:
    """`dvc repro -s NAME`, its output handed to `log` line by line.

    Raises Busy where another DVC process holds the stage, StageFailed with the command's last line where it failed.
    """
    start = time.monotonic()
    outcome: Outcome = "up to date"
    lines: list[str] = []
    with _process([*DVC, "repro", "-s", name], folder) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            outcome = _outcome(line) or outcome
            if lines[-1] and not lines[-1].strip().startswith(HINTS) and not FAILED.match(lines[-1]):
                log(lines[-1])
        code = process.wait()
    if code and any(mark in line for mark in BUSY for line in lines):
        raise Busy(f"stage {name}: another DVC process is at work on its files")
    if code:
        raise StageFailed(f"stage {name} failed: {_reason(lines)}")
    return StageRun(name, outcome, time.monotonic() - start)


def _outcome(line: str) -> Outcome | None:
    return next((outcome for mark, outcome in MARKS.items() if mark in line), None)


def stale_stages(folder: Path) -> frozenset[str] | None:
    """The stages that `dvc status` would run again, all in one call; None if it cannot tell because DVC is busy.

    Raises StageFailed where the graph itself is wrong, with DVC's own message.
    """
    done = subprocess.run([*DVC, "status", "--json"], cwd=folder, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return frozenset(json.loads(done.stdout))
    if any(mark in done.stderr for mark in BUSY):
        return None
    raise StageFailed(f"dvc status: {_reason(done.stderr.splitlines())}")


def _reason(lines: Sequence[str]) -> str:
    """The last line that the command itself wrote, where it failed; else DVC's own words."""
    said = [line.strip() for line in lines if line.strip()]
    starts = [place for place, line in enumerate(said) if line.startswith("Running stage '") and FAILED.match(said[-1])]
    own = [line for line in said[starts[-1] + 1 : -1] if not line.startswith("> ")] if starts else []
    errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")]
    return (own or errors or [" ".join(said[:2])])[-1]


@contextlib.contextmanager
def _process(command: list[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that leads its own group; whatever ends the block, no member of the group outlives it."""
    signal.siginterrupt(signal.SIGINT, True)  # Polars lets interrupted reads go on, and Ctrl-C would wait for the stage's next line
    with subprocess.Popen(
        command,
        cwd=folder,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < deadline:
            process.poll()  # a leader that nobody waits for would keep its group alive
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)


def _environment() -> dict[str, str]:
    """`python` in dvc.yaml is this interpreter, and its lines arrive as they are written."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Locked:
    """A stage as `dvc.lock` holds it: DVC's md5 of each path (folders end in `.dir`), and the parameters it ran with."""

    cmd: str
    deps: Mapping[str, str] = field(default_factory=dict)
    outs: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, object] = field(default_factory=dict)


def read_lock(folder: Path) -> dict[str, Locked]:
    """The stages of `dvc.lock`, by name; empty before the first stage ran."""
    path = folder / LOCK
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: _locked(entry) for name, entry in content.get("stages", {}).items()}


def remove_leftovers(folder: Path, planned: Collection[str]) -> None:
    """Delete the outputs of every stage that ran here and is not planned now; DVC's cache keeps them."""
    leftover = {path for name, locked in read_lock(folder).items() if name not in planned for path in locked.outs}
    for path in leftover:
        shutil.rmtree(folder / path, ignore_errors=True)


def _locked(entry: Mapping[str, object]) -> Locked:
    params = entry.get("params", {})
    assert isinstance(params, Mapping)
    values = params.get(PARAMS, {})
    return Locked(str(entry["cmd"]), _digests(entry.get("deps")), _digests(entry.get("outs")), dict(flatten(values)))


def _digests(entries: object) -> dict[str, str]:
    assert entries is None or isinstance(entries, list)
    return {entry["path"]: entry["md5"] for entry in entries or [] if "md5" in entry}


def flatten(content: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Nested mappings as pairs with dotted names; lists and single values as they are."""
    if not isinstance(content, Mapping):
        yield prefix, content
        return
    for name, value in content.items():
        yield from flatten(value, f"{prefix}.{name}" if prefix else str(name))
