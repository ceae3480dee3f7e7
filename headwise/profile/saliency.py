"""I-SAL, the saliency of a head in both directions between text and image, and how alike two heads look at the image (RAH-LoRA)."""

from collections.abc import Sequence

import numpy as np
import polars as pl
from jaxtyping import Float

from headwise.layout import Layout

Z_EPSILON = 1e-6


def layer_z_scores(values: Float[np.ndarray, "layer head"]) -> Float[np.ndarray, "layer head"]:
    """`(x - mean) / (std + 1e-6)` over the heads of each layer, with the population's standard deviation (RAH-LoRA eq. 4)."""
    return (values - values.mean(axis=1, keepdims=True)) / (values.std(axis=1, keepdims=True) + Z_EPSILON)


def saliency(text_to_image: Float[np.ndarray, "*heads"], image_to_text: Float[np.ndarray, "*heads"]) -> Float[np.ndarray, "*heads"]:
    """Mean attention per pair of a text and a visual token, averaged over the two directions (RAH-LoRA eq. 3): each half is at most 1.

    In a causal decoder an image sees only the text before it, so that its half is mostly attention to the first token.
    """
    return (text_to_image + image_to_text) / 2


def map_cosines(maps: Sequence[Float[np.ndarray, "layer head _"]], layouts: Sequence[Layout | None]) -> Float[np.ndarray, "own other"]:
    """How alike the heads look at the image, in [0, 1]: the cosine of their mean maps (RAH-LoRA eq. 10), head by head of all layers.

    maps: of each example, text tokens' mean attention to each of its visual tokens. Where these lie elsewhere on other images (layouts)
    there is no mean map, and the examples' cosines are averaged instead. A map that is 0 everywhere is like no other.
    """
    flat = [map_.reshape(-1, map_.shape[-1]).astype(np.float64) for map_ in maps]
    if len(set(layouts)) == 1:
        flat = [np.mean(flat, axis=0)]
    return np.mean([_cosines(map_) for map_ in flat], axis=0)


def rank_correlation(one: Float[np.ndarray, "layer head"], other: Float[np.ndarray, "layer head"]) -> float | None:
    """Spearman's correlation of two scores over all heads; None if one of them is the same for all."""
    both = pl.DataFrame({"one": one.ravel(), "other": other.ravel()})
    found = both.select(pl.corr("one", "other", method="spearman")).item()
    return float(found) if np.isfinite(found) else None


def top_overlap(one: Float[np.ndarray, "layer head"], other: Float[np.ndarray, "layer head"]) -> float:
    """Of the heads in the upper 30 % of their layer by one score, the share that is so by the other too; 1 where there is no such head."""
    tops = [score > np.percentile(score, 70, axis=1, keepdims=True) for score in (one, other)]
    return float((tops[0] & tops[1]).sum() / tops[0].sum()) if tops[0].any() else 1.0


def _cosines(rows: Float[np.ndarray, "head visual"]) -> Float[np.ndarray, "head other"]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return unit @ unit.T
