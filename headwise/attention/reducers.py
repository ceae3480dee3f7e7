"""Statistics of a layer's attention for every example and head, from the few entries that they need.

Notation: A[i, j] attention of query i to key j; R the answer's rows; I the visual tokens; T the text tokens, question and answer;
S the system tokens, before the image; an average over no rows or tokens is 0.
"""

from collections.abc import Set
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from headwise.attention.layer import Attention, Places
from headwise.segments import Segments

LOOKING_BACK = "image_to_text"
FROM_TEXT = frozenset({"text_image_map", "text_to_image"})


@dataclass(frozen=True)
class Reading:
    """Which rows and keys of a batch are read, and for which statistics; made once, used in every layer."""

    segments: Segments
    wanted: Set[str]
    answer: Places
    question: Places
    visual: Places
    system: Places
    text: Places
    span: slice
    has_holes: bool

    @classmethod
    def of(cls, segments: Segments, wanted: Set[str]) -> "Reading":
        """The places of each segment. span: from the first visual token of any example to the last one; has_holes: not all of it is
        visual in every example.
        """
        answer, question, visual, system, text = map(
            Places.of, (segments.answer, segments.question, segments.visual, segments.system, segments.text)
        )
        columns = segments.visual.any(0).nonzero()
        span = slice(int(columns.min()), int(columns.max()) + 1) if len(columns) else slice(0, 0)
        has_holes = not bool(segments.visual[:, span].all())
        return cls(segments, wanted, answer, question, visual, system, text, span, has_holes)


@dataclass
class Sums:
    """What a layer's rows add up to. Rows may come in any number of calls: all at once, or one a step while an answer is generated.

    keys: sum_R A[i, j]; elsewhere: sum_R A[i, j] / sum_{j not in I} A[i, j]; highest: sum_R max_{j in I} A[i, j]; binarised: sum_R
    [A[i, j] > mean_{j in I} A[i, j]]; question: sum of A[i, j] over the question's rows; looked_back: sum_{i in I, j in S or T} A[i, j].
    """

    keys: Float[Tensor, "batch head key"]
    elsewhere: Float[Tensor, "batch head key"]
    highest: Float[Tensor, "batch head"]
    binarised: Float[Tensor, "batch head span"]
    question: Float[Tensor, "batch head visual"]
    looked_back: Float[Tensor, "batch head"]

    @classmethod
    def of(cls, attention: Attention, reading: Reading, num_keys: int) -> "Sums":
        """No rows yet."""
        shape, visual = attention.query.shape[:2], reading.visual.index.shape[1]
        sizes = (num_keys, num_keys, None, reading.span.stop - reading.span.start, visual, None)
        zeros = attention.query.new_zeros
        return cls(*(zeros(*shape, *([] if size is None else [size]), dtype=torch.float32) for size in sizes))

    def cut(self, num_keys: int) -> "Sums":
        """The same over the first keys; the others were never attended to."""
        return replace(self, keys=self.keys[..., :num_keys], elsewhere=self.elsewhere[..., :num_keys])

    def add_prompt(self, attention: Attention, reading: Reading) -> None:
        """The rows of the question and of the image."""
        if reading.wanted & FROM_TEXT:
            self.question += attention.column_sums(reading.question, reading.visual)
        if LOOKING_BACK in reading.wanted:
            for behind in (reading.system, reading.text):
                sums = attention.column_sums(reading.visual, behind)
                self.looked_back += sums.sum(-1)

    def add_answer(self, attention: Attention, reading: Reading, rows: Places) -> None:
        """Rows of the answer, over all keys that they may attend to."""
        if attention.is_for_fused(rows, attention.key.shape[2]) and "map_binarised" not in reading.wanted:
            self._add_fused(attention, reading, rows)
        else:
            self._add_blocks(attention, reading, rows)

    def _add_fused(self, attention: Attention, reading: Reading, rows: Places) -> None:
        from headwise.attention.fused import row_sums  # compiled when first imported

        K = attention.key.shape[2]
        for example, visual in enumerate(pad(reading.segments.visual, (0, K - reading.segments.visual.shape[1]))):
            keys, elsewhere, highest = row_sums(attention.part(example, rows), visual)
            self.keys[example, :, :K] += keys
            self.elsewhere[example, :, :K] += elsewhere
            self.highest[example] += highest

    def _add_blocks(self, attention: Attention, reading: Reading, rows: Places) -> None:
        visual = reading.segments.visual[:, reading.span]
        entries = attention.entries(rows)
        for block in entries.blocks(whole_rows=True):
            A, shown = entries.probabilities(block), visual[block.examples, None, None]
            seen, keys = A[..., reading.span], A.shape[3]
            share = A[..., : reading.span.start].sum(-1) + A[..., reading.span.stop :].sum(-1)
            if reading.has_holes:
                share += (seen * ~shown).sum(-1)
                seen = seen * shown
            weights = torch.stack([torch.ones_like(share), 1 / share.clamp_min(torch.finfo(share.dtype).tiny)], dim=2)
            sums = weights @ A
            self.keys[block.examples, block.heads, :keys] += sums[:, :, 0]
            self.elsewhere[block.examples, block.heads, :keys] += sums[:, :, 1]
            if shown.shape[-1]:
                self.highest[block.examples, block.heads] += seen.amax(-1).sum(-1)
                if "map_binarised" in reading.wanted:
                    mean = seen.sum(-1, keepdim=True) / shown.sum(-1, keepdim=True).clamp_min(1)
                    above = (seen > mean) & shown & rows.real[block.examples, None, block.rows, None]
                    self.binarised[block.examples, block.heads] += above.sum(2)


