"""Which tokens are what in a prompt with its answer, and how much of each visual token's cell a pixel mask covers."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.layout import Layout, View, layout_name

Grid = tuple[int, int]
"""Rows and columns of the visual tokens, in reading order."""


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
    layouts: where the visual tokens lie, None without an image.
    """

    system: Bool[Tensor, "batch token"]
    visual: Bool[Tensor, "batch token"]
    question: Bool[Tensor, "batch token"]
    answer: Bool[Tensor, "batch token"]
    first: Int[Tensor, "batch"]
    layouts: tuple[Layout | None, ...]

    @property
    def text(self) -> Bool[Tensor, "batch token"]:
        """Question and answer."""
        return self.question | self.answer

    @property
    def real(self) -> Bool[Tensor, "batch token"]:
        """Every token of a segment."""
        return self.system | self.visual | self.question | self.answer


def segments(kinds: Int[Tensor, "batch token"], layouts: tuple[Layout | None, ...]) -> Segments:
    """The segments of tokens whose kinds are known.

    Raises ValueError with both numbers if an example has more or fewer visual tokens than its layout has cells, or some without an image.
    """
    for row, layout in zip(kinds, layouts, strict=True):
        found, cells = int((row == Kind.VISUAL).sum()), sum(view.cells for view in layout or ())
        if found != cells and layout != ():
            shape = f"{layout_name(layout)} = {cells} cells" if layout else "no image, so 0 cells"
            raise ValueError(f"{found} visual tokens in the prompt, the grid has {shape}: does patch_size equal the vision tower's stride?")
    masks = {kind: kinds == kind for kind in Kind}
    first = (kinds != Kind.NONE).to(torch.int64).argmax(dim=1)
    return Segments(masks[Kind.SYSTEM], masks[Kind.VISUAL], masks[Kind.QUESTION], masks[Kind.ANSWER], first, layouts)


def prompt_kinds(visual: list[bool]) -> list[Kind]:
    """The kind of each prompt token, from which of them are visual: system before the image, question after it or without one."""
    if True not in visual:
        return [Kind.QUESTION] * len(visual)
    start = visual.index(True)
    after = [Kind.VISUAL if is_visual else Kind.QUESTION for is_visual in visual[start:]]
    return [Kind.SYSTEM] * start + after


def coverage(mask: Bool[np.ndarray, "height width"], layout: Layout) -> Float[np.ndarray, "visual"]:
    """Share in [0, 1] of each visual token's cell that the mask covers, view after view in reading order; 0 wholly outside the image.

    A view's region is stretched over its grid, so a cell of the whole image is height / rows by width / columns pixels; a pixel on a border
    counts with the part that lies inside. Raises ValueError on an empty mask or grid.
    """
    for view in layout:
        if 0 in mask.shape or min(view.rows, view.columns) < 1:
            raise ValueError(f"a mask of {mask.shape[0]} x {mask.shape[1]} pixels cannot be laid on a grid of {view.rows} x {view.columns}")
    return np.concatenate([_view_coverage(mask.astype(np.float64), view) for view in layout])


def _view_coverage(mask: Float[np.ndarray, "height width"], view: View) -> Float[np.ndarray, "cell"]:
    rows = _overlap(mask.shape[0], view.rows, view.top, view.bottom)
    columns = _overlap(mask.shape[1], view.columns, view.left, view.right)
    return np.clip(rows @ mask @ columns.T, 0.0, 1.0).reshape(-1)


def _overlap(pixels: int, cells: int, start: float, stop: float) -> Float[np.ndarray, "cells pixels"]:
    """Share of each cell's length that each pixel takes; a cell's shares sum to 1 inside the image."""
    step = pixels * (stop - start) / cells
    edges = pixels * start + np.arange(cells + 1) * step
    left = np.maximum(edges[:-1, None], np.arange(pixels)[None, :])
    right = np.minimum(edges[1:, None], np.arange(1, pixels + 1)[None, :])
    return np.maximum(right - left, 0.0) * (cells / (pixels * (stop - start)))
