"""Statistics of a layer's attention for every example and head, from the few entries that they need.

Notation: A[i, j] attention of query i to key j; R the answer's rows; I the visual tokens; T the text tokens, question and answer;
S the system tokens, before the image; an average over no rows or tokens is 0.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.attention.seam import BLOCK_BYTES, Attention, Places
from headwise.segments import Segments


@dataclass(frozen=True)
class Reading:
    """Which rows and keys of a batch are read; made once, used in every layer."""

    segments: Segments
    answer: Places
    question: Places
    visual: Places
    system: Places
    others: Places

    @classmethod
    def of(cls, segments: Segments) -> "Reading":
        """The places of each segment."""
        found = (segments.answer, segments.question, segments.visual, segments.system, segments.system | segments.text)
        return cls(segments, *map(Places.of, found))


def statistics(attention: Attention, reading: Reading) -> dict[str, Float[Tensor, "batch head *key"]]:
    """All statistics of one layer, in fp32; maps hold every visual token of an example, then zeros.

    map = mean_R A[i, I] (mean_T for text_image_map); visual_mass, text_mass, system_mass = mean_R of the attention that falls on the
    segment (they sum to 1); initial_mass = mean_R A[i, first]; max_visual = mean_R max_{j in I} A[i, j] (SADS);
    nonvisual_entropy = -sum_j p_j log p_j with p = mean_R of A[i, not I] / sum A[i, not I], in nats (SADS);
    text_to_image = sum_{i in T, j in I} A[i, j] / |T||I| (RAH-LoRA eq. 3).
    image_to_text = sum_{i in I, j in S or T} A[i, j] / |S or T||I|: the paper has T alone, which an image before the question cannot see
    in a causal decoder, so that it would be 0; that S counts is our choice.
    key_variance = mean over width of the variance of a KV head's keys over the positions of all segments, after rotation (SADS); the
    query heads of a group share their KV head's value.
    """
    segments, H = reading.segments, attention.query.shape[1]
    answer = attention.probabilities(reading.answer)
    means, highest, entropy = _answer_rows(answer, segments)
    visual = reading.visual.index[:, None].expand(-1, H, -1)
    real = reading.visual.real[:, None]
    number_text, number_visual = segments.text.sum(1)[:, None], segments.visual.sum(1)[:, None].clamp_min(1)
    seen = means.gather(2, visual) * real
    text = _column_sums(attention, reading.question, reading.visual) + seen * segments.answer.sum(1)[:, None, None]
    text = text / number_text.clamp_min(1)[..., None]
    looked_back = _column_sums(attention, reading.visual, _behind(attention, reading)).sum(-1)
    return {
        "map": seen,
        "text_image_map": text,
        "visual_mass": (means * segments.visual[:, None]).sum(-1),
        "text_mass": (means * segments.text[:, None]).sum(-1),
        "system_mass": (means * segments.system[:, None]).sum(-1),
        "initial_mass": means.gather(2, segments.first[:, None, None].expand(-1, H, 1))[..., 0],
        "max_visual": highest,
        "nonvisual_entropy": entropy,
        "text_to_image": text.sum(-1) / number_visual,
        "image_to_text": looked_back / (number_visual * (segments.system | segments.text).sum(1)[:, None].clamp_min(1)),
        "key_variance": _key_variance(attention, segments),
    }


def _answer_rows(
    rows: Float[Tensor, "batch head row key"], segments: Segments
) -> tuple[Float[Tensor, "batch head key"], Float[Tensor, "batch head"], Float[Tensor, "batch head"]]:
    """Mean over the rows, mean of the rows' highest attention to the image, entropy elsewhere; filled-up rows are 0."""
    number = segments.answer.sum(1).clamp_min(1)[:, None, None]
    highest = (rows * segments.visual[:, None, None]).amax(dim=-1).sum(-1) / number[..., 0]
    elsewhere = (~segments.visual).float()[:, None, :, None]
    share = (rows @ elsewhere).squeeze(-1)
    weights = torch.stack([torch.ones_like(share), 1 / share.clamp_min(torch.finfo(share.dtype).tiny)], dim=2)
    mean, p = ((weights @ rows) / number[..., None]).unbind(2)
    p = p * ~segments.visual[:, None]
    return mean, highest, -torch.xlogy(p, p).sum(-1)


def _behind(attention: Attention, reading: Reading) -> Places:
    """The keys outside the image that an image token may attend to: those before it, in a prefix mask those after it too."""
    return reading.system if attention.causal and attention.mask is None else reading.others


def _column_sums(attention: Attention, rows: Places, keys: Places) -> Float[Tensor, "batch head key"]:
    """sum_i A[i, j] over the rows, block by block."""
    B, H = attention.query.shape[:2]
    total = attention.query.new_zeros(B, H, keys.index.shape[1], dtype=torch.float32)
    for block in rows.blocks(max(1, BLOCK_BYTES // (4 * B * H * max(1, keys.index.shape[1])))):
        total += attention.probabilities(block, keys).sum(2)
    return total


def _key_variance(attention: Attention, segments: Segments) -> Float[Tensor, "batch head"]:
    weights = segments.real / segments.real.sum(1, keepdim=True).clamp_min(1)
    keys, weights = attention.key.float(), weights[:, None, :, None]
    mean = (keys * weights).sum(2, keepdim=True)
    variance = ((keys - mean) ** 2 * weights).sum(2).mean(-1)
    return variance.repeat_interleave(attention.query.shape[1] // keys.shape[1], dim=1)