def statistics(sums: Sums, attention: Attention, reading: Reading) -> dict[str, Float[Tensor, "batch head *key"]]:
    """The wanted statistics of one layer, in fp32; maps hold every visual token of an example, then zeros.

    map = mean_R A[i, I] (mean_T for text_image_map); map_binarised = mean_R [A[i, I] > mean_{j in I} A[i, j]]; visual_mass, text_mass,
    system_mass = mean_R of the attention that falls on the segment (they sum to 1); initial_mass = mean_R A[i, first]; max_visual =
    mean_R max_{j in I} A[i, j] (SADS); nonvisual_entropy = -sum_j p_j log p_j with p = mean_R of A[i, not I] / sum A[i, not I], in nats
    (SADS); text_to_image = sum_{i in T, j in I} A[i, j] / |T||I| (RAH-LoRA eq. 3).
    image_to_text = sum_{i in I, j in S or T} A[i, j] / |S or T||I|: the paper has T alone, which an image before the question cannot see
    in a causal decoder, so that it would be 0; that S counts is our choice.
    key_variance = mean over width of the variance of a KV head's keys over the positions of all segments, after rotation (SADS); the
    query heads of a group share their KV head's value.

    reading: of the batch with its answers, with as many tokens as `sums` has keys.
    """
    segments, H = reading.segments, attention.query.shape[1]
    rows, text, visual = (part.sum(1)[:, None].clamp_min(1) for part in (segments.answer, segments.text, segments.visual))
    mean = sums.keys / rows[..., None]
    p = (sums.elsewhere / rows[..., None]).masked_fill(segments.visual[:, None], 0)  # there it may be infinite
    at, real = reading.visual.index[:, None].expand(-1, H, -1), reading.visual.real[:, None]
    seen = mean.gather(2, at) * real
    text_image = (sums.question + seen * segments.answer.sum(1)[:, None, None]) / text[..., None]
    behind = (segments.system | segments.text).sum(1)[:, None].clamp_min(1)
    found = {
        "map": seen,
        "text_image_map": text_image,
        "map_binarised": sums.binarised.gather(2, (at - reading.span.start).clamp_min(0)) * real / rows[..., None],
        "visual_mass": _mass(mean, segments.visual),
        "text_mass": _mass(mean, segments.text),
        "system_mass": _mass(mean, segments.system),
        "initial_mass": mean.gather(2, segments.first[:, None, None].expand(-1, H, 1))[..., 0],
        "max_visual": sums.highest / rows,
        "nonvisual_entropy": -torch.xlogy(p, p).sum(-1),
        "text_to_image": text_image.sum(-1) / visual,
        LOOKING_BACK: sums.looked_back / (visual * behind),
    }
    if "key_variance" in reading.wanted:
        found["key_variance"] = _key_variance(attention, segments)
    return {name: value for name, value in found.items() if name in reading.wanted}


def _mass(mean: Float[Tensor, "batch head key"], segment: Bool[Tensor, "batch key"]) -> Float[Tensor, "batch head"]:
    return (mean * segment[:, None]).sum(-1)


def _key_variance(attention: Attention, segments: Segments) -> Float[Tensor, "batch head"]:
    weights = segments.real / segments.real.sum(1, keepdim=True).clamp_min(1)
    keys, weights = attention.key.float(), weights[:, None, :, None]
    mean = (keys * weights).sum(2, keepdim=True)
    variance = ((keys - mean) ** 2 * weights).sum(2).mean(-1)
    return variance.repeat_interleave(attention.query.shape[1] // keys.shape[1], dim=1)
