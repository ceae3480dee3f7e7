import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco

from headwise.masks.coco import read_coco
from headwise.masks.rle import decode, encode, runs

HEIGHT, WIDTH = 30, 40
SQUARE = [5, 5, 25, 5, 25, 15, 5, 15]


def rectangle() -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[5:15, 5:25] = True
    return mask


def content(*segmentations: object, **changes: object) -> dict[str, object]:
    annotations = [
        {"id": 10 + n, "image_id": 1, "category_id": 3, "segmentation": given, "area": 1.0} for n, given in enumerate(segmentations)
    ]
    images = [
        {"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH, "license": 2},
        {"id": 2, "file_name": "b.jpg", "height": 5, "width": 5},
    ]
    return {"images": images, "categories": [{"id": 3, "name": "cat"}], "annotations": annotations, "info": {}} | changes


def write(folder: Path, instances: object, references: object = None) -> Path:
    (folder / "instances.json").write_text(json.dumps(instances))
    if references is not None:
        (folder / "refs.json").write_text(json.dumps(references))
    return folder


def test_polygons_and_both_forms_of_run_lengths_give_the_same_mask(tmp_path: Path) -> None:
    packed = {"size": [HEIGHT, WIDTH], "counts": encode(rectangle())}
    numbers = {"size": [HEIGHT, WIDTH], "counts": runs(encode(rectangle()))}
    rows = read_coco(write(tmp_path, content([SQUARE], packed, numbers)), ["a.jpg"])
    assert rows.select("image", "object", "phrase", "height", "width").rows() == [("a.jpg", n, "cat", HEIGHT, WIDTH) for n in range(3)]
    for counts in rows["rle"]:
        assert np.array_equal(decode(counts, HEIGHT, WIDTH), rectangle())


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")  # pycocotools 2.0.11
def test_several_polygons_are_one_object_as_pycocotools_draws_it(tmp_path: Path) -> None:
    parts = [SQUARE, [30, 20, 38, 20, 34, 28]]
    (counts,) = read_coco(write(tmp_path, content(parts)), ["a.jpg"])["rle"]
    expected = coco.decode(coco.merge(coco.frPyObjects(parts, HEIGHT, WIDTH))).astype(bool)
    assert np.array_equal(decode(counts, HEIGHT, WIDTH), expected) and expected[22, 34]


def test_expressions_name_their_instance_and_the_rest_is_left_out(tmp_path: Path) -> None:
    references = [{"ann_id": 11, "ref_id": 0, "sentences": [{"sent": "left one", "raw": "x"}, {"sent": "the cat"}], "split": "val"}]
    rows = read_coco(write(tmp_path, content([SQUARE], [SQUARE]), references), ["a.jpg"])
    assert rows.select("object", "phrase").rows() == [(0, "left one"), (1, "the cat")]


def test_an_expression_given_twice_names_once_and_no_expression_names_nothing(tmp_path: Path) -> None:
    sentences = [{"sent": "left one"}, {"sent": "left one"}]
    assert read_coco(write(tmp_path, content([SQUARE]), [{"ann_id": 10, "sentences": sentences}]), ["a.jpg"])["phrase"].to_list() == [
        "left one"
    ]
    assert read_coco(write(tmp_path, content([SQUARE]), []), ["a.jpg"]).is_empty()


def test_crowds_are_no_objects(tmp_path: Path) -> None:
    instances = content([SQUARE], [SQUARE])
    instances["annotations"][0]["iscrowd"] = 1  # pyright: ignore[reportIndexIssue]
    assert read_coco(write(tmp_path, instances), ["a.jpg"])["object"].to_list() == [0]


def test_what_does_not_fit_its_image_is_left_to_the_masks_step(tmp_path: Path) -> None:
    wrong = ({"size": [5, 5], "counts": [25]}, {"size": [HEIGHT, WIDTH], "counts": "é"}, [[1, 2, 3, 4]])
    rows = read_coco(write(tmp_path, content(*wrong)), ["a.jpg"])
    assert rows["height"].to_list() == [5, HEIGHT, HEIGHT] and rows["rle"][1] == "é"
    assert not decode(rows["rle"][2], HEIGHT, WIDTH).any()


def test_images_that_nobody_asks_about_are_passed_over(tmp_path: Path) -> None:
    assert read_coco(write(tmp_path, content([SQUARE])), ["b.jpg", "c.jpg"]).is_empty()


@pytest.mark.parametrize(
    ("instances", "references", "message"),
    [
        (content({"size": [HEIGHT, WIDTH], "counts": [7]}), None, r"annotation 10: the runs fill 7 pixels, the mask has 30 x 40"),
        (content({"size": [HEIGHT, WIDTH], "counts": [-5, 1205]}), None, r"annotations\.0\.segmentation.*greater than or equal to 0"),
        (content({"size": [HEIGHT, WIDTH], "counts": [2**33]}), None, r"annotations\.0\.segmentation.*less than"),
        (content([[1e9, 2, 3, 4, 5, 6]]), None, r"annotations\.0\.segmentation.*less than"),
        (content([[float("inf"), 2, 3, 4, 5, 6]]), None, r"annotations\.0\.segmentation"),
        (content([[float("nan"), 2, 3, 4, 5, 6]]), None, r"annotations\.0\.segmentation"),
        (content([SQUARE], images=[]), None, "annotation 10 is of an image or a category that the file does not have"),
        (content([SQUARE], categories=[]), None, "annotation 10 is of an image or a category"),
        ({"images": []}, None, r"instances\.json: categories: Field required"),
        ([], None, r"instances\.json: .*valid dictionary"),
        (content([SQUARE]), [{"ann_id": 99, "sentences": []}], r"refs\.json: a reference to annotation 99"),
        (content([SQUARE]), [{"sentences": []}], r"refs\.json: 0\.ann_id: Field required"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, instances: object, references: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_coco(write(tmp_path, instances, references), ["a.jpg"])


def test_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "instances.json").write_bytes(b'{"images": \xff')
    with pytest.raises(ValueError, match=r"instances\.json: not JSON"):
        read_coco(tmp_path, ["a.jpg"])
