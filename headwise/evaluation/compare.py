"""Two models on the same examples: is the second one better, and could this sample have told?"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import polars as pl
from scipy.stats import binomtest

from headwise.evaluation.chair import CHAIR
from headwise.evaluation.paired import (
    PairedSums,
    bootstrap_interval,
    cluster_sums,
    detectable_effect,
    holm,
    margin_p_values,
    mcnemar,
    ratio_sums,
    sign_flip,
)
from headwise.evaluation.perplexity import corpus_perplexity
from headwise.evaluation.statistics import Statistics
from headwise.examples import CAPTION
from headwise.intervals import LEVEL

FORGETTING = "forgetting"
"""The split that probes what the adapter unlearned."""
Metric = Literal["accuracy", "perplexity", "iou", "hallucination"]


@dataclass(frozen=True)
class Scale:
    """The effect that means no change, and the side of it that is better: +1 above, -1 below."""

    neutral: float
    better: Literal[1, -1]


SCALES: dict[Metric, Scale] = {
    "accuracy": Scale(0.0, 1),
    "perplexity": Scale(1.0, -1),
    "iou": Scale(0.0, 1),
    "hallucination": Scale(0.0, -1),
}
TOUCH = 1e-9
"""An interval that ends this near to "no change" touches it: soft accuracies add up with rounding."""


@dataclass(frozen=True)
class Comparison:
    """What changed from `before` to `after`, paired by example and clustered by image.

    `effect` with its 95 % interval `low`..`high`: a ratio of corpus perplexities (better below 1), or a difference of mean soft accuracies
    (better above 0), of mean IoUs (above 0) or of the shares of mentioned objects that are hallucinated (CHAIR_i, below 0). `detectable`:
    the smallest true gain, in the same unit, that this sample shows four times out of five. `p_value`: sign flips per image; `p_holm`: the
    same adjusted over the rows of its level (all headlines, or all tasks); `p_mcnemar`: exact, where every image has one question that is
    right or wrong, else None. `p_not_worse`: against "worse by the margin or more"; `p_equivalent`: against that and "better by the margin
    or more", two one-sided tests. `task` is None for a headline: all captions of the split, or all its questions of that metric.
    """

    split: str
    metric: Metric
    task: str | None
    before: float
    after: float
    effect: float
    low: float
    high: float
    detectable: float
    p_value: float
    p_holm: float
    p_mcnemar: float | None
    p_not_worse: float
    p_equivalent: float
    num_examples: int
    num_images: int

    @property
    def gain(self) -> bool:
        """The whole interval is on the better side, and the p-value adjusted for the rows of its level is below 5 %: one that touches "no
        change" is no gain, and neither is the luckiest of many measures.
        """
        return self._beyond(SCALES[self.metric].better) and self.p_holm < 1 - LEVEL

    @property
    def loss(self) -> bool:
        """The whole interval is on the worse side; a warning is not adjusted."""
        return self._beyond(-SCALES[self.metric].better)

    @property
    def verdict(self) -> Literal["gain", "loss", "no gain", "no loss shown"]:
        """`gain`, `loss`, or, where the interval touches "no change", `no gain`; nobody hopes for one on the forgetting probe, so there
        `no loss shown`.
        """
        return "gain" if self.gain else "loss" if self.loss else "no loss shown" if self.split == FORGETTING else "no gain"

    def loses_at_most(self, margin: float) -> bool:
        """Non-inferiority: the interval excludes losing more than `margin`, of perplexity multiplying it by over 1 + margin.

        Few questions cannot exclude it even where no answer changed, and the bootstrap's interval is a point: `least_loss` has to be
        within the margin too.
        """
        scale = SCALES[self.metric]
        kept = self.low >= scale.neutral - margin if scale.better == 1 else self.high <= scale.neutral + margin
        return kept and (self.metric != "accuracy" or self.least_loss <= margin)

    @property
    def least_loss(self) -> float:
        """The loss that so many questions leave open if not one answer changes."""
        return least_loss(self.num_examples)

    def _beyond(self, side: int) -> bool:
        neutral = SCALES[self.metric].neutral
        return self.low > neutral + TOUCH if side == 1 else self.high < neutral - TOUCH


def least_loss(questions: int) -> float:
    """The loss of accuracy in [0, 1] that remains possible where none of so many answers changed: the end of the exact binomial interval
    (Clopper and Pearson 1934) of none out of `questions`, taken as independent.
    """
    return float(binomtest(0, questions).proportion_ci(LEVEL).high)


def compare(before: pl.DataFrame, after: pl.DataFrame, settings: Statistics) -> list[Comparison]:
    """Compare two ANSWERS tables: per split the headlines (caption perplexity, accuracy of what was answered, mean IoU of boxes, CHAIR_i of
    descriptions), then every task's accuracy.

    A task asked about a single image has no interval and is left out. Raises ValueError unless both tables answer the same examples.
    """
    pairs = paired(before, after)
    headlines, tasks = [], []
    for (split,), rows in sorted(pairs.group_by("split"), key=lambda group: str(group[0][0])):
        captions, answered = rows.filter(pl.col("task") == CAPTION), rows.drop_nulls(["right", "right_after"])
        counted = rows.drop_nulls(["whole", "whole_after"])
        if len(captions):
            headlines.append(_compare_perplexity(captions, str(split), settings))
        if len(answered):
            headlines.append(_compare_accuracy(answered, str(split), None, settings))
        for metric, own in _counted(counted):
            headlines.append(_compare_ratio(own, str(split), metric, settings))
        for (task,), answers in sorted(answered.group_by("task"), key=lambda group: str(group[0][0])):
            if answers["image"].n_unique() > 1:
                tasks.append(_compare_accuracy(answers, str(split), str(task), settings))
    return [*_with_holm(headlines), *_with_holm(tasks)]


def _counted(rows: pl.DataFrame) -> list[tuple[Metric, pl.DataFrame]]:
    """What rules count beside right and wrong, where both models have anything to count."""
    groups: list[tuple[Metric, pl.DataFrame]] = [
        ("hallucination", rows.filter(pl.col("task") == CHAIR)),
        ("iou", rows.filter(pl.col("task") != CHAIR)),
    ]
    return [(metric, own) for metric, own in groups if min(own["whole"].sum(), own["whole_after"].sum()) > 0]


def paired(before: pl.DataFrame, after: pl.DataFrame) -> pl.DataFrame:
    """Both tables side by side, sorted by example, the second one's columns with the suffix `_after`.

    Raises ValueError unless both answer the same examples.
    """
    one_sided = set(before["example_id"]) ^ set(after["example_id"])
    if one_sided:
        raise ValueError(
            f"{len(before)} answers before and {len(after)} after, but {len(one_sided)} examples, such as {min(one_sided)!r}, "
            "are in one of them only: evaluate both on the same data"
        )
    return before.join(after, on="example_id", suffix="_after", validate="1:1").sort("example_id")


def _compare_accuracy(pairs: pl.DataFrame, split: str, task: str | None, settings: Statistics) -> Comparison:
    right, right_after = (pairs[name].cast(pl.Float64).to_numpy() for name in ("right", "right_after"))
    sums = cluster_sums(right_after - right, np.ones(len(pairs)), pairs["image"].to_numpy())
    independent = pairs["image"].n_unique() == len(pairs) and bool(np.isin([right, right_after], (0.0, 1.0)).all())
    found = _comparison(pairs, sums, "accuracy", split, task, (float(right.mean()), float(right_after.mean())), settings)
    none_lost, none_won = bool((right_after >= right).all()), bool((right_after <= right).all())
    unseen = (1 - settings.margin) ** len(pairs)  # the chance that so many questions show none of a true loss of the margin
    return replace(
        found,
        detectable=max(found.detectable, least_loss(len(pairs))) if none_lost and none_won else found.detectable,
        p_mcnemar=mcnemar(right == 1, right_after == 1) if independent else None,
        p_not_worse=max(found.p_not_worse, unseen if none_lost else 0.0),
        p_equivalent=max(found.p_equivalent, unseen if none_lost or none_won else 0.0),
    )


def _compare_ratio(pairs: pl.DataFrame, split: str, metric: Metric, settings: Statistics) -> Comparison:
    part, whole, part_after, whole_after = (pairs[name].to_numpy() for name in ("part", "whole", "part_after", "whole_after"))
    sums = ratio_sums((part, whole), (part_after, whole_after), pairs["image"].to_numpy())
    levels = float(part.sum() / whole.sum()), float(part_after.sum() / whole_after.sum())
    return _comparison(pairs, sums, metric, split, None, levels, settings)


def _compare_perplexity(pairs: pl.DataFrame, split: str, settings: Statistics) -> Comparison:
    if not pairs["tokens"].equals(pairs["tokens_after"]):
        raise ValueError(
            f"split {split!r}: the two models count different tokens in the same answers, so their perplexities do not compare"
        )
    nats, nats_after, tokens = (pairs[name].cast(pl.Float64).to_numpy() for name in ("nats", "nats_after", "tokens"))
    sums = cluster_sums(nats_after - nats, tokens, pairs["image"].to_numpy())
    levels = corpus_perplexity(pairs), corpus_perplexity(pairs.select(pl.col("nats_after").alias("nats"), "tokens"))
    return _comparison(pairs, sums, "perplexity", split, None, levels, settings)


def _comparison(
    pairs: pl.DataFrame, sums: PairedSums, metric: Metric, split: str, task: str | None, levels: tuple[float, float], settings: Statistics
) -> Comparison:
    """levels: before and after. The sums of a perplexity are of logarithms, whose margin is one of a ratio."""
    scale, logarithmic = SCALES[metric], metric == "perplexity"
    unit = math.exp if logarithmic else float
    low, high = bootstrap_interval(sums, settings.bootstrap, settings.seed)
    p_value = sign_flip(sums, settings.sign_flips, settings.seed)
    below, above = margin_p_values(sums, math.log1p(settings.margin) if logarithmic else settings.margin)
    if sums.standard_error == 0 and metric != "accuracy":
        below = above = 1.0  # nothing varies, so nothing is known of what would
    return Comparison(
        split=split,
        metric=metric,
        task=task,
        before=levels[0],
        after=levels[1],
        effect=unit(sums.effect),
        low=unit(low),
        high=unit(high),
        detectable=unit(scale.better * detectable_effect(sums)),
        p_value=p_value,
        p_holm=p_value,
        p_mcnemar=None,
        p_not_worse=below if scale.better == 1 else above,
        p_equivalent=max(below, above),
        num_examples=len(pairs),
        num_images=len(sums.weight),
    )


def _with_holm(comparisons: list[Comparison]) -> list[Comparison]:
    adjusted = holm(np.array([comparison.p_value for comparison in comparisons], dtype=np.float64))
    return [replace(comparison, p_holm=float(p)) for comparison, p in zip(comparisons, adjusted, strict=True)]
