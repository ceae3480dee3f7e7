"""Which tokens are what in a prompt with its answer, and how much of each visual token's cell a pixel mask covers."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwise.layout import Layout, View, layout_name


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

    system: the tokens before the last visual one, marks between the views and rows of the image included. visual: the tokens that show a
    part of the image. question: the tokens after them up to the answer, the template's own included (without an image: the whole
    prompt). answer: the answer's tokens. first: position of the first real token. layouts: where the visual tokens lie on the image,
    None without an image, empty if they have no place.
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

    Raises ValueError with both numbers if an example has more or fewer visual tokens than its layout has cells.
    """
    for row, layout in zip(kinds, layouts, strict=True):
        found, cells = int((row == Kind.VISUAL).sum()), sum(view.cells for view in layout or ())
        if found != cells and layout != ():
            shape = f"{layout_name(layout)} = {cells} cells" if layout else "no image, so 0 cells"
            raise ValueError(f"{found} visual tokens in the prompt, the grid has {shape}: does patch_size equal the vision tower's stride?")
    masks = {kind: kinds == kind for kind in Kind}
    first = (kinds != Kind.NONE).to(torch.int64).argmax(dim=1)
    return Segments(masks[Kind.SYSTEM], masks[Kind.VISUAL], masks[Kind.QUESTION], masks[Kind.ANSWER], first, layouts)


def prompt_kinds(is_image: Sequence[bool], is_cell: Sequence[bool]) -> list[Kind]:
    """The kind of each prompt token: visual if it is a cell of the image, question after the last image token or without one, else system.

    is_image: which tokens are image tokens. is_cell: which of these, in order, are cells, and not marks such as the end of a row. Raises
    ValueError with both numbers if the prompt has more or fewer image tokens than one image makes.
    """
    if sum(is_image) != len(is_cell):
        raise ValueError(f"{sum(is_image)} image tokens in the prompt, one image makes {len(is_cell)}: is there exactly one image in it?")
    cells = iter(is_cell)
    kinds = [Kind.VISUAL if image and next(cells) else Kind.SYSTEM for image in is_image]
    end = max((index + 1 for index, image in enumerate(is_image) if image), default=0)
    return [*kinds[:end], *[Kind.QUESTION] * (len(kinds) - end)]


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
