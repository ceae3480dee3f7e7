"""Artefacts are whole or absent, and have the columns that their schema says."""

import json
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from headwise.data import DataSource
from headwise.files import new_file, new_folder, read_json, read_table, sha256_tree, write_json, write_manifest, write_table

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


def test_a_partial_folder_of_a_killed_run_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "stale").write_text("x")
    with new_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("y")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


@pytest.mark.slow
def test_a_real_full_disk_leaves_the_old_folder(tmp_path: Path) -> None:
    """On a file system of 1 MB, mounted here."""
    import subprocess

    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], check=True)
    try:
        with new_folder(mount / "out") as folder:
            write_json({"kept": True}, folder / "old.json")
        with pytest.raises(OSError, match="No space left"), new_folder(mount / "out") as folder:
            (folder / "big").write_bytes(bytes(3_000_000))
        assert [path.name for path in mount.iterdir()] == ["out"]
        assert read_json(mount / "out" / "old.json") == {"kept": True}
    finally:
        subprocess.run(["umount", str(mount)], check=True)


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
