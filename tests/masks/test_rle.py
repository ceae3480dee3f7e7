from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco

from headwise.masks.quality import bounding_box
from headwise.masks.rle import bounds, decode, encode, encode_columns, ious, runs, union

MASKS = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40))


def obvious_runs(mask: np.ndarray) -> list[int]:
    pixels = [False, *mask.T.reshape(-1).tolist()]  # column-major; a leading background pixel makes the first run background
    lengths = [len(list(group)) for _, group in groupby(pixels)]
    return [lengths[0] - 1, *lengths[1:]]


@settings(max_examples=50, deadline=None)
@given(MASKS)
def test_decoding_gives_back_what_was_encoded(mask: np.ndarray) -> None:
    assert np.array_equal(decode(encode(mask), *mask.shape), mask)


@settings(max_examples=50, deadline=None)
@given(MASKS)
def test_runs_are_the_column_major_run_lengths(mask: np.ndarray) -> None:
    assert runs(encode(mask)) == obvious_runs(mask)


def test_long_runs_and_shrinking_ones() -> None:
    mask = np.zeros((700, 900), dtype=bool)
    mask[:, 300:800] = True
    mask[10:20, 850] = True
    assert runs(encode(mask)) == obvious_runs(mask)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")  # pycocotools 2.0.11
@settings(max_examples=50, deadline=None)
@given(MASKS)
def test_decoding_agrees_with_pycocotools(mask: np.ndarray) -> None:
    counts = encode(mask)
    assert np.array_equal(decode(counts, *mask.shape), coco.decode({"size": list(mask.shape), "counts": counts.encode()}))


def test_decoded_masks_are_boolean_height_by_width() -> None:
    mask = np.zeros((3, 5), dtype=bool)
    mask[1, 2:4] = True
    found = decode(encode(mask), 3, 5)
    assert found.dtype == np.bool_
    assert found.shape == (3, 5)


@pytest.mark.parametrize(("height", "width"), [(6, 7), (5, 8), (4, 7), (50, 70)])
def test_a_mask_of_another_size_is_refused_with_both_sizes(height: int, width: int) -> None:
    mask = np.eye(5, 7, dtype=bool)
    with pytest.raises(ValueError, match=rf"fill 35 pixels, the image has {height} x {width}"):
        decode(encode(mask), height, width)


@pytest.mark.parametrize("counts", ["", "é", "two words", "\x00", "Q" * 3, "0?"])
def test_text_that_is_no_run_lengths_is_refused(counts: str) -> None:
    with pytest.raises(ValueError):
        decode(counts, 5, 7)


def test_a_negative_run_is_refused() -> None:
    minus_one = chr(48 + 31)  # five bits of ones: -1
    with pytest.raises(ValueError, match="not COCO run lengths"):
        runs(f"5{minus_one}")


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=[chr(i) for i in range(48, 112)], max_size=12))
def test_any_counts_decode_to_a_full_mask_or_are_refused(counts: str) -> None:
    try:
        lengths = runs(counts)
    except ValueError:
        return
    if sum(lengths) > 10_000 or not sum(lengths):
        return
    assert decode(counts, 1, sum(lengths)).sum() == sum(lengths[1::2])


def test_a_mask_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="0 x 4"):
        encode(np.zeros((0, 4), dtype=bool))


@settings(max_examples=50, deadline=None)
@given(MASKS)
def test_bounds_are_the_area_and_the_box_of_the_mask(mask: np.ndarray) -> None:
    area, box = bounds(encode(mask), *mask.shape)
    assert area == pytest.approx(mask.mean())
    assert box == bounding_box(mask)


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))))
def test_ious_and_union_are_those_of_the_pixels(masks: np.ndarray) -> None:
    counts, size = [encode(mask) for mask in masks], masks.shape[1:]
    plain = np.array([[(one & two).sum() / max((one | two).sum(), 1) for two in masks] for one in masks])
    assert np.allclose(ious(counts, counts, *size), plain)
    assert np.array_equal(decode(union(counts, *size), *size), masks.any(axis=0))
    assert ious([], counts, *size).shape == (0, len(masks))


@settings(max_examples=20, deadline=None)
@given(MASKS)
def test_columns_of_a_mask_encode_as_the_mask(mask: np.ndarray) -> None:
    assert encode_columns(np.ascontiguousarray(mask.T)) == encode(mask) == encode(np.asfortranarray(mask))
