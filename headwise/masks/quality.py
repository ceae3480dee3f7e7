"""Which masks are good enough to score heads by."""

from typing import Annotated

import numpy as np
from jaxtyping import Bool
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class MaskQuality:
    """The gates that an object's mask has to pass."""

    min_area: Annotated[float, Field(ge=0, le=1, description="smallest share of the image that an object may cover")] = 0.001
    max_area: Annotated[float, Field(ge=0, le=1, description="largest share of the image that an object may cover")] = 0.95
    max_bad_share: Annotated[float, Field(ge=0, le=1, description="share of bad examples above which the step fails")] = 0.05


def rejection(area: float, quality: MaskQuality) -> str | None:
    """Why an object that covers this share of the image is dropped; None if it is kept. An empty mask is dropped whatever the gates."""
    if area == 0:
        return "the mask is empty"
    if area < quality.min_area:
        return f"covers {area:.3g} of the image, less than min_area = {quality.min_area:g}"
    if area > quality.max_area:
        return f"covers {area:.3g} of the image, more than max_area = {quality.max_area:g}"
    return None


def bounding_box(mask: Bool[np.ndarray, "height width"]) -> list[float]:
    """[x0, y0, x1, y1] in pixels around the mask, x1 and y1 exclusive; four zeros if it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return [0.0, 0.0, 0.0, 0.0]
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]
