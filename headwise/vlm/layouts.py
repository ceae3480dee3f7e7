"""Where the image tokens of a prompt lie on the image."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headwise.segments import Layout, View


@dataclass(frozen=True)
class Placement:
    """Where the image tokens of one prompt lie. is_cell: for each of them in order, is it a cell of the layout, or a mark?"""

    layout: Layout
    is_cell: tuple[bool, ...]


def fast_vlm(processor: Any, config: Any, size: tuple[int, int], inputs: Mapping[str, Tensor]) -> Placement:
    """One grid over the whole image."""
    height, width = inputs["pixel_values"].shape[-2:]
    view = View(height // processor.patch_size, width // processor.patch_size)
    return Placement((view,), (True,) * view.cells)


def instructblip(processor: Any, config: Any, size: tuple[int, int], inputs: Mapping[str, Tensor]) -> Placement:
    """The queries of the Q-Former have no place."""
    return Placement((), (True,) * config.num_query_tokens)


def temporary(processor: Any, config: Any, size: tuple[int, int], inputs: Mapping[str, Tensor]) -> Placement:
    """TEMPORARY, until the geometry of the families is here: all image tokens in one row."""
    count = int((inputs["input_ids"] == config.image_token_id).sum())
    return Placement((View(1, count),), (True,) * count)


llava = llava_next = llava_onevision = qwen_vl = paligemma = idefics3 = internvl = gemma3 = temporary
