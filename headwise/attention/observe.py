"""Observe a batch: the statistics of every head, read while the model runs."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headwise.attention.reducers import statistics
from headwise.attention.schema import MAPS
from headwise.attention.seam import Attention, visiting
from headwise.segments import Grid
from headwise.vlm import VLM, Batch


@dataclass(frozen=True)
class Observed:
    """The statistics of one batch. maps: per name and example, attention to each visual token (none without an image)."""

    maps: dict[str, tuple[Float[np.ndarray, "layer head _"], ...]]
    scalars: dict[str, Float[np.ndarray, "batch layer head"]]
    grids: tuple[Grid | None, ...]


def observe(vlm: VLM, batch: Batch) -> Observed:
    """The statistics of `reducers` for every example, layer and head of the batch, in fp32.

    One forward pass with the model's own SDPA output; attention is held in blocks of rows only. Raises ValueError if an example has no
    answer, on which most statistics rest.
    """
    if not bool(batch.segments.answer.any(1).all()):
        raise ValueError("the batch has an example without an answer: encode it with `answers`")
    gathered = statistics()

    def visit(attention: Attention, output: Tensor) -> None:
        for rows in attention.rows():
            for statistic in gathered:
                statistic.update(attention.layer, rows, batch.segments)

    with visiting(vlm, visit):
        forward(vlm, batch)
    found = {name: tensor.cpu() for statistic in gathered for name, tensor in statistic.result(batch.segments).items()}
    visual = batch.segments.visual.cpu()
    maps = {name: tuple(keys[:, :, here].numpy() for keys, here in zip(found[name], visual, strict=True)) for name in MAPS}
    return Observed(maps, {name: tensor.numpy() for name, tensor in found.items() if name not in MAPS}, batch.segments.grids)


def forward(vlm: VLM, batch: Batch, logits_to_keep: int = 1, **options: object) -> Any:
    """One pass without gradients or cache; the logits of the last `logits_to_keep` positions (0 = all)."""
    run: Any = vlm.model
    with torch.no_grad():
        return run(**batch.inputs, use_cache=False, logits_to_keep=logits_to_keep, **options)
