"""Every statistic of one example and head the slow, obvious way, in float64, from a whole matrix of attention."""

import numpy as np
import torch

from headwise.attention.observe import forward
from headwise.attention.seam import set_implementation
from headwise.segments import Segments
from headwise.vlm import VLM, Batch, encode
from tests.tiny import image

QUESTIONS = ["What colour is it?", "How many green squares are in the picture?", "Where?"]
ANSWERS = ["red", "There are three squares, all of them green.", "on the left"]


def probe(vlm: VLM, side: str) -> Batch:
    """Three examples of unlike length, one of them without an image."""
    images = [image(0), image(1, (40, 200)), None] if vlm.visual_id is not None else [None] * 3
    return encode(vlm, images, QUESTIONS, ANSWERS, padding_side=side)


def eager_attentions(vlm: VLM, batch: Batch) -> np.ndarray:
    """The model's own `output_attentions`: [batch, layer, head, query, key]."""
    set_implementation(vlm, "eager")
    try:
        attentions = forward(vlm, batch, output_attentions=True).attentions
    finally:
        set_implementation(vlm, "sdpa")
    return torch.stack(attentions, dim=1).double().numpy()


def cached_keys(vlm: VLM, batch: Batch) -> np.ndarray:
    """The keys that the model itself caches, after their rotation: [batch, layer, kv_head, key, width]."""
    with torch.no_grad():
        cache = vlm.model(**batch.inputs, use_cache=True).past_key_values
    return torch.stack([layer.keys for layer in cache.layers], dim=1).double().numpy()


def positions(mask: torch.Tensor, example: int) -> list[int]:
    return [int(i) for i in mask[example].nonzero()]


def mean(values: list[float]) -> float:
    return float(np.sum(values)) / len(values) if values else 0.0


def head_statistics(A: np.ndarray, segments: Segments, example: int) -> dict[str, np.ndarray | float]:
    """All statistics of the attention matrix A of one head, written as the formulas are."""
    R, V = positions(segments.answer, example), positions(segments.visual, example)
    system, question = positions(segments.system, example), positions(segments.question, example)
    T = question + R
    others = system + T
    renormalised = [A[i, others] / A[i, others].sum() for i in R]
    p = [mean([row[column] for row in renormalised]) for column in range(len(others))]
    return {
        "map": np.array([mean([A[i, j] for i in R]) for j in V]),
        "text_image_map": np.array([mean([A[i, j] for i in T]) for j in V]),
        "map_binarised": np.array([mean([float(A[i, j] > np.mean(A[i, V])) for i in R]) for j in V]),
        "visual_mass": mean([sum(A[i, j] for j in V) for i in R]),
        "text_mass": mean([sum(A[i, j] for j in question + R) for i in R]),
        "system_mass": mean([sum(A[i, j] for j in system) for i in R]),
        "initial_mass": mean([A[i, min(others + V)] for i in R]),
        "max_visual": mean([max([A[i, j] for j in V], default=0.0) for i in R]),
        "nonvisual_entropy": -sum(x * np.log(x) for x in p if x > 0),
        "text_to_image": mean([A[i, j] for i in T for j in V]),
        "image_to_text": mean([A[i, j] for i in V for j in others]),
    }


def key_variance(keys: np.ndarray, segments: Segments, example: int) -> float:
    """Variance over positions of each coordinate of one head's keys, then the mean over coordinates."""
    rows = keys[positions(segments.real, example)]
    return float(np.mean([np.var(rows[:, d]) for d in range(rows.shape[1])]))
