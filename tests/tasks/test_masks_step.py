import subprocess
import sys
from pathlib import Path

import pytest

from headwise.examples import BAD
from headwise.files import read_json, read_table, sha256_file
from headwise.masks.quality import MaskQuality
from headwise.masks.table import MASKS
from tasks.masks import write_masks
from tests.masks.dataset import write_dataset


def test_the_step_writes_the_calibration_split_alone(tmp_path: Path) -> None:
    write_dataset(tmp_path / "images", 21, {"images/003.png": []})
    write_masks(tmp_path / "images", tmp_path / "masks", MaskQuality())
    masks = read_table(tmp_path / "masks/masks.parquet", MASKS)
    bad = read_table(tmp_path / "masks/bad.parquet", BAD)
    assert set(masks["example_id"]) == {f"{i:03d}-{kind}" for i in range(21) if i != 3 for kind in "qc"}
    assert bad["example_id"].to_list() == ["003-c", "003-q"]
    manifest = read_json(tmp_path / "masks/manifest.json")
    assert manifest["inputs"] == {name: sha256_file(tmp_path / "images" / name) for name in ("index.parquet", "objects.parquet")}
    assert (manifest["examples"], manifest["bad"]) == (42, 2)


def test_a_second_run_gives_the_same_bytes(tmp_path: Path) -> None:
    write_dataset(tmp_path / "images", 3)
    for name in ("first", "second"):
        write_masks(tmp_path / "images", tmp_path / name, MaskQuality())
    files = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert files == ["bad.parquet", "manifest.json", "masks.parquet"]
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_a_failed_run_leaves_the_old_folder_alone(tmp_path: Path) -> None:
    write_dataset(tmp_path / "images", 3)
    write_masks(tmp_path / "images", tmp_path / "masks", MaskQuality())
    before = (tmp_path / "masks/manifest.json").read_bytes()
    write_dataset(tmp_path / "images", 3, {"images/001.png": []})
    with pytest.raises(ValueError, match="2 of 6 examples are bad"):
        write_masks(tmp_path / "images", tmp_path / "masks", MaskQuality())
    assert (tmp_path / "masks/manifest.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "masks"]


def test_the_module_runs_in_a_clone(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data/images", 2)
    (tmp_path / "params.yaml").write_text("masks: {min_area: 0.06}\n", encoding="utf-8")
    subprocess.run([sys.executable, "-m", "tasks.masks"], cwd=tmp_path, check=True)
    masks = read_table(tmp_path / "data/masks/masks.parquet", MASKS)
    assert masks["reason"].is_null().to_list() == [True, False] * 4
