"""DVC for real, on stages that take no time."""

import os
import threading
import time
from pathlib import Path

import pytest

from flows.graph import Busy, StageFailed, flatten, read_lock, reproduce, stale_stages


def test_a_stage_is_computed_then_up_to_date_then_restored(project: Path) -> None:
    lines: list[str] = []
    assert reproduce("prepare", project, lines.append).outcome == "computed"
    assert any("cp source.txt" in line for line in lines)
    assert reproduce("prepare", project, lines.append).outcome == "up to date"
    (project / "source.txt").write_text("two\n")
    assert reproduce("prepare", project, lines.append).outcome == "computed"
    (project / "source.txt").write_text("one\n")
    assert reproduce("prepare", project, lines.append).outcome == "restored"
    assert (project / "data/images/all.txt").read_text() == "one\n"


def test_one_call_tells_every_stale_stage(project: Path) -> None:
    before = stale_stages(project)
    assert before is not None and {"prepare", "judge@top", "judge@bottom"} <= before
    for name in ("prepare", "judge@top", "judge@bottom"):
        reproduce(name, project, print)
    assert stale_stages(project) == {"failing", "sleeping"}  # without outputs they always run
    (project / "params.yaml").write_text("images: {size: 3}\nscale: 4\narms: [top, bottom]\n")
    after = stale_stages(project)
    assert after is not None and "prepare" not in after and {"judge@top", "judge@bottom"} <= after


def test_a_failing_stage_says_the_commands_own_last_line(project: Path) -> None:
    with pytest.raises(StageFailed, match=r"^stage failing failed: ValueError: no such image$"):
        reproduce("failing", project, print)


def test_where_the_command_is_not_to_blame_dvc_says_why(project: Path) -> None:
    (project / "dvc.yaml").write_text("stages:\n  empty:\n    cmd: echo the last line\n    outs: [nowhere]\n")
    lines: list[str] = []
    with pytest.raises(StageFailed, match=r"^stage empty failed: .*output 'nowhere' does not exist"):
        reproduce("empty", project, lines.append)
    assert any("does not exist" in line for line in lines)


def test_an_unknown_stage_and_a_broken_graph_are_named(project: Path) -> None:
    with pytest.raises(StageFailed, match="'nothing' not found"):
        reproduce("nothing", project, print)
    (project / "dvc.yaml").write_text("stages:\n  images:\n    outs: [x]\n")
    with pytest.raises(StageFailed, match=r"dvc\.yaml"):
        stale_stages(project)


def test_two_at_once_on_one_stage_the_second_is_busy(project: Path) -> None:
    (project / "dvc.yaml").write_text("stages:\n  slow:\n    cmd: sleep 8 && echo done > slow.txt\n    outs: [slow.txt]\n")
    first = threading.Thread(target=reproduce, args=("slow", project, print))
    first.start()
    _wait_for(lambda: "slow.txt" in (project / ".dvc/tmp/rwlock").read_text())
    with pytest.raises(Busy, match="slow"):
        reproduce("slow", project, print)
    assert stale_stages(project) is None
    first.join()
    assert reproduce("slow", project, print).outcome == "up to date"


def test_whatever_ends_the_stage_its_whole_process_group_ends(project: Path) -> None:
    class Cancelled(BaseException):
        pass

    def cancel(line: str) -> None:
        if "sleep 600" in line:
            _wait_for((project / "sleeper.pid").read_text)
            raise Cancelled

    with pytest.raises(Cancelled):
        reproduce("sleeping", project, cancel)
    assert not _alive(int((project / "sleeper.pid").read_text()))


def test_the_lock_gives_digests_and_flat_parameters(project: Path) -> None:
    assert read_lock(project) == {}
    for name in ("prepare", "judge@top"):
        reproduce(name, project, print)
    lock = read_lock(project)
    assert lock["prepare"].outs["data/images"].endswith(".dir") and len(lock["prepare"].outs["data/images"]) == 36
    assert lock["judge@top"].deps["data/images"] == lock["prepare"].outs["data/images"]
    assert lock["prepare"].params == {"images.size": 3}


def test_flatten_joins_the_names_of_nested_mappings() -> None:
    assert dict(flatten({"a": {"b": 1, "c": {"d": [1, 2]}}, "e": None})) == {"a.b": 1, "a.c.d": [1, 2], "e": None}


def _wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise AssertionError("it never came")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not (status.is_file() and "State:\tZ" in status.read_text())
