"""Visual tokens that heads look at whatever the image shows."""

import numpy as np
from jaxtyping import Bool, Float

from headwise.segments import Grid


def sink_tokens(mean_map: Float[np.ndarray, "visual"], grid: Grid, fence: float) -> Bool[np.ndarray, "visual"]:
    """The border tokens whose mean attention over all examples and heads is an outlier: above Q3 + fence * (Q3 - Q1) of the grid's tokens.

    With fence = 1.5 this is Tukey's rule. Inner tokens are never sinks: what draws the eye there may be where objects stand.
    """
    first, third = np.quantile(mean_map, [0.25, 0.75])
    return border(grid) & (mean_map > third + fence * (third - first))


def border(grid: Grid) -> Bool[np.ndarray, "visual"]:
    """The outermost rows and columns of the grid, in reading order."""
    cells = np.ones(grid, dtype=bool)
    cells[1:-1, 1:-1] = False
    return cells.reshape(-1)
