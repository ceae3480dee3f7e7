"""Observe a batch: the statistics of every head, read while the model runs."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headwise.attention.reducers import Reading, statistics
from headwise.attention.schema import MAPS
from headwise.attention.seam import Attention, visiting
from headwise.layout import Layout
from headwise.vlm import VLM, Batch


@dataclass(frozen=True)
class Observed:
    """The statistics of one batch. maps: per name and example, attention to each visual token (none without an image)."""

    maps: dict[str, tuple[Float[np.ndarray, "layer head _"], ...]]
    scalars: dict[str, Float[np.ndarray, "batch layer head"]]
    layouts: tuple[Layout | None, ...]


def observe(vlm: VLM, batch: Batch) -> Observed:
    """The statistics of `reducers` for every example, layer and head of the batch, in fp32.

    One forward pass with the model's own SDPA output; attention is held in blocks of rows only. Raises ValueError if an example has no
    answer, on which most statistics rest.
    """
    if not bool(batch.segments.answer.any(1).all()):
        raise ValueError("the batch has an example without an answer: encode it with `answers`")
    reading, layers = Reading.of(batch.segments), list[dict[str, Tensor]]()

    def visit(attention: Attention, output: Tensor) -> None:
        layers.append(statistics(attention, reading))

    with visiting(vlm, visit):
        forward(vlm, batch)
    found = {name: torch.stack([layer[name] for layer in layers], dim=1).cpu().numpy() for name in layers[0]}
    sizes = batch.segments.visual.sum(1).tolist()
    maps = {name: tuple(map_[:, :, :size] for map_, size in zip(found[name], sizes, strict=True)) for name in MAPS}
    return Observed(maps, {name: values for name, values in found.items() if name not in MAPS}, batch.segments.layouts)


def forward(vlm: VLM, batch: Batch, logits_to_keep: int = 1, **options: object) -> Any:
    """One pass without gradients or cache; the logits of the last `logits_to_keep` positions (0 = all)."""
    run: Any = vlm.model
    with torch.no_grad():
        return run(**batch.inputs, use_cache=False, logits_to_keep=logits_to_keep, **options)
