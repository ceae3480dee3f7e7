"""Head Impact (HI): how well the place a head looks at agrees with the object that the answer names (arXiv 2511.23375)."""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt64
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Rule = Literal["mean", "quantile", "mean_plus_std"]
Cut = tuple[Rule, float]
"""A rule for the threshold of a map, and its value: the quantile, or the k of mean + k std."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class HeadImpact:
    """How stored attention maps and masks become scores; a change of any of these needs no model.

    Every map is the mean over the answer's rows and is binarised after that mean (`mean_then_binarise`, the paper's default).
    """

    threshold: Annotated[Rule, Field(description="a token is looked at above the map's mean, a quantile of it, or mean + k std")] = "mean"
    threshold_value: Annotated[float, Field(ge=0, le=10, description="the quantile (below 1) or the k; unused by 'mean'")] = 0.5
    mask_threshold: Annotated[
        float, Field(ge=0, le=1, description="share of a token's cell that the mask must cover for the token to be in it; 0 = any")
    ] = 0.5
    mask_object: Annotated[Literal["key", "union"], Field(description="the object that the answer names, or all objects")] = "key"
    sink_fence: Annotated[float, Field(ge=0, description="border tokens above Q3 + this x (Q3 - Q1) of the mean map are sinks")] = 1.5
    chance_masks: Annotated[int, Field(ge=1, description="at most so many other images' masks give the chance level")] = 32
    bootstrap: Annotated[int, Field(ge=1, description="resamples of the images behind intervals and the stability of the ranking")] = 200
    seed: Annotated[int, Field(ge=0, description="seed of the resamples and of the choice of other masks")] = 0
    min_images: Annotated[int, Field(ge=2, description="fewer images with a usable mask than this fail the step")] = 20
    max_bad_share: Annotated[
        float, Field(ge=0, le=1, description="share of examples whose mask may be missing or unreadable before the step fails")
    ] = 0.05

    @property
    def cut(self) -> Cut:
        """The threshold's rule and value."""
        return self.threshold, self.threshold_value

    def __post_init__(self) -> None:
        """Raises ValueError if the threshold is a quantile that is none."""
        if self.threshold == "quantile" and self.threshold_value >= 1:
            raise ValueError(f"threshold_value = {self.threshold_value:g} is no quantile: give a share below 1")


def thresholds(maps: Float[np.ndarray, "map visual"], cuts: Sequence[Cut]) -> Float[np.ndarray, "cut map"]:
    """Each map's own threshold under each cut; a visual token is looked at if it is above. The maps' scale does not matter.

    `mean`: the map's mean. `mean_plus_std`: mean + value * population standard deviation. `quantile`: the token value at rank
    floor((visual - 1) * value), counted from the smallest (numpy's method "lower").
    """
    rules = {rule for rule, _ in cuts}
    ordered = np.sort(maps, axis=1) if "quantile" in rules else maps  # vectorised: faster than np.partition
    mean = maps.mean(axis=1)
    std = maps.std(axis=1) if "mean_plus_std" in rules else mean
    levels = {
        "mean": lambda _: mean,
        "mean_plus_std": lambda k: mean + k * std,
        "quantile": lambda share: ordered[:, int((maps.shape[1] - 1) * share)],
    }
    return np.stack([levels[rule](value) for rule, value in cuts])


def binarise(maps: Float[np.ndarray, "map visual"], cuts: Sequence[Cut]) -> Bool[np.ndarray, "cut map visual"]:
    """Which visual tokens each map looks at, under each cut."""
    return maps > thresholds(maps, cuts)[:, :, None]


def iou(binary: Bool[np.ndarray, "*map visual"], masks: Bool[np.ndarray, "mask visual"]) -> Float32[np.ndarray, "*map mask"]:
    """Intersection over union in [0, 1] of each binarised map with each token mask; 0 where both are empty.

    Tokens are counted as bits, 64 at a time: as fast as a matrix product on one core, and no thread pool to wait for on a busy machine.
    """
    looked, meant = _pack(binary), _pack(masks)
    shared = np.zeros((*looked.shape[:-1], len(meant)), dtype=np.float32)  # whole numbers, exact up to 2^24
    for word in range(looked.shape[-1]):
        shared += np.bitwise_count(looked[..., word, None] & meant[:, word])
    sizes = [np.bitwise_count(words).sum(axis=-1, dtype=np.float32) for words in (looked, meant)]
    return shared / np.maximum(sizes[0][..., None] + sizes[1] - shared, 1)


def _pack(tokens: Bool[np.ndarray, "*row visual"]) -> UInt64[np.ndarray, "*row word"]:
    """Tokens as bits, the last word filled up with zeros."""
    words = -(-tokens.shape[-1] // 64)
    padded = np.zeros((*tokens.shape[:-1], words * 64), dtype=bool)
    padded[..., : tokens.shape[-1]] = tokens
    return np.packbits(padded).view(np.uint64).reshape(*tokens.shape[:-1], words)
