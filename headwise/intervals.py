"""How wide a bootstrap interval has to be."""

import numpy as np
from scipy import stats

LEVEL = 0.95


def bootstrap_tail(clusters: int) -> float:
    """The share of bootstrap draws to leave out at either end for a 95 % interval over that many clusters (images).

    Hesterberg (2015, "What Teachers Should Know About the Bootstrap", eq. 12): plain percentiles are too narrow for few clusters, by
    `sqrt((C-1)/C) z/t`. Of a single cluster nothing is left out.
    """
    if clusters < 2:
        return 0.0
    t = stats.t.ppf((1 - LEVEL) / 2, clusters - 1)
    return float(stats.norm.cdf(t * np.sqrt(clusters / (clusters - 1))))
