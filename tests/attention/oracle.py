"""Every statistic of one example and head the slow, obvious way, in float64, from a whole matrix of attention."""

import numpy as np
import torch
from torch.nn.functional import pad

from headwise.attention.observe import forward, with_answers
from headwise.attention.seam import set_implementation
from headwise.segments import Segments
from headwise.vlm import VLM, Batch, encode
from headwise.vlm.encoding import TOKEN_TYPES
from tests.tiny import image

QUESTIONS = ["What colour is it?", "How many green squares are in the picture?", "Where?"]
ANSWERS = ["red", "There are three squares, all of them green.", "on the left"]


def probe(vlm: VLM, side: str) -> Batch:
    """Three examples of unlike length, one of them without an image."""
    images = [image(0), image(1, (40, 200)), None] if vlm.visual_id is not None else [None] * 3
    return encode(vlm, images, QUESTIONS, ANSWERS, padding_side=side)


def eager_attentions(vlm: VLM, batch: Batch) -> np.ndarray:
    """The model's own `output_attentions`: [batch, layer, head, query, key]."""
    before = vlm.text_config._attn_implementation
    assert before is not None
    set_implementation(vlm, "eager")
    try:
        attentions = forward(vlm, batch, output_attentions=True).attentions
    finally:
        set_implementation(vlm, before)
    return torch.stack(attentions, dim=1).double().numpy()


def cached_keys(vlm: VLM, batch: Batch) -> np.ndarray:
    """The keys that the model itself caches, after their rotation: [batch, layer, kv_head, key, width]."""
    with torch.no_grad():
        cache = vlm.model(**batch.inputs, use_cache=True).past_key_values
    return torch.stack([layer.keys for layer in cache.layers], dim=1).double().numpy()


def positions(mask: torch.Tensor, example: int) -> list[int]:
    return [int(i) for i in mask[example].nonzero()]


def mean(values: np.ndarray, axis: int) -> np.ndarray:
    """The mean, 0 over nothing."""
    return values.mean(axis=axis) if values.shape[axis] else np.zeros(values.sum(axis=axis).shape)


def head_statistics(A: np.ndarray, segments: Segments, example: int) -> dict[str, np.ndarray]:
    """All statistics of one example's attention [..., query, key], written as the formulas are, for whatever heads come before."""
    R, V = positions(segments.answer, example), positions(segments.visual, example)
    system, question = positions(segments.system, example), positions(segments.question, example)
    T = question + R
    others = system + T
    rows, elsewhere = A[..., R, :], A[..., R, :][..., others]
    p = mean(elsewhere / elsewhere.sum(-1, keepdims=True), -2)
    logs = np.log(np.where(p > 0, p, 1))
    seen = rows[..., V]
    back = A[..., V, :][..., others]
    return {
        "map": mean(seen, -2),
        "text_image_map": mean(A[..., T, :][..., V], -2),
        "map_binarised": mean((seen > mean(seen, -1)[..., None]).astype(float), -2),
        "visual_mass": mean(seen.sum(-1), -1),
        "text_mass": mean(rows[..., question + R].sum(-1), -1),
        "system_mass": mean(rows[..., system].sum(-1), -1),
        "initial_mass": mean(rows[..., min(others + V)], -1),
        "max_visual": mean(seen.max(-1, initial=0), -1),
        "nonvisual_entropy": -(p * logs).sum(-1),
        "text_to_image": mean(mean(A[..., T, :][..., V], -2), -1),
        "image_to_text": mean(mean(back, -2), -1),
    }


def key_variance(keys: np.ndarray, segments: Segments, example: int) -> np.ndarray:
    """Variance over positions of each coordinate of the heads' keys [..., key, width], then the mean over coordinates."""
    return keys[..., positions(segments.real, example), :].var(axis=-2).mean(axis=-1)


def followed_by(vlm: VLM, prompts: Batch, new: torch.Tensor, answered: torch.Tensor) -> Batch:
    """The prompts with these very tokens as their answers."""
    fill = {"attention_mask": 1} | dict.fromkeys(TOKEN_TYPES, vlm.family.answer_type)
    longer = {n: pad(prompts.inputs[n], (0, new.shape[1]), value=value) for n, value in fill.items() if n in prompts.inputs}
    longer["input_ids"] = torch.cat([prompts.inputs["input_ids"], new], dim=1)
    return Batch(prompts.inputs | longer, with_answers(prompts.segments, answered))
