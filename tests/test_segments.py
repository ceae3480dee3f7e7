import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from headwise.layout import View
from headwise.segments import Kind, coverage, prompt_kinds, segments

SIZES = st.integers(1, 40)
GRIDS = st.tuples(st.integers(1, 12), st.integers(1, 12))


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    return draw(arrays(np.bool_, (draw(SIZES), draw(SIZES))))


@given(SIZES, SIZES, GRIDS)
def test_an_all_ones_mask_covers_every_token_with_one(height: int, width: int, grid: tuple[int, int]) -> None:
    np.testing.assert_allclose(coverage(np.ones((height, width), bool), (View(*grid),)), 1.0, rtol=1e-12)


@given(masks(), GRIDS)
def test_mean_coverage_is_the_pixel_share(mask: np.ndarray, grid: tuple[int, int]) -> None:
    np.testing.assert_allclose(coverage(mask, (View(*grid),)).mean(), mask.mean(), atol=1e-12)


@given(masks(), GRIDS)
def test_mirroring_the_mask_mirrors_the_grid(mask: np.ndarray, grid: tuple[int, int]) -> None:
    cells = coverage(mask, (View(*grid),)).reshape(grid)
    np.testing.assert_allclose(coverage(mask[:, ::-1], (View(*grid),)).reshape(grid), cells[:, ::-1], atol=1e-12)
    np.testing.assert_allclose(coverage(mask[::-1], (View(*grid),)).reshape(grid), cells[::-1], atol=1e-12)


@given(masks(), GRIDS)
def test_coverage_is_the_mean_over_finely_sampled_cells(mask: np.ndarray, grid: tuple[int, int]) -> None:
    """Every pixel repeated as often as the grid has rows and columns: then each cell is a whole number of samples."""
    fine = mask.repeat(grid[0], axis=0).repeat(grid[1], axis=1)
    cells = fine.reshape(grid[0], mask.shape[0], grid[1], mask.shape[1]).mean(axis=(1, 3))
    np.testing.assert_allclose(coverage(mask, (View(*grid),)), cells.reshape(-1), atol=1e-12)


@pytest.mark.parametrize(("shape", "grid"), [((0, 5), (3, 3)), ((5, 5), (0, 3))])
def test_nothing_to_cover_is_an_error(shape: tuple[int, int], grid: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="cannot be laid on a grid"):
        coverage(np.zeros(shape, bool), (View(*grid),))


def test_prompt_kinds() -> None:
    assert prompt_kinds([False, True, True, False]) == [Kind.SYSTEM, Kind.VISUAL, Kind.VISUAL, Kind.QUESTION]
    assert prompt_kinds([False, False]) == [Kind.QUESTION, Kind.QUESTION]


def test_segments_are_disjoint_and_know_the_first_token() -> None:
    kinds = torch.tensor([[0, 0, 1, 2, 2, 3, 4, 0], [1, 2, 2, 3, 3, 4, 4, 0]])
    found = segments(kinds, ((View(1, 2),), (View(2, 1),)))
    assert found.first.tolist() == [2, 0]
    assert torch.equal(found.real, kinds > 0)
    assert torch.equal(found.text, kinds >= 3)
    assert int((found.system.int() + found.visual + found.question + found.answer).max()) == 1


@pytest.mark.parametrize(("grid", "cells"), [((3, 3), "3 x 3 = 9 cells"), (None, "so 0 cells")])
def test_visual_tokens_must_be_as_many_as_the_grid_has_cells(grid: tuple[int, int] | None, cells: str) -> None:
    with pytest.raises(ValueError, match=f"2 visual tokens in the prompt.*{cells}"):
        segments(torch.tensor([[1, 2, 2, 3]]), (grid and (View(*grid),),))
