"""Artefacts are whole or absent, and have the columns that their schema says."""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import polars as pl
import pyarrow as pa
import pytest

from headwise.data import DataSource
from headwise.files import exclusive, new_file, new_folder, read_json, read_table, sha256_tree, write_json, write_manifest, write_table

SCHEMA = pa.schema([("id", pa.string()), ("value", pa.float32())])
ROWS = pl.DataFrame({"value": [1.5, None], "id": ["a", "b"]})


def test_a_folder_takes_its_place_only_when_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as folder:
        (folder / "first").write_text("1")
    with pytest.raises(OSError, match="disk is full"), new_folder(out) as folder:
        (folder / "second").write_text("half")
        raise OSError("disk is full")
    assert [path.name for path in out.iterdir()] == ["first"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED_INSIDE = """
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""
KILLED_BETWEEN_THE_RENAMES = """
rename = Path.rename
def rename_and_die(self, target):
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
Path.rename = rename_and_die
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "new").write_text("x")
"""
KILLED_INSIDE_A_FILE = """
with new_file(Path(sys.argv[1]) / "file") as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("program", [KILLED_INSIDE, KILLED_BETWEEN_THE_RENAMES, KILLED_INSIDE_A_FILE])
def test_a_killed_process_loses_nothing_and_its_leftovers_go(tmp_path: Path, program: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    imports = "import os, signal, sys\nfrom pathlib import Path\nfrom headwise.files import new_file, new_folder\n"
    done = subprocess.run([sys.executable, "-c", imports + program, str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(RuntimeError), new_folder(out):
        raise RuntimeError
    with new_file(out / "file"):
        assert [path.name for path in out.iterdir() if not path.name.startswith(".")] == ["file"]
        assert (out / "file").read_text() == "old"
        (next(out.glob(".file.*")) / "file").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


def test_two_writers_at_once_leave_one_whole_folder(tmp_path: Path) -> None:
    out, together = tmp_path / "out", Barrier(3)

    def write(number: int) -> None:
        for turn in range(5):
            with new_folder(out) as folder, new_file(tmp_path / "file") as file:
                together.wait()
                (folder / "first").write_text(f"{number} {turn}")
                (folder / "second").write_text(f"{number} {turn}")
                file.write_text(f"{number} {turn}")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    assert (out / "first").read_text() == (out / "second").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_one_process_at_a_time_is_inside(tmp_path: Path) -> None:
    inside: list[int] = []

    def enter(number: int) -> None:
        with exclusive(tmp_path / "cache" / "lock"):
            inside.append(number)
            time.sleep(0.01)
            assert inside.pop() == number

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(8)))


def test_a_file_takes_its_place_only_when_whole(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_file(tmp_path / "x") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_tables_keep_order_type_and_bytes(tmp_path: Path) -> None:
    write_table(ROWS, tmp_path / "a.parquet", SCHEMA)
    write_table(ROWS, tmp_path / "b.parquet", SCHEMA)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    read = read_table(tmp_path / "a.parquet", SCHEMA)
    assert read.columns == ["id", "value"]
    assert read["value"].to_list() == [1.5, None]


def test_wrong_columns_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing columns \['value'\], unknown columns \['other'\]"):
        write_table(ROWS.rename({"value": "other"}), tmp_path / "x.parquet", SCHEMA)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        read_table(tmp_path / "x.parquet", SCHEMA)


@pytest.mark.parametrize("value", ["three", [1.5]])
def test_a_column_of_another_type_is_named_with_both_types(tmp_path: Path, value: object) -> None:
    pl.DataFrame({"id": ["a"], "value": [value]}).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet: column 'value' holds (large_)?(string|list).*, expected is (float|double)"):
        read_table(tmp_path / "x.parquet", SCHEMA)


def test_json_is_canonical_and_an_object(tmp_path: Path) -> None:
    write_json({"b": 1, "a": "é"}, tmp_path / "x.json")
    assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n "a": "é",\n "b": 1\n}\n'
    with pytest.raises(ValueError, match="Out of range float"):
        write_json({"a": float("nan")}, tmp_path / "y.json")
    (tmp_path / "z.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object, found list"):
        read_json(tmp_path / "z.json")


def test_a_manifest_depends_on_content_alone(tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        folder = tmp_path / name / "out"
        folder.mkdir(parents=True)
        (folder / "part").write_text("bytes")
        write_manifest(folder, stage="images", settings=DataSource(seed=3), inputs={"part": folder / "part"})
        digests.append(sha256_tree(folder))
    assert digests[0] == digests[1]
    manifest = json.loads((tmp_path / "one" / "out" / "manifest.json").read_text())
    assert manifest["settings"]["seed"] == 3
    assert manifest["inputs"]["part"] == manifest["outputs"]["part"]


def test_a_tree_digest_sees_names_and_bytes(tmp_path: Path) -> None:
    def digest(name: str, content: str) -> str:
        folder = tmp_path / f"{name}-{content}"
        folder.mkdir()
        (folder / name).write_text(content)
        return sha256_tree(folder)

    assert len({digest("a", "x"), digest("b", "x"), digest("a", "y")}) == 3
