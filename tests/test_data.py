"""The data set of a run: composed ones, and folders as users have them."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from PIL import Image

from headwise.calibration.settings import Lora
from headwise.data import DataSource, check_data, has_masks, write_data
from headwise.examples import OBJECTS, Example, read_examples
from headwise.files import read_table, sha256_tree, write_table
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
    write_table(pl.DataFrame(OBJECTS.empty_table()), root / "objects.parquet", OBJECTS)
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
    assert str(examples["q0"].image).startswith("images/0-")
    assert (tmp_path / "out" / str(examples["q0"].image)).read_bytes() == (tmp_path / "own" / "0.png").read_bytes()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"question": ""}, "no question in the index"),
        ({"answer": None}, "no answer in the index"),
        ({"image": None}, "no image in the index"),
        ({"image": "7.png"}, r"7.png: cannot be read (No such file"),
        ({"image": "folder.png"}, r"folder.png: cannot be read (Is a directory)"),
        ({"image": "dangling.png"}, r"dangling.png: cannot be read (No such file"),
        ({"image": "../own/0.png"}, "leaves the data folder"),
        ({"image": "empty.png"}, "the file is empty"),
        ({"split": "tset"}, "unknown split 'tset'"),
    ],
)
def test_one_bad_row_is_left_out_with_its_reason(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    source = own_folder(tmp_path, [row(0), row(1), row(2, **changes)])
    (tmp_path / "own" / "empty.png").touch()
    (tmp_path / "own" / "folder.png").mkdir()
    (tmp_path / "own" / "dangling.png").symlink_to("nowhere.png")
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


def test_a_parquet_index_is_read_as_the_same_lines_would_be(tmp_path: Path) -> None:
    rows = [row(0, phrase="thing"), row(1, answers=["a", "b"], answer=None), row(0, id="again", task="caption")]
    source = own_folder(tmp_path, rows)
    write(source, tmp_path / "lines")
    (tmp_path / "own" / "index.jsonl").unlink()
    pl.DataFrame(rows).write_parquet(tmp_path / "own" / "index.parquet")
    assert write(source, tmp_path / "parquet") == {}
    assert read_examples(tmp_path / "parquet") == read_examples(tmp_path / "lines")


@pytest.mark.parametrize(("content", "message"), [(b"PAR1 cut off", "not a readable Parquet file"), (None, "empty; give a row")])
def test_a_broken_or_empty_parquet_index_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    source, path = own_folder(tmp_path, [row(0)]), tmp_path / "own" / "index.parquet"
    if content is None:
        pl.DataFrame(schema={"image": pl.String, "question": pl.String}).write_parquet(path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"own: both index\.jsonl and index\.parquet in it; one is needed"):
        write(source, tmp_path / "both")
    (tmp_path / "own" / "index.jsonl").unlink()
    with pytest.raises(ValueError, match=rf"own/index\.parquet: {message}"):
        write(source, tmp_path / "out")


def test_blank_lines_are_passed_over_and_lines_still_counted(tmp_path: Path) -> None:
    source = own_folder(tmp_path, [row(0), "", row(1), " ", "{"])
    with pytest.raises(ValueError, match=r"index\.jsonl, line 5: not JSON"):
        write(source, tmp_path / "out")
    (tmp_path / "own" / "index.jsonl").write_text(f"{json.dumps(row(0))}\n\n{json.dumps(row(1))}\n\n")
    assert write(source, tmp_path / "again") == {} and len(read_examples(tmp_path / "again")) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "scenes", "cutouts": "a"}, "cutouts is for photos, and the data are of kind 'scenes'"),
        ({"kind": "photos", "path": "a"}, "path is for folder and texts, and the data are of kind 'photos'"),
        ({"kind": "folder", "path": "a", "seed": 1}, "seed is for scenes and photos and texts, and the data are of kind 'folder'"),
    ],
)
def test_a_field_that_would_be_ignored_is_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSource(**changed)  # pyright: ignore[reportArgumentType]


def test_lines_that_are_no_text_are_named(tmp_path: Path) -> None:
    source = own_folder(tmp_path, [row(0)])
    (tmp_path / "own" / "index.jsonl").write_bytes(b'{"image": "\xff"}')
    with pytest.raises(ValueError, match=r"index\.jsonl, line 1: not JSON"):
        write(source, tmp_path / "out")


def test_a_folder_without_masks_is_taken_as_it_is(tmp_path: Path) -> None:
    source = own_folder(tmp_path, [row(0)])
    assert has_masks(source) and has_masks(DataSource())
    (tmp_path / "own" / "objects.parquet").unlink()
    assert not has_masks(source)
    write(source, tmp_path / "out")
    assert not (tmp_path / "out" / "objects.parquet").exists()


def test_masks_of_other_images_and_two_files_of_them_are_refused(tmp_path: Path) -> None:
    source = own_folder(tmp_path, [row(0)])
    mask = {
        "image": "images/0.png",
        "object": 0,
        "phrase": "cat",
        "height": 20,
        "width": 30,
        "rle": rle.encode(np.ones((20, 30), dtype=bool)),
    }
    write_table(
        pl.DataFrame([mask], schema_overrides={"object": pl.Int32, "height": pl.Int32, "width": pl.Int32}),
        tmp_path / "own/objects.parquet",
        OBJECTS,
    )
    with pytest.raises(ValueError, match=r"objects\.parquet: no object of an image that the index names, such as '0\.png'"):
        write(source, tmp_path / "out")
    (tmp_path / "own" / "instances.json").write_text("{}")
    with pytest.raises(ValueError, match=r"both objects\.parquet and instances\.json in it"):
        write(source, tmp_path / "again")
    (tmp_path / "own" / "objects.parquet").unlink()
    (tmp_path / "own" / "instances.json").write_text('{"images": [], "categories": [], "annotations": []}')
    with pytest.raises(ValueError, match=r"instances\.json: no object of an image that the index names"):
        write(source, tmp_path / "third")


def test_coco_annotations_are_masks_under_the_images_new_names(tmp_path: Path) -> None:
    source = own_folder(tmp_path, [row(0, phrase="cat"), row(1)])
    (tmp_path / "own" / "objects.parquet").unlink()
    images = [{"id": n, "file_name": f"{n}.png", "height": 20, "width": 30} for n in range(3)]
    square = [[5, 5, 15, 5, 15, 15, 5, 15]]
    annotations = [{"id": n, "image_id": n, "category_id": 7, "segmentation": square} for n in range(3)]
    content = {"images": images, "categories": [{"id": 7, "name": "cat"}], "annotations": annotations}
    (tmp_path / "own" / "instances.json").write_text(json.dumps(content))
    assert has_masks(source)
    write(source, tmp_path / "out")
    stored = {example.image for example in read_examples(tmp_path / "out")}
    objects = read_table(tmp_path / "out" / "objects.parquet", OBJECTS)
    assert set(objects["image"]) == stored and len(stored) == 2 and set(objects["phrase"]) == {"cat"}
    assert rle.decode(objects["rle"][0], 20, 30).sum() == 100


def test_copies_are_one_image_with_its_objects_once(tmp_path: Path) -> None:
    source, mask = own_folder(tmp_path, [row(0), row(1, image="copy.png")]), np.ones((20, 30), dtype=bool)
    (tmp_path / "own" / "copy.png").write_bytes((tmp_path / "own" / "0.png").read_bytes())
    rows = [
        {"image": name, "object": k, "phrase": f"thing {k}", "height": 20, "width": 30, "rle": rle.encode(mask)}
        for name in ("0.png", "copy.png")
        for k in (0, 1)
    ]
    write_table(pa.Table.from_pylist(rows, schema=OBJECTS), tmp_path / "own" / "objects.parquet", OBJECTS)
    assert write(source, tmp_path / "out") == {}
    assert len({e.image for e in read_examples(tmp_path / "out")}) == 1
    assert read_table(tmp_path / "out" / "objects.parquet", OBJECTS)["object"].to_list() == [0, 1]


def in_split(split: str, *images: str, task: str = "caption") -> list[Example]:
    return [Example(f"{split}-{task}-{image}", image, None, "What?", ("x",), None, task, split) for image in images]


def test_an_image_in_two_splits_is_refused(tmp_path: Path) -> None:
    """Training and judging on one picture, under one name or as a copy under another."""
    source = own_folder(tmp_path, [row(0, split="calibration"), row(1, split="evaluation"), row(2, split="calibration")])
    for copy in ("0.png", "3.png", "3.jpeg"):
        (tmp_path / "own" / copy).write_bytes((tmp_path / "own" / "0.png").read_bytes())
        lines = [row(0, split="calibration"), row(1, split="evaluation"), row(2, image=copy, split="evaluation")]
        (tmp_path / "own" / "index.jsonl").write_text("\n".join(map(json.dumps, lines)))
        write(source, tmp_path / copy)
        with pytest.raises(ValueError, match=r"1 images are in more than one split, such as \S+ in calibration, \S+ in evaluation"):
            check_data(read_examples(tmp_path / copy), Lora(), 2)


def test_numbers_are_answers_and_ids(tmp_path: Path) -> None:
    source = own_folder(tmp_path, [row(0, id=0, answer=3), row(1, id=1, answers=[2.5, " a "]), row(2, id=2, answers="red")])
    assert write(source, tmp_path / "out") == {}
    assert {e.id: e.answers for e in read_examples(tmp_path / "out")} == {"0": ("3",), "1": ("2.5", "a"), "2": ("red",)}


WHOLE = [*in_split("calibration", "a", "b"), *in_split("evaluation", "c", "d")]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (in_split("calibration", "a", "b"), "split 'evaluation' has no image, 2 at least are needed: add images, or share out"),
        ([*WHOLE, *in_split("forgetting", "e", task="vqa")], "split 'forgetting' has closed questions about 1 image, 2 at least"),
        ([*WHOLE, *in_split("evaluation", "c", "c", task="vqa")], "split 'evaluation' has closed questions about 1 image, 2 at least"),
        (
            [*in_split("calibration", "a", "b", task="vqa"), *in_split("evaluation", "c", "d")],
            "no caption among 2 examples of the calibration split: give .* task 'caption', or .* calibration.examples=all",
        ),
    ],
)
def test_what_would_stop_a_later_step_is_said_at_once(examples: list[Example], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_data(examples, Lora(), 2)


def test_too_few_images_to_score_the_heads_on_are_counted() -> None:
    with pytest.raises(ValueError, match=r"split 'calibration' has 2 images, the heads need scores.min_images = 3 to be scored"):
        check_data(WHOLE, Lora(), 3)


def test_data_without_captions_or_forgetting_will_do_if_all_questions_are_trained_on() -> None:
    check_data(WHOLE, Lora(), 2)
    check_data([*in_split("calibration", "a", "b", task="vqa"), *in_split("evaluation", "c", "d", task="vqa")], Lora(examples="all"), 2)


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
