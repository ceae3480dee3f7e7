"""The data set of a run: composed ones, and folders as users have them."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from headwise.data import DataSource, write_data
from headwise.examples import OBJECTS, read_examples
from headwise.files import read_table, sha256_tree
from headwise.masks import rle

SMALL = DataSource(calibration=4, evaluation=3, forgetting=2)


def write(source: DataSource, folder: Path) -> dict[str, str]:
    folder.mkdir()
    return write_data(source, folder, lambda done, total: None)


def test_scenes_have_splits_masks_and_the_same_bytes_again(tmp_path: Path) -> None:
    assert write(SMALL, tmp_path / "a") == {}
    write(SMALL, tmp_path / "b")
    assert sha256_tree(tmp_path / "a") == sha256_tree(tmp_path / "b")
    write(DataSource(calibration=4, evaluation=3, forgetting=2, seed=1), tmp_path / "c")
    assert sha256_tree(tmp_path / "a") != sha256_tree(tmp_path / "c")
    examples = read_examples(tmp_path / "a")
    images = {split: {e.image for e in examples if e.split == split} for split in ("calibration", "evaluation", "forgetting")}
    assert [len(found) for found in images.values()] == [4, 3, 2]
    assert not any(e.task == "caption" for e in examples if e.split == "forgetting")
    objects = read_table(tmp_path / "a" / "objects.parquet", OBJECTS)
    assert set(objects["image"]) == {e.image for e in examples}
    assert all(rle.decode(row["rle"], row["height"], row["width"]).any() for row in objects.iter_rows(named=True))


def test_no_two_splits_show_the_same_image(tmp_path: Path) -> None:
    write(DataSource(calibration=20, evaluation=20, forgetting=20), tmp_path / "a")
    digests = {(e.sha256, e.image) for e in read_examples(tmp_path / "a")}
    assert len({digest for digest, _ in digests}) == 60


def own_folder(tmp_path: Path, rows: list[object], images: int = 3) -> DataSource:
    root = tmp_path / "own"
    root.mkdir()
    for number in range(images):
        Image.fromarray(np.full((20, 30, 3), number * 40, dtype=np.uint8)).save(root / f"{number}.png")
    (root / "index.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return DataSource(kind="folder", path=str(root))


def row(number: int, **changes: object) -> dict[str, object]:
    return {"id": f"q{number}", "image": f"{number}.png", "question": "What?", "answer": "x", **changes}


def test_own_images_come_over_byte_for_byte(tmp_path: Path) -> None:
    source = own_folder(tmp_path, [row(0, split="evaluation", phrase="thing"), row(1, answers=["a", "b"]), row(0, id="again")])
    assert write(source, tmp_path / "out") == {}
    examples = {e.id: e for e in read_examples(tmp_path / "out")}
    assert examples["q1"].answers == ("a", "b")
    assert (examples["q0"].split, examples["q0"].phrase) == ("evaluation", "thing")
    assert examples["q0"].image == examples["again"].image
    assert (tmp_path / "out" / str(examples["q0"].image)).read_bytes() == (tmp_path / "own" / "0.png").read_bytes()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"question": ""}, "no question in the index"),
        ({"answer": None}, "no answer in the index"),
        ({"image": None}, "no image in the index"),
        ({"image": "7.png"}, "no such file"),
        ({"image": "../own/0.png"}, "leaves the data folder"),
        ({"image": "empty.png"}, "the file is empty"),
        ({"split": "tset"}, "unknown split 'tset'"),
    ],
)
def test_one_bad_row_is_left_out_with_its_reason(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    source = own_folder(tmp_path, [row(0), row(1), row(2, **changes)])
    (tmp_path / "own" / "empty.png").touch()
    bad = write(source, tmp_path / "out")
    assert list(bad) == ["q2"]
    assert reason in bad["q2"]
    assert [e.id for e in read_examples(tmp_path / "out")] == ["q0", "q1"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(0), row(1, id="q0")], "1 ids occur more than once in the index, the first is 'q0'"),
        ([row(0), "{not json"], r"index\.jsonl, line 2: not JSON"),
        ([row(0), "[1]"], "line 2: expected an object, found list"),
        ([], "empty"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, rows: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(own_folder(tmp_path, rows), tmp_path / "out")


def test_no_folder_and_no_index_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        write(DataSource(kind="folder", path=str(tmp_path / "nowhere")), tmp_path / "a")
    with pytest.raises(ValueError, match=r"neither index\.jsonl nor index\.parquet"):
        write(DataSource(kind="folder", path=str(tmp_path)), tmp_path / "b")


def test_own_masks_follow_their_images(tmp_path: Path) -> None:
    source = own_folder(tmp_path, [row(0), row(1)])
    mask = np.zeros((20, 30), dtype=bool)
    mask[5:9, 3:8] = True
    rows = [{"image": f"{n}.png", "object": 0, "phrase": "thing", "height": 20, "width": 30, "rle": rle.encode(mask)} for n in (0, 2)]
    pl.DataFrame(rows, schema_overrides={"object": pl.Int32, "height": pl.Int32, "width": pl.Int32}).write_parquet(
        tmp_path / "own" / "objects.parquet"
    )
    write(source, tmp_path / "out")
    examples = {e.id: e for e in read_examples(tmp_path / "out")}
    assert read_table(tmp_path / "out" / "objects.parquet", OBJECTS)["image"].to_list() == [examples["q0"].image]
