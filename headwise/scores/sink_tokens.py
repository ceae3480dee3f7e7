"""Visual tokens that heads look at whatever the image shows."""

import numpy as np
from jaxtyping import Bool, Float

from headwise.layout import Layout, View

ROUNDING = 1e-9
"""By how much of the image a cell may miss its edge through rounding and still touch it."""


def sink_tokens(mean_map: Float[np.ndarray, "visual"], layout: Layout, fence: float) -> Bool[np.ndarray, "visual"]:
    """The border tokens whose mean attention over all examples and heads is an outlier: above Q3 + fence * (Q3 - Q1) of all tokens.

    With fence = 1.5 this is Tukey's rule. Inner tokens are never sinks: what draws the eye there may be where objects stand.
    """
    first, third = np.quantile(mean_map, [0.25, 0.75])
    return border(layout) & (mean_map > third + fence * (third - first))


def border(layout: Layout) -> Bool[np.ndarray, "visual"]:
    """The cells that touch the image's edge or lie beyond it, view after view in reading order.

    Of a view of the whole image these are the outermost rows and columns; the seam between two tiles is no border.
    """
    return np.concatenate([_border(view) for view in layout])


def _border(view: View) -> Bool[np.ndarray, "cell"]:
    inner = [_inside(view.rows, view.top, view.bottom), _inside(view.columns, view.left, view.right)]
    return ~np.logical_and.outer(*inner).reshape(-1)


def _inside(cells: int, start: float, stop: float) -> Bool[np.ndarray, "cells"]:
    """Which of the cells from start to stop touch neither 0 nor 1."""
    edges = np.linspace(start, stop, cells + 1)
    return (edges[:-1] > ROUNDING) & (edges[1:] < 1 - ROUNDING)
