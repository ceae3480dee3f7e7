"""Which masks are good enough to score heads by."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from headwise.masks.rle import ious
from headwise.masks.settings import MaskQuality

Bounds = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels, x1 and y1 exclusive."""


def rejection(
    quality: MaskQuality, area: float, *, predicted_iou: float | None = None, stability: float | None = None, box_iou: float | None = None
) -> str | None:
    """Why an object is dropped that covers this share of the image; None if it is kept. An empty mask is dropped whatever the gates.

    The other figures, each in [0, 1], are those of a generated mask; a figure that is no number is a reason too.
    """
    figures = {"predicted_iou": predicted_iou, "stability": stability, "box_iou": box_iou}
    known = {name: figure for name, figure in figures.items() if figure is not None}
    if undefined := [name for name, figure in known.items() if math.isnan(figure)]:
        return f"{undefined[0]} is not a number"
    if area == 0:
        return "the mask is empty"
    if area < quality.min_area:
        return f"covers {area:.3g} of the image, less than min_area = {quality.min_area:g}"
    if area > quality.max_area:
        return f"covers {area:.3g} of the image, more than max_area = {quality.max_area:g}"
    for name, figure in known.items():
        if figure < (gate := getattr(quality, f"min_{name}")):
            return f"{name} is {figure:.3g}, less than min_{name} = {gate:g}"
    return None


def duplicates(rles: Sequence[str], height: int, width: int, scores: Sequence[float], max_overlap: float) -> dict[int, tuple[int, float]]:
    """Of the masks (COCO counts) those that repeat a kept one with a higher score, each with that one and their IoU (greedy NMS)."""
    overlaps = ious(rles, rles, height, width)
    kept: list[int] = []
    found: dict[int, tuple[int, float]] = {}
    for place in sorted(range(len(rles)), key=lambda i: -scores[i]):
        better = max(kept, key=lambda i: overlaps[place, i], default=None)
        if better is not None and overlaps[place, better] > max_overlap:
            found[place] = better, float(overlaps[place, better])
        else:
            kept.append(place)
    return found


def box_iou(first: Bounds, second: Bounds) -> float:
    """Intersection over union of two boxes; 0 where both are empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    common = max(width, 0) * max(height, 0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)) - common
    return common / union if union else 0.0


def bounding_box(mask: Bool[np.ndarray, "height width"]) -> Bounds:
    """The box around the mask; four zeros if it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return (0.0, 0.0, 0.0, 0.0)
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
