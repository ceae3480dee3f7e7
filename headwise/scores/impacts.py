"""Head Impact of every head and example, in two passes over the stored maps: one finds the sink tokens, the other scores."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Float64

from headwise.attention.schema import SCALARS
from headwise.layout import Layout
from headwise.scores.head_impact import Cut, HeadImpact, binarise, iou
from headwise.scores.sink_tokens import sink_tokens
from headwise.scores.stored import Heads, StoredExample, stored_examples
from headwise.scores.token_masks import Target

BLOCK_EXAMPLES = 128
"""Examples whose scores are held at once."""

THRESHOLDS: dict[str, Cut] = {
    "mean": ("mean", 0.0),
    "mean + 1 std": ("mean_plus_std", 1.0),
    "median": ("quantile", 0.5),
    "quantile 0.9": ("quantile", 0.9),
}
"""The thresholds over which the ranking of the layers should be stable."""


@dataclass(frozen=True)
class Survey:
    """What the first pass finds: each example's layout, the mean attention on each, and each head's mean of the `SCALARS` columns.

    A layout is None without an image, and then, as where the visual tokens have no place, has no mean map.
    """

    layouts: dict[str, Layout | None]
    mean_maps: dict[Layout, Float64[np.ndarray, "visual"]]
    means: Float64[np.ndarray, "row statistic"]

    @property
    def placeless(self) -> bool:
        """Whether the model's visual tokens lie nowhere in the image, so that no mask can be laid on them."""
        return not self.mean_maps and () in self.layouts.values()


@dataclass(frozen=True)
class Impacts:
    """What the second pass finds of a block of examples, rows in the order of (layer, head); NaN in all of an example's rows if undefined.

    by_threshold: each layer's HI under every threshold of `THRESHOLDS`, mean over heads, summed over the block's examples.
    """

    example_ids: list[str]
    images: list[str]
    head_impact: Float32[np.ndarray, "example row"]
    chance: Float32[np.ndarray, "example row"]
    nosink: Float32[np.ndarray, "example row"]
    by_threshold: Float64[np.ndarray, "threshold layer"]


def survey(parts: Sequence[Path], heads: Heads) -> Survey:
    """Read every map once, each times its maximum: a head that hardly looks at the image says little about where sinks are.

    Examples come in the order of their ids, so that the sums do not depend on how they were shared out.
    """
    layouts: dict[str, Layout | None] = {}
    sums: dict[Layout, np.ndarray] = {}
    same: dict[Layout | None, Layout | None] = {}  # of equal layouts one stays in memory
    means = np.zeros((heads.rows, len(SCALARS)))
    for example in stored_examples(parts, heads):
        assert example.highest is not None
        assert example.scalars is not None
        layout = layouts[example.example_id] = same.setdefault(example.layout, example.layout)
        if layout:
            sums[layout] = sums.get(layout, 0.0) + example.highest.astype(np.float64) @ example.maps
        means += example.scalars
    counts = Counter(layouts.values())
    return Survey(layouts, {layout: total / (heads.rows * counts[layout]) for layout, total in sums.items()}, means / len(layouts))


def head_impacts(
    parts: Sequence[Path], heads: Heads, found: Survey, targets: Mapping[str, Target], settings: HeadImpact
) -> Iterator[Impacts]:
    """Score every example that has a target, block by block in the order of ids.

    HI = IoU([map > threshold], mask). Chance = mean IoU of the same map with `other_masks`. No-sink = HI with the sink tokens taken out of
    map and mask before the threshold.
    """
    others = other_masks(targets, found.layouts, settings)
    kept = {layout: ~sink_tokens(mean_map, layout, settings.sink_fence) for layout, mean_map in found.mean_maps.items()}
    scored = (
        _score(example, heads, targets[example.example_id], others[layout], kept[layout], settings)
        for example in stored_examples(parts, heads, maps_only=True)
        if example.example_id in targets and (layout := found.layouts[example.example_id])
    )
    while block := list(islice(scored, BLOCK_EXAMPLES)):
        head_impact, chance, nosink = np.stack([scores for _, scores, _ in block], axis=1)
        by_threshold = np.sum([layers for _, _, layers in block], axis=0)
        ids = [example_id for example_id, _, _ in block]
        yield Impacts(ids, [targets[i].image for i in ids], head_impact, chance, nosink, by_threshold)


@dataclass(frozen=True)
class OtherMasks:
    """The token masks that give the chance level of a layout, of an image each."""

    images: list[str]
    masks: Bool[np.ndarray, "mask visual"]


def other_masks(targets: Mapping[str, Target], layouts: Mapping[str, Layout | None], settings: HeadImpact) -> dict[Layout, OtherMasks]:
    """Per layout, one mask each of `chance_masks` + 1 images, or of all if there are fewer; a map is compared with those of other images.

    The choice of the images, and of one question about each, is seeded; the cost stays linear in the examples.
    """
    ids_on: defaultdict[Layout, list[str]] = defaultdict(list)
    for example_id in sorted(targets):
        if layout := layouts[example_id]:
            ids_on[layout].append(example_id)
    rng = np.random.default_rng(settings.seed)
    chosen: dict[Layout, OtherMasks] = {}
    for layout in sorted(ids_on):
        ids = ids_on[layout]
        picked: dict[str, np.ndarray] = {}
        for i in rng.permutation(len(ids)).tolist():
            target = targets[ids[i]]
            if len(picked) <= settings.chance_masks:
                picked.setdefault(target.image, target.tokens)
        chosen[layout] = OtherMasks(list(picked), np.stack(list(picked.values())))
    return chosen


def _score(
    example: StoredExample, heads: Heads, target: Target, others: OtherMasks, kept: Bool[np.ndarray, "visual"], settings: HeadImpact
) -> tuple[str, Float32[np.ndarray, "3 row"], Float64[np.ndarray, "threshold layer"]]:
    """The example's id, its HI, chance and no-sink HI, and its layers' HI under every threshold."""
    binary = binarise(example.maps, [settings.cut, *THRESHOLDS.values()])
    overlap = iou(binary, target.tokens[None])[..., 0]
    scores = np.full((3, heads.rows), np.nan, dtype=np.float32)
    scores[0] = overlap[0]
    scores[1] = _chance(binary[0], target.image, others)
    if target.tokens[kept].any():
        scores[2] = iou(binarise(example.maps[:, kept], [settings.cut])[0], target.tokens[None, kept])[:, 0]
    by_threshold = overlap[1:].reshape(-1, heads.num_layers, heads.num_heads).mean(axis=2, dtype=np.float64)
    return example.example_id, scores, by_threshold


def _chance(binary: Bool[np.ndarray, "row visual"], image: str, others: OtherMasks) -> Float32[np.ndarray, "row"] | float:
    overlap = iou(binary, others.masks)
    if image in others.images:
        overlap = np.delete(overlap, others.images.index(image), axis=1)
    return overlap.mean(axis=1) if overlap.shape[1] else np.nan
