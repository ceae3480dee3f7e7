"""Which tokens are what in a prompt with its answer, and how much of each visual token's cell a pixel mask covers."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Grid = tuple[int, int]
"""Rows and columns of the visual tokens, in reading order."""


@dataclass(frozen=True, order=True)
class View:
    """A grid of visual tokens, in reading order, that shows one region of the image.

    top, left, bottom, right: the region's borders as fractions of the image's height and width; beyond 0 or 1 where the image processor
    pads. The whole image by default.
    """

    rows: int
    columns: int
    top: float = 0.0
    left: float = 0.0
    bottom: float = 1.0
    right: float = 1.0

    @property
    def cells(self) -> int:
        """Visual tokens of the view."""
        return self.rows * self.columns


Layout = tuple[View, ...]
"""Where the visual tokens of one prompt lie on the image: the views in the order of their tokens (tiles, a global view, or one grid).
Empty if the tokens have no place (the queries of a Q-Former)."""


class Kind(IntEnum):
    """What a token is; NONE is padding or the end-of-turn token."""

    NONE = 0
    SYSTEM = 1
    VISUAL = 2
    QUESTION = 3
    ANSWER = 4


@dataclass(frozen=True)
class Segments:
    """The segments of a batch. The end-of-turn token and padding are in none; no token is in two.

    system: the tokens before the first visual one. visual: the image's tokens. question: the tokens after them up to the answer, the
    template's own included (without an image: the whole prompt). answer: the answer's tokens. first: position of the first real token.
    grids: rows and columns of the visual tokens, None without an image.
    """

    system: Bool[Tensor, "batch token"]
    visual: Bool[Tensor, "batch token"]
    question: Bool[Tensor, "batch token"]
    answer: Bool[Tensor, "batch token"]
    first: Int[Tensor, "batch"]
    grids: tuple[Grid | None, ...]

    @property
    def text(self) -> Bool[Tensor, "batch token"]:
        """Question and answer."""
        return self.question | self.answer

    @property
    def real(self) -> Bool[Tensor, "batch token"]:
        """Every token of a segment."""
        return self.system | self.visual | self.question | self.answer


def segments(kinds: Int[Tensor, "batch token"], grids: tuple[Grid | None, ...]) -> Segments:
    """The segments of tokens whose kinds are known.

    Raises ValueError with both numbers if an example has more or fewer visual tokens than its grid has cells.
    """
    for row, grid in zip(kinds, grids, strict=True):
        found, cells = int((row == Kind.VISUAL).sum()), grid[0] * grid[1] if grid else 0
        if found != cells:
            shape = f"{grid[0]} x {grid[1]} = {cells} cells" if grid else "no image, so 0 cells"
            raise ValueError(f"{found} visual tokens in the prompt, the grid has {shape}: does patch_size equal the vision tower's stride?")
    masks = {kind: kinds == kind for kind in Kind}
    first = (kinds != Kind.NONE).to(torch.int64).argmax(dim=1)
    return Segments(masks[Kind.SYSTEM], masks[Kind.VISUAL], masks[Kind.QUESTION], masks[Kind.ANSWER], first, grids)


def prompt_kinds(visual: list[bool]) -> list[Kind]:
    """The kind of each prompt token, from which of them are visual: system before the image, question after it or without one."""
    if True not in visual:
        return [Kind.QUESTION] * len(visual)
    start = visual.index(True)
    after = [Kind.VISUAL if is_visual else Kind.QUESTION for is_visual in visual[start:]]
    return [Kind.SYSTEM] * start + after


def coverage(mask: Bool[np.ndarray, "height width"], layout: Layout) -> Float[np.ndarray, "visual"]:
    """Share in [0, 1] of each visual token's cell that the mask covers, in the tokens' order: view after view, each in reading order.

    A pixel on a cell's border counts with the part that lies inside; of a cell on the image's border only the part on the image counts,
    and a cell beyond the image has 0. So the mean over a view inside the image is the mask's share of its region, exactly. Raises
    ValueError on an empty mask or grid.
    """
    return np.concatenate([np.zeros(0), *(_view_coverage(mask, view) for view in layout)])


def _view_coverage(mask: Bool[np.ndarray, "height width"], view: View) -> Float[np.ndarray, "cell"]:
    height, width = mask.shape
    if not (height and width and view.rows > 0 and view.columns > 0 and view.top < view.bottom and view.left < view.right):
        raise ValueError(f"a mask of {height} x {width} pixels cannot be laid on a grid of {view.rows} x {view.columns} cells: {view}")
    rows = _overlap(height, view.rows, view.top, view.bottom)
    columns = _overlap(width, view.columns, view.left, view.right)
    return np.clip(rows @ mask.astype(np.float64) @ columns.T, 0.0, 1.0).reshape(-1)


def _overlap(pixels: int, cells: int, start: float, end: float) -> Float[np.ndarray, "cells pixels"]:
    """Share that each pixel takes of each cell's length on the image, for cells from start to end (1: the image's length).

    A cell's shares sum to 1, to 0 beyond the image.
    """
    borders = start + (end - start) * np.arange(cells + 1) / cells
    on_image = np.diff(borders.clip(0.0, 1.0)) / np.diff(borders)
    on_image[on_image < 1e-9] = np.inf  # no more than rounding: the cell lies beyond the image
    length = pixels * (end - start)
    edges = start * pixels + np.arange(cells + 1) * (length / cells)
    left = np.maximum(edges[:-1, None], np.arange(pixels)[None, :])
    right = np.minimum(edges[1:, None], np.arange(1, pixels + 1)[None, :])
    return np.maximum(right - left, 0.0) * (cells / length) / on_image[:, None]
