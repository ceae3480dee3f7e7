from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from headwise.layout import Layout, View
from headwise.segments import Kind, coverage, prompt_kinds, segments

SIZES = st.integers(1, 40)
GRIDS = st.tuples(st.integers(1, 12), st.integers(1, 12))


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    return draw(arrays(np.bool_, (draw(SIZES), draw(SIZES))))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Up to three grids over boxes that reach into the image from up to half of its size outside."""
    starts, ends = st.integers(-8, 15), st.integers(1, 24)
    boxes = st.tuples(starts, starts, ends, ends).filter(lambda box: box[0] < box[2] and box[1] < box[3])
    views = st.builds(lambda grid, box: View(*grid, *(edge / 16 for edge in box)), GRIDS, boxes)
    return tuple(draw(st.lists(views, min_size=1, max_size=3)))


def on_image(view: View) -> np.ndarray:
    """Share of each cell that lies on the image."""
    down = np.linspace(view.top, view.bottom, view.rows + 1)
    right = np.linspace(view.left, view.right, view.columns + 1)
    return np.outer(np.diff(down.clip(0, 1)) / np.diff(down), np.diff(right.clip(0, 1)) / np.diff(right))


@given(SIZES, SIZES, layouts())
def test_an_all_ones_mask_covers_with_one_every_token_that_sees_the_image(height: int, width: int, layout: Layout) -> None:
    seen = np.concatenate([on_image(view).reshape(-1) for view in layout]) > 1e-9
    np.testing.assert_allclose(coverage(np.ones((height, width), bool), layout), seen.astype(float), rtol=1e-9)


@given(masks(), GRIDS)
def test_mean_coverage_is_the_pixel_share(mask: np.ndarray, grid: tuple[int, int]) -> None:
    np.testing.assert_allclose(coverage(mask, (View(*grid),)).mean(), mask.mean(), atol=1e-12)


@given(masks(), layouts())
def test_mean_coverage_over_a_view_is_the_pixel_share_of_its_region(mask: np.ndarray, layout: Layout) -> None:
    """Sampled 16 times a pixel, as finely as the boxes' borders."""
    fine = mask.repeat(16, axis=0).repeat(16, axis=1)
    for view in layout:
        top, bottom = (round(max(0.0, min(1.0, edge)) * fine.shape[0]) for edge in (view.top, view.bottom))
        left, right = (round(max(0.0, min(1.0, edge)) * fine.shape[1]) for edge in (view.left, view.right))
        cells = coverage(mask, (view,)).reshape(view.rows, view.columns)
        found = (cells * on_image(view)).sum() / on_image(view).sum()
        np.testing.assert_allclose(found, fine[top:bottom, left:right].mean(), atol=1e-9)


@given(masks(), layouts())
def test_mirroring_the_image_mirrors_each_view(mask: np.ndarray, layout: Layout) -> None:
    for view in layout:
        cells = coverage(mask, (view,)).reshape(view.rows, view.columns)
        sideways = replace(view, left=1 - view.right, right=1 - view.left)
        upside_down = replace(view, top=1 - view.bottom, bottom=1 - view.top)
        np.testing.assert_allclose(coverage(mask[:, ::-1], (sideways,)).reshape(cells.shape), cells[:, ::-1], atol=1e-9)
        np.testing.assert_allclose(coverage(mask[::-1], (upside_down,)).reshape(cells.shape), cells[::-1], atol=1e-9)


