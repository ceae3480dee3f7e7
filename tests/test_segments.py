import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from headwise.segments import Kind, Layout, View, coverage, prompt_kinds, segments

SIZES = st.integers(1, 40)
GRIDS = st.tuples(st.integers(1, 12), st.integers(1, 12))


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    return draw(arrays(np.bool_, (draw(SIZES), draw(SIZES))))


@given(SIZES, SIZES, GRIDS)
def test_an_all_ones_mask_covers_every_token_with_one(height: int, width: int, grid: tuple[int, int]) -> None:
    np.testing.assert_allclose(coverage(np.ones((height, width), bool), grid), 1.0, rtol=1e-12)


@given(masks(), GRIDS)
def test_mean_coverage_is_the_pixel_share(mask: np.ndarray, grid: tuple[int, int]) -> None:
    np.testing.assert_allclose(coverage(mask, grid).mean(), mask.mean(), atol=1e-12)


@given(masks(), GRIDS)
def test_mirroring_the_mask_mirrors_the_grid(mask: np.ndarray, grid: tuple[int, int]) -> None:
    cells = coverage(mask, grid).reshape(grid)
    np.testing.assert_allclose(coverage(mask[:, ::-1], grid).reshape(grid), cells[:, ::-1], atol=1e-12)
    np.testing.assert_allclose(coverage(mask[::-1], grid).reshape(grid), cells[::-1], atol=1e-12)


@given(masks(), GRIDS)
def test_coverage_is_the_mean_over_finely_sampled_cells(mask: np.ndarray, grid: tuple[int, int]) -> None:
    """Every pixel repeated as often as the grid has rows and columns: then each cell is a whole number of samples."""
    fine = mask.repeat(grid[0], axis=0).repeat(grid[1], axis=1)
    cells = fine.reshape(grid[0], mask.shape[0], grid[1], mask.shape[1]).mean(axis=(1, 3))
    np.testing.assert_allclose(coverage(mask, grid), cells.reshape(-1), atol=1e-12)


@pytest.mark.parametrize(("shape", "grid"), [((0, 5), (3, 3)), ((5, 5), (0, 3))])
def test_nothing_to_cover_is_an_error(shape: tuple[int, int], grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="cannot be laid on a grid"):
        coverage(np.zeros(shape, bool), grid)


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
