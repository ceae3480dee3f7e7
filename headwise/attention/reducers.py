"""Statistics of attention, gathered row block by row block, for every example, layer and head.

Notation: A[i, j] attention of query i to key j; R the answer's rows; I the visual tokens; T the text tokens, question and answer;
S the system tokens, before the image; an average over no rows or tokens is 0.
"""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwise.attention.seam import Rows
from headwise.segments import Segments


@runtime_checkable
class Statistic(Protocol):
    """A statistic that is updated with the row blocks of one batch, layer by layer."""

    def update(self, layer: int, rows: Rows, segments: Segments) -> None:
        """Take in a block of query rows."""
        ...

    def result(self, segments: Segments) -> dict[str, Float[Tensor, "batch layer head *key"]]:
        """The named statistics of the batch's examples."""
        ...


@dataclass
class RowMeans:
    """Means over rows of the attention to each key, from which all that is linear in A follows.

    map = mean_R A[i, I] (mean_T for text_image_map); visual_mass, text_mass, system_mass = mean_R of the attention that falls on the
    segment (they sum to 1); initial_mass = mean_R A[i, first]; text_to_image = sum_{i in T, j in I} A[i, j] / |T||I| (RAH-LoRA eq. 3).
    image_to_text = sum_{i in I, j in S or T} A[i, j] / |S or T||I|: the paper has T alone, which an image before the question cannot see
    in a causal decoder, so that it would be 0; that S counts is our choice. Maps hold every key; those outside I are 0.
    """

    sums: dict[int, Float[Tensor, "batch head 3 key"]] = field(default_factory=dict)

    def update(self, layer: int, rows: Rows, segments: Segments) -> None:
        """Add a block's share of the means over R, T and I."""
        weights = torch.stack([_mean_weights(kind) for kind in (segments.answer, segments.text, segments.visual)], dim=1)
        stop = rows.start + rows.probabilities.shape[2]
        block = weights[:, None, :, rows.start : stop] @ rows.probabilities
        _add(self.sums, layer, block)

    def result(self, segments: Segments) -> dict[str, Float[Tensor, "batch layer head *key"]]:
        """Maps over keys, and the scalar statistics."""
        answer, text, visual = _by_layer(self.sums).unbind(dim=3)
        first = torch.nn.functional.one_hot(segments.first, answer.shape[-1])
        return {
            "map": answer * _keys(segments.visual),
            "text_image_map": text * _keys(segments.visual),
            "visual_mass": (answer * _keys(segments.visual)).sum(-1),
            "text_mass": (answer * _keys(segments.text)).sum(-1),
            "system_mass": (answer * _keys(segments.system)).sum(-1),
            "initial_mass": (answer * _keys(first)).sum(-1),
            "text_to_image": (text * _keys(_mean_weights(segments.visual))).sum(-1),
            "image_to_text": (visual * _keys(_mean_weights(segments.system | segments.text))).sum(-1),
        }


@dataclass
class MaxVisual:
    """max_visual = mean_R max_{j in I} A[i, j] (SADS)."""

    sums: dict[int, Float[Tensor, "batch head"]] = field(default_factory=dict)

    def update(self, layer: int, rows: Rows, segments: Segments) -> None:
        """Add the answer rows of a block."""
        highest = (rows.probabilities * segments.visual[:, None, None]).amax(dim=-1)
        weights = _mean_weights(segments.answer)[:, rows.start : rows.start + highest.shape[2]]
        block = (highest * weights[:, None]).sum(-1)
        _add(self.sums, layer, block)

    def result(self, segments: Segments) -> dict[str, Float[Tensor, "batch layer head *key"]]:
        """In [0, 1]."""
        return {"max_visual": _by_layer(self.sums)}


@dataclass
class NonvisualEntropy:
    """nonvisual_entropy = -sum_j p_j log p_j with p = mean_R of A[i, not I] / sum A[i, not I], in nats (SADS)."""

    sums: dict[int, Float[Tensor, "batch head key"]] = field(default_factory=dict)

    def update(self, layer: int, rows: Rows, segments: Segments) -> None:
        """Add the answer rows of a block, each renormalised over the keys that are not visual."""
        kept = rows.probabilities * ~segments.visual[:, None, None]
        mass = kept.sum(-1).clamp_min(torch.finfo(kept.dtype).tiny)  # a row that falls wholly on the image has no share elsewhere
        weights = _mean_weights(segments.answer)[:, None, rows.start : rows.start + kept.shape[2]] / mass
        block = (weights[:, :, None] @ kept).squeeze(2)
        _add(self.sums, layer, block)

    def result(self, segments: Segments) -> dict[str, Float[Tensor, "batch layer head *key"]]:
        """In [0, log of the number of keys]."""
        p = _by_layer(self.sums)
        return {"nonvisual_entropy": -torch.xlogy(p, p).sum(-1)}


@dataclass
class KeyVariance:
    """key_variance = mean over width of the variance of a KV head's keys over the positions of all segments, after rotation (SADS).

    The query heads of a group share their KV head's value.
    """

    values: dict[int, Float[Tensor, "batch head"]] = field(default_factory=dict)

    def update(self, layer: int, rows: Rows, segments: Segments) -> None:
        """Take a layer's keys once, with its first block."""
        if rows.start > 0:
            return
        weights = _mean_weights(segments.real)[:, None, :, None]
        mean = (rows.keys * weights).sum(2, keepdim=True)
        variance = ((rows.keys - mean) ** 2 * weights).sum(2).mean(-1)
        self.values[layer] = variance.repeat_interleave(rows.probabilities.shape[1] // rows.keys.shape[1], dim=1)

    def result(self, segments: Segments) -> dict[str, Float[Tensor, "batch layer head *key"]]:
        """In squared units of the keys."""
        return {"key_variance": _by_layer(self.values)}


def statistics() -> tuple[Statistic, ...]:
    """A fresh set of all statistics, for one batch."""
    return RowMeans(), MaxVisual(), NonvisualEntropy(), KeyVariance()


def _mean_weights(mask: Bool[Tensor, "batch token"]) -> Float[Tensor, "batch token"]:
    """Weights that sum to 1 over the marked tokens; all 0 where none is marked."""
    return mask / mask.sum(1, keepdim=True).clamp_min(1)


def _keys(weights: Tensor) -> Float[Tensor, "batch 1 1 key"]:
    return weights[:, None, None].float()


def _add(sums: dict[int, Tensor], layer: int, block: Tensor) -> None:
    sums[layer] = sums[layer] + block if layer in sums else block


def _by_layer(values: dict[int, Tensor]) -> Float[Tensor, "batch layer head *key"]:
    return torch.stack([values[layer] for layer in sorted(values)], dim=1)
