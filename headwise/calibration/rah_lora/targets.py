"""Which heads RAH-LoRA calibrates, and from which others they may learn."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from headwise.calibration.rah_lora.settings import RahLora

Head = tuple[int, int]
"""Layer and head, 0-based."""
NEIGHBOURS = (0, 1, 2)
"""Anchors are sought in the target's own layer, else in those next to it, else in those next to these."""


@dataclass(frozen=True)
class HeadScores:
    """I-SAL (z-scores within the layer) and the causal flow that has to be high; None: it does not matter."""

    isal: Float[np.ndarray, "layer head"]
    caf: Float[np.ndarray, "layer head"] | None


def layer_range(settings: RahLora, num_layers: int) -> range:
    """The layers to calibrate. Raises ValueError if there are none."""
    start, end = (round(share * num_layers) for share in settings.layers)
    if not start < end:
        raise ValueError(f"layers = {settings.layers}: from {start} up to {end} of {num_layers} layers there is none")
    return range(start, end)


def choose_targets(scores: HeadScores, settings: RahLora) -> list[Head]:
    """The heads below the `p_isal` percentile of their layer's I-SAL and above the `p_caf` percentile of its causal flow, sorted.

    Percentiles are interpolated linearly and the comparisons strict, so that heads that are all alike are no targets. Controls: `high`
    takes those above the 100 - `p_isal` percentile, `random` as many of each layer as `low` takes, drawn by the seed.
    """
    layers = layer_range(settings, len(scores.isal))
    low = [head for layer in layers for head in _low_or_high(scores, settings, layer)]
    if settings.targets != "random":
        return low
    generator = np.random.default_rng(settings.seed)
    numbers = {layer: sum(own == layer for own, _ in low) for layer in layers}
    drawn = {layer: generator.choice(scores.isal.shape[1], size=number, replace=False) for layer, number in numbers.items()}
    return sorted((layer, int(head)) for layer, heads in drawn.items() for head in heads)


def _low_or_high(scores: HeadScores, settings: RahLora, layer: int) -> list[Head]:
    isal = scores.isal[layer]
    if settings.targets == "high":
        chosen = isal > np.percentile(isal, 100 - settings.p_isal)
    else:
        chosen = isal < np.percentile(isal, settings.p_isal)
    if scores.caf is not None:
        chosen &= scores.caf[layer] > np.percentile(scores.caf[layer], settings.p_caf)
    return [(layer, int(head)) for head in np.flatnonzero(chosen)]


def anchors_for(layer: int, isal: Float[np.ndarray, "layer head"], targets: Sequence[Head], beta: float) -> list[Head]:
    """Heads with an I-SAL above beta that are no targets: of the layer, else of the layers next to it, else of those two away; or none."""
    is_anchor = _anchors(isal, targets, beta)
    for distance in NEIGHBOURS:
        near = sorted({layer - distance, layer + distance} & set(range(len(isal))))
        if found := [(own, int(head)) for own in near for head in np.flatnonzero(is_anchor[own])]:
            return found
    return []


def _anchors(isal: Float[np.ndarray, "layer head"], targets: Sequence[Head], beta: float) -> Bool[np.ndarray, "layer head"]:
    is_anchor = isal > beta
    for target in targets:
        is_anchor[target] = False
    return is_anchor