@given(arrays(np.bool_, st.tuples(st.integers(1, 8), st.integers(1, 8))), layouts())
@settings(max_examples=30)
def test_coverage_is_the_mean_over_finely_sampled_cells(mask: np.ndarray, layout: Layout) -> None:
    """Each cell sampled at 40 x 40 points; those beyond the image do not count."""
    slow: list[float] = []
    for view in layout:
        down = (view.top + (np.arange(view.rows * 40) + 0.5) / (view.rows * 40) * (view.bottom - view.top)) * mask.shape[0]
        right = (view.left + (np.arange(view.columns * 40) + 0.5) / (view.columns * 40) * (view.right - view.left)) * mask.shape[1]
        inside = np.outer((down >= 0) & (down < mask.shape[0]), (right >= 0) & (right < mask.shape[1]))
        rows, columns = (np.floor(at).astype(int).clip(0, last - 1) for at, last in zip((down, right), mask.shape, strict=True))
        hits = mask[np.ix_(rows, columns)] & inside
        for row in range(view.rows):
            for column in range(view.columns):
                cell = np.s_[row * 40 : row * 40 + 40, column * 40 : column * 40 + 40]
                slow.append(hits[cell].sum() / max(1, inside[cell].sum()))
    share = np.concatenate([on_image(view).reshape(-1) for view in layout])
    assert (np.abs(coverage(mask, layout) - slow) * share).max() < 0.1  # a few of 40 lines of points


def test_views_follow_each_other_and_cells_beyond_the_image_are_not_covered() -> None:
    """A left half that is the thing: a tile beyond the left border, one that straddles it, and the whole image in two columns."""
    mask = np.array([[True, False]])
    beyond, straddling, whole = View(1, 1, left=-0.5, right=0.0), View(1, 2, left=-1.0, right=1.0), View(1, 2)
    np.testing.assert_allclose(coverage(mask, (beyond, straddling, whole)), [0, 0, 0.5, 1, 0])
    assert coverage(mask, ()).shape == (0,)


@pytest.mark.parametrize(("shape", "view"), [((0, 5), View(3, 3)), ((5, 5), View(0, 3)), ((5, 5), View(3, 3, top=1.0))])
def test_nothing_to_cover_is_an_error(shape: tuple[int, int], view: View) -> None:
    with pytest.raises(ValueError, match="cannot be laid on a grid"):
        coverage(np.zeros(shape, bool), (view,))


def test_prompt_kinds() -> None:
    S, V, Q = Kind.SYSTEM, Kind.VISUAL, Kind.QUESTION
    assert prompt_kinds([False, True, True, False], [True, True]) == [S, V, V, Q]
    assert prompt_kinds([False, False], []) == [Q, Q]
    assert prompt_kinds([False, True, False, True, False], [True, True]) == [S, V, S, V, Q], "a mark of text between two tiles"
    assert prompt_kinds([True, True, True, True, False], [True, False, True, False]) == [V, S, V, S, Q], "marks in the image's own places"


def test_more_image_tokens_than_one_image_makes_are_refused() -> None:
    with pytest.raises(ValueError, match="2 image tokens in the prompt, one image makes 1: is there exactly one image"):
        prompt_kinds([False, True, True], [True])


def test_segments_are_disjoint_and_know_the_first_token() -> None:
    kinds = torch.tensor([[0, 0, 1, 2, 2, 3, 4, 0], [1, 2, 2, 3, 3, 4, 4, 0]])
    found = segments(kinds, ((View(1, 2),), (View(1, 1), View(1, 1))))
    assert found.first.tolist() == [2, 0]
    assert torch.equal(found.real, kinds > 0)
    assert torch.equal(found.text, kinds >= 3)
    assert int((found.system.int() + found.visual + found.question + found.answer).max()) == 1


@pytest.mark.parametrize(("layout", "cells"), [((View(3, 3), View(1, 2)), r"3 x 3 \+ 1 x 2 = 11 cells"), (None, "so 0 cells")])
def test_visual_tokens_must_be_as_many_as_the_layout_has_cells(layout: Layout | None, cells: str) -> None:
    with pytest.raises(ValueError, match=f"2 visual tokens in the prompt.*{cells}"):
        segments(torch.tensor([[1, 2, 2, 3]]), (layout,))


def test_visual_tokens_without_a_place_are_not_counted() -> None:
    assert segments(torch.tensor([[1, 2, 2, 3]]), ((),)).layouts == ((),)
