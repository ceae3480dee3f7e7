from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from headwise.layout import View
from headwise.masks.exact import exact_masks
from headwise.masks.rle import decode
from headwise.masks.settings import MaskQuality
from headwise.scores.head_impact import HeadImpact
from headwise.scores.token_masks import token_masks
from tests.masks.dataset import HEIGHT, WIDTH, left, object_row, question, right, write_dataset


def test_every_object_of_the_example_is_a_row_with_its_exact_mask(tmp_path: Path) -> None:
    masks, bad = exact_masks(tmp_path, write_dataset(tmp_path), MaskQuality())
    assert bad == {}
    row = masks.filter(pl.col("example_id") == "000-q").row(0, named=True)
    assert np.array_equal(decode(row["rle"], row["height"], row["width"]), left())
    expected = {
        "image": "images/000.png",
        "object": 0,
        "phrase": "cat",
        "height": HEIGHT,
        "width": WIDTH,
        "box": [10.0, 5.0, 20.0, 25.0],
        "source": "exact",
    }
    assert {name: row[name] for name in expected} == expected
    assert row["predicted_iou"] is None
    assert row["reason"] is None
    assert row["area"] == pytest.approx(200 / (HEIGHT * WIDTH))


def test_the_object_of_the_phrase_is_key_and_every_object_of_a_caption(tmp_path: Path) -> None:
    masks, _ = exact_masks(tmp_path, write_dataset(tmp_path), MaskQuality())
    keys = {(row["example_id"], row["phrase"]): row["key"] for row in masks.iter_rows(named=True)}
    assert keys == {("000-c", "cat"): True, ("000-c", "dog"): True, ("000-q", "cat"): True, ("000-q", "dog"): False}


def test_a_question_without_a_phrase_is_about_no_object_and_a_caption_about_the_whole_image(tmp_path: Path) -> None:
    """ "Is there a bird?" - "no": no object may count as what the answer is about."""
    examples = write_dataset(tmp_path)
    none = replace(examples[0], id="none", task="exists", phrase=None)
    masks, bad = exact_masks(tmp_path, [*examples, none], MaskQuality())
    assert bad == {}
    (row,) = masks.filter(pl.col("example_id") == "none").iter_rows(named=True)
    assert row["reason"] == "no object is meant: the example has no phrase and is no caption"
    assert (row["image"], row["height"], row["width"], row["key"]) == ("images/000.png", HEIGHT, WIDTH, False)
    assert row["object"] is row["phrase"] is row["box"] is row["rle"] is row["area"] is None
    targets = token_masks(masks, dict.fromkeys(("none", "000-c", "000-q"), (View(4, 6),)), HeadImpact())
    assert set(targets.examples) == {"000-c", "000-q"}
    assert set(targets.left_out) == {"none"}


def test_rows_are_sorted_whatever_the_order_of_the_examples(tmp_path: Path) -> None:
    examples = write_dataset(tmp_path, 3)
    masks, _ = exact_masks(tmp_path, examples, MaskQuality())
    again, _ = exact_masks(tmp_path, examples[::-1], MaskQuality())
    assert masks.equals(again)
    assert masks.equals(masks.sort("example_id", "object"))


def test_a_mask_of_another_size_makes_its_examples_bad_with_both_sizes(tmp_path: Path) -> None:
    image = "images/001.png"
    other = np.zeros((WIDTH, HEIGHT), dtype=bool)
    other[3:9] = True
    examples = write_dataset(tmp_path, 2, {image: [object_row(image, 0, "cat", left()), object_row(image, 1, "dog", other)]})
    masks, bad = exact_masks(tmp_path, examples, MaskQuality())
    assert set(bad) == {"001-q", "001-c"}
    assert "mask is 60 x 40, the image 40 x 60" in bad["001-q"]
    assert "dog" in bad["001-c"]
    assert set(masks["example_id"]) == {"000-q", "000-c"}


def test_run_lengths_of_another_size_are_bad_too(tmp_path: Path) -> None:
    image = "images/001.png"
    lying = object_row(image, 0, "cat", np.ones((30, 60), dtype=bool)) | {"height": HEIGHT, "width": WIDTH}
    _, bad = exact_masks(tmp_path, write_dataset(tmp_path, 2, {image: [lying]}), MaskQuality())
    assert "fill 1800 pixels, the image has 40 x 60" in bad["001-q"]


def test_an_image_without_objects_makes_its_examples_bad(tmp_path: Path) -> None:
    _, bad = exact_masks(tmp_path, write_dataset(tmp_path, 2, {"images/000.png": []}), MaskQuality())
    assert set(bad) == {"000-q", "000-c"}
    assert "no object of this image" in bad["000-c"]


def test_a_phrase_that_names_no_object_is_bad_and_the_objects_are_told(tmp_path: Path) -> None:
    examples = write_dataset(tmp_path)
    bird = replace(examples[0], id="bird", phrase="bird")
    _, bad = exact_masks(tmp_path, [*examples, bird], MaskQuality())
    assert set(bad) == {"bird"}
    assert "'bird'" in bad["bird"]
    assert "['cat', 'dog']" in bad["bird"]


def test_a_missing_or_absent_image_is_bad(tmp_path: Path) -> None:
    examples = write_dataset(tmp_path, 2)
    (tmp_path / "images/001.png").unlink()
    _, bad = exact_masks(tmp_path, [*examples, question("text", None, None)], MaskQuality())
    assert set(bad) == {"001-q", "001-c", "text"}
    assert "cannot be read" in bad["001-q"]
    assert "no image" in bad["text"]


def test_a_dropped_object_keeps_its_row_with_the_reason(tmp_path: Path) -> None:
    speck = np.zeros((HEIGHT, WIDTH), dtype=bool)
    speck[0, 0] = True
    image = "images/000.png"
    objects = {image: [object_row(image, 0, "cat", speck), object_row(image, 1, "dog", right())]}
    masks, bad = exact_masks(tmp_path, write_dataset(tmp_path, 1, objects), MaskQuality(min_area=0.01))
    assert bad == {}
    reasons = dict(zip(masks["phrase"], masks["reason"], strict=True))
    assert reasons["dog"] is None
    assert "min_area = 0.01" in reasons["cat"]


def test_a_data_set_without_objects_is_refused(tmp_path: Path) -> None:
    examples = write_dataset(tmp_path)
    (tmp_path / "objects.parquet").unlink()
    with pytest.raises(ValueError, match=r"no objects\.parquet"):
        exact_masks(tmp_path, examples, MaskQuality())
