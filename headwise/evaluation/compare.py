"""Two models on the same examples: is the second one better, and could this sample have told?"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import polars as pl
from scipy.stats import binomtest

from headwise.evaluation.paired import PairedSums, bootstrap_interval, cluster_sums, detectable_effect, holm, mcnemar, sign_flip
from headwise.evaluation.perplexity import corpus_perplexity
from headwise.evaluation.statistics import Statistics
from headwise.examples import CAPTION
from headwise.intervals import LEVEL

FORGETTING = "forgetting"
"""The split that probes what the adapter unlearned."""
Metric = Literal["accuracy", "perplexity"]
NEUTRAL: dict[Metric, float] = {"accuracy": 0.0, "perplexity": 1.0}
TOUCH = 1e-9
"""An interval that ends this near to "no change" touches it: soft accuracies add up with rounding."""


@dataclass(frozen=True)
class Comparison:
    """What changed from `before` to `after`, paired by example and clustered by image.

    `effect` with its 95 % interval `low`..`high`: a difference of mean soft accuracies (better above 0), or a ratio of corpus perplexities
    (better below 1). `detectable`: the smallest true gain, in the same unit, that this sample shows four times out of five. `p_value`:
    sign flips per image; `p_holm`: the same adjusted over the rows of its level (all headlines, or all tasks); `p_mcnemar`: exact, where
    every image has one question that is right or wrong, else None. `task` is None for a headline: all captions of the split, or all its
    closed questions.
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
    num_examples: int
    num_images: int

    @property
    def gain(self) -> bool:
        """The whole interval is on the better side; one that touches "no change" is no gain."""
        return self.low > TOUCH if self.metric == "accuracy" else self.high < 1 - TOUCH

    @property
    def loss(self) -> bool:
        """The whole interval is on the worse side."""
        return self.high < -TOUCH if self.metric == "accuracy" else self.low > 1 + TOUCH

    @property
    def verdict(self) -> Literal["gain", "loss", "no gain", "no loss shown"]:
        """`gain`, `loss`, or, where the interval touches "no change", `no gain`; nobody hopes for one on the forgetting probe, so there
        `no loss shown`.
        """
        return "gain" if self.gain else "loss" if self.loss else "no loss shown" if self.split == FORGETTING else "no gain"

    def loses_at_most(self, margin: float) -> bool:
        """Non-inferiority: the interval excludes losing more than `margin` of accuracy, or multiplying perplexity by over 1 + margin.

        Few questions cannot exclude it even where no answer changed, and the bootstrap's interval is a point: `least_loss` has to be
        within the margin too.
        """
        return self.low >= -margin and self.least_loss <= margin if self.metric == "accuracy" else self.high <= 1 + margin

    @property
    def least_loss(self) -> float:
        """The loss that so many questions leave open if not one answer changes."""
        return least_loss(self.num_examples)


def least_loss(questions: int) -> float:
    """The loss of accuracy in [0, 1] that remains possible where none of so many answers changed: the end of the exact binomial interval
    (Clopper and Pearson 1934) of none out of `questions`, taken as independent.
    """
    return float(binomtest(0, questions).proportion_ci(LEVEL).high)


def compare(before: pl.DataFrame, after: pl.DataFrame, settings: Statistics) -> list[Comparison]:
    """Compare two ANSWERS tables: per split the headlines (caption perplexity, accuracy of closed questions), then every closed task.

    A task asked about a single image has no interval and is left out. Raises ValueError unless both tables answer the same examples.
    """
    pairs = paired(before, after)
    headlines, tasks = [], []
    for (split,), rows in sorted(pairs.group_by("split"), key=lambda group: str(group[0][0])):
        captions, closed = rows.filter(pl.col("task") == CAPTION), rows.filter(pl.col("task") != CAPTION)
        if len(captions):
            headlines.append(_compare_perplexity(captions, str(split), settings))
        if len(closed):
            headlines.append(_compare_accuracy(closed, str(split), None, settings))
        for (task,), answers in sorted(closed.group_by("task"), key=lambda group: str(group[0][0])):
            if answers["image"].n_unique() > 1:
                tasks.append(_compare_accuracy(answers, str(split), str(task), settings))
    return [*_with_holm(headlines), *_with_holm(tasks)]


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
    low, high = bootstrap_interval(sums, settings.bootstrap, settings.seed)
    independent = pairs["image"].n_unique() == len(pairs) and bool(np.isin([right, right_after], (0.0, 1.0)).all())
    return Comparison(
        split=split,
        metric="accuracy",
        task=task,
        before=float(right.mean()),
        after=float(right_after.mean()),
        effect=sums.effect,
        low=low,
        high=high,
        detectable=detectable_effect(sums),
        **_tests(sums, settings),
        p_mcnemar=mcnemar(right == 1, right_after == 1) if independent else None,
        num_examples=len(pairs),
        num_images=len(sums.weight),
    )


def _compare_perplexity(pairs: pl.DataFrame, split: str, settings: Statistics) -> Comparison:
    if not pairs["tokens"].equals(pairs["tokens_after"]):
        raise ValueError(
            f"split {split!r}: the two models count different tokens in the same answers, so their perplexities do not compare"
        )
    nats, nats_after, tokens = (pairs[name].cast(pl.Float64).to_numpy() for name in ("nats", "nats_after", "tokens"))
    sums = cluster_sums(nats_after - nats, tokens, pairs["image"].to_numpy())
    low, high = bootstrap_interval(sums, settings.bootstrap, settings.seed)
    return Comparison(
        split=split,
        metric="perplexity",
        task=None,
        before=corpus_perplexity(pairs),
        after=corpus_perplexity(pairs.select(pl.col("nats_after").alias("nats"), "tokens")),
        effect=math.exp(sums.effect),
        low=math.exp(low),
        high=math.exp(high),
        detectable=math.exp(-detectable_effect(sums)),
        **_tests(sums, settings),
        p_mcnemar=None,
        num_examples=len(pairs),
        num_images=len(sums.weight),
    )


def _tests(sums: PairedSums, settings: Statistics) -> dict[str, float]:
    p_value = sign_flip(sums, settings.sign_flips, settings.seed)
    return {"p_value": p_value, "p_holm": p_value}


def _with_holm(comparisons: list[Comparison]) -> list[Comparison]:
    adjusted = holm(np.array([comparison.p_value for comparison in comparisons], dtype=np.float64))
    return [replace(comparison, p_holm=float(p)) for comparison, p in zip(comparisons, adjusted, strict=True)]
