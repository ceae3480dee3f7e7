"""A run's own clone: real git, real DVC."""

import json
from pathlib import Path

import pytest

from flows.graph import reproduce, stale_stages
from flows.inspection import write_run_report
from flows.workspace import find_run, open_workspace, runs_folder
from tests.flows.project import CONTENT, commit, git

OURS = {"prepare", "judge@top", "judge@bottom"}


def test_a_run_works_on_the_commit_and_recomputes_nothing_the_second_time(project: Path) -> None:
    (project / "source.txt").write_text("edited, not committed\n")
    with open_workspace("one", CONTENT) as workspace:
        assert workspace.commit == git(project, "rev-parse", "HEAD") and workspace.uncommitted == ("source.txt",)
        assert reproduce("prepare", workspace.folder, print).outcome == "computed"
        assert (workspace.folder / "data/images/all.txt").read_text() == "one\n"
    with open_workspace("one", CONTENT) as workspace:
        assert reproduce("prepare", workspace.folder, print).outcome == "up to date"
    with open_workspace("two", CONTENT) as workspace:
        assert reproduce("prepare", workspace.folder, print).outcome == "restored"  # from the cache that the checkout and its clones share
    assert not (project / "data").exists()


def test_parameters_and_a_new_commit_make_stale_only_what_they_change(project: Path) -> None:
    with open_workspace("one", CONTENT) as workspace:
        for name in sorted(OURS, reverse=True):
            reproduce(name, workspace.folder, print)
    (project / "source.txt").write_text("two\n")
    newest = commit(project)
    with open_workspace("one", {**CONTENT, "scale": 7}) as workspace:
        assert workspace.commit == newest == git(workspace.folder, "rev-parse", "HEAD") and workspace.uncommitted == ()
        assert (stale_stages(workspace.folder) or frozenset()) & OURS == OURS
        reproduce("prepare", workspace.folder, print)
        reproduce("judge@top", workspace.folder, print)
        metrics = json.loads((workspace.folder / "data/evaluations/top/metrics.json").read_text())
        assert metrics == {"loss": {"value": 7}}


def test_nothing_of_the_machine_can_be_committed_from_a_clone(project: Path) -> None:
    with open_workspace("one", CONTENT) as workspace:
        (workspace.folder / "lineage.json").write_text("{}")
        assert str(project) in (workspace.folder / ".dvc/config.local").read_text()
        assert git(workspace.folder, "status", "--porcelain", "--untracked-files=all").split() == ["M", "params.yaml"]


def test_a_workspace_is_held_by_one_run_at_a_time(project: Path) -> None:
    with open_workspace("one", CONTENT), pytest.raises(ValueError, match="'one' is already going on"), open_workspace("one", CONTENT):
        pass
    with open_workspace("one", CONTENT):
        pass


def test_the_report_of_a_run_that_was_cut_short_shows_no_earlier_verdict(project: Path) -> None:
    with open_workspace("one", CONTENT) as workspace:
        (workspace.folder / "lineage.json").write_text(json.dumps({"verdict": "Champion: of long ago.", "ids": {"commit": "abc"}}))
    assert "of long ago" in write_run_report("one", None).read_text()
    with pytest.raises(RuntimeError), open_workspace("one", CONTENT):
        raise RuntimeError
    page = write_run_report("one", None).read_text()
    assert "has not come to its end" in page and "of long ago" not in page
    with open_workspace("one", CONTENT):
        pass
    assert "of long ago" in write_run_report("one", None).read_text()


@pytest.mark.parametrize("name", ["", "../up", ".hidden", "a b", "x" * 81])
def test_a_name_that_is_no_file_name_is_refused(project: Path, name: str) -> None:
    with pytest.raises(ValueError, match="run name"), open_workspace(name, CONTENT):
        pass
    assert not (project / ".headwise").exists()


def test_a_checkout_without_a_commit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dvc.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="only commits run"), open_workspace("one", {}):
        pass
    git(tmp_path, "init", "--quiet")
    with pytest.raises(ValueError, match="only commits run"), open_workspace("one", {}):
        pass


def test_uncommitted_files_are_named_plainly(project: Path) -> None:
    for name in ("flows/new one.py", "headwise/café.py", "docs/notes.md"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("")
    (project / "tasks").mkdir()
    git(project, "mv", "source.txt", "tasks/source.txt")
    with open_workspace("one", CONTENT) as workspace:
        assert set(workspace.uncommitted) == {"flows/new one.py", "headwise/café.py", "docs/notes.md", "source.txt", "tasks/source.txt"}
        assert set(workspace.uncommitted_code) == {"flows/new one.py", "headwise/café.py", "tasks/source.txt"}


def test_runs_are_found_by_name_and_the_latest_opened_without_one(project: Path) -> None:
    with pytest.raises(ValueError, match="no run: none yet"):
        find_run(None)
    for name in ("one", "two", "one", "controls-scenes-0"):
        with open_workspace(name, CONTENT):
            pass
    (runs_folder() / "two/report").mkdir()
    assert (find_run(None).name, find_run("two").name, find_run("controls-scenes-0").name) == ("one", "two", "controls-scenes-0")
    with pytest.raises(ValueError, match="no run named 'three'; the runs are: controls-scenes-0, one, two"):
        find_run("three")
