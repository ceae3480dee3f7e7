"""Masks as COCO run lengths: ascii text, column-major runs that start with the background."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Float
from pycocotools import mask as coco


def encode(mask: Bool[np.ndarray, "height width"]) -> str:
    """The mask's COCO counts. Raises ValueError on a mask without pixels."""
    return encode_columns(np.ascontiguousarray(mask.T))


def encode_columns(columns: Bool[np.ndarray, "width height"]) -> str:
    """The COCO counts of a mask that is given column by column. Raises ValueError on a mask without pixels."""
    if 0 in columns.shape:
        raise ValueError(f"a mask of {columns.shape[1]} x {columns.shape[0]} pixels has no pixel")
    counts = coco.encode(columns.view(np.uint8).T)["counts"]
    return cast("bytes", counts).decode("ascii")  # the stubs say str


def decode(counts: str, height: int, width: int) -> Bool[np.ndarray, "height width"]:
    """The mask of these COCO counts. Raises ValueError if they are no counts, or do not fill height x width pixels exactly.

    Not by pycocotools: where the runs are too short it leaves the other pixels as they were in memory.
    """
    ends = run_ends(counts, height, width)
    pixels = np.zeros(height * width, dtype=bool)
    for start, stop in zip(ends[::2], ends[1::2], strict=False):  # an even number of runs ends in the object, an odd one outside it
        pixels[start:stop] = True
    return pixels.reshape(width, height).T


def run_ends(counts: str, height: int, width: int) -> list[int]:
    """Where each run ends, background first. Raises ValueError if they are no counts, or do not fill height x width pixels exactly."""
    ends = list(accumulate(runs(counts)))
    if ends[-1] != height * width:
        raise ValueError(f"the mask's runs fill {ends[-1]} pixels, the image has {height} x {width} = {height * width}")
    return ends


def bounds(counts: str, height: int, width: int) -> tuple[float, tuple[float, float, float, float]]:
    """The mask's share of the image, and the box x0, y0, x1, y1 around it in pixels, from its counts."""
    packed: Any = _packed([counts], height, width)[0]
    x, y, box_width, box_height = (float(side) for side in coco.toBbox(packed))
    return float(coco.area(packed)) / (height * width), (x, y, x + box_width, y + box_height)


def ious(first: Sequence[str], second: Sequence[str], height: int, width: int) -> Float[np.ndarray, "first second"]:
    """IoU of each mask with each, from their counts: no pixel is unpacked. The counts have to fill height x width."""
    if not first or not second:
        return np.zeros((len(first), len(second)))
    return np.asarray(coco.iou(_packed(first, height, width), _packed(second, height, width), [0] * len(second)))


def union(masks: Sequence[str], height: int, width: int) -> str:
    """The counts of all these masks together."""
    return cast("bytes", coco.merge(_packed(masks, height, width))["counts"]).decode("ascii")


def _packed(masks: Sequence[str], height: int, width: int) -> Any:
    return [{"size": [height, width], "counts": counts.encode()} for counts in masks]


def runs(counts: str) -> list[int]:
    """The run lengths in pixels, background first.

    Each is a little-endian number of 5-bit groups in characters from `0`, with a continuation bit 32 and the last group's bit 16 as its
    sign; from the third on, it is the difference to the run two before (maskApi.c, rleFrString). Raises ValueError on any other text.
    """
    lengths: list[int] = []
    value, shift = 0, 0
    for character in counts:
        group = ord(character) - 48
        if not 0 <= group < 64:
            raise ValueError(f"{character!r} is no character of COCO run lengths")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        value -= (group & 16) << (shift - 4)
        lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
        value, shift = 0, 0
    if shift or not lengths or min(lengths) < 0:
        raise ValueError(f"not COCO run lengths: {counts[:20]!r}")
    return lengths
