"""What the statistics promise, on simulated runs: intervals that cover, and no gains where there are none."""

import numpy as np
import polars as pl
import pytest
from scipy.stats import binomtest

from headwise.evaluation.compare import Comparison, compare
from headwise.evaluation.statistics import Statistics
from headwise.evaluation.table import ANSWERS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RUNS, IMAGES, TASKS = 1000, 150, ("colour", "count", "relation", "word")


def pair(generator: np.random.Generator, effect: float, tasks: tuple[str, ...]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Two models on the same questions, 2 to 6 about an image, whose difficulty they share: it is the image's more than the question's.

    The second is right more often by `effect`, and a caption's perplexity is lower by a factor of 1 - effect.
    """
    per_image = generator.integers(2, 7, IMAGES)
    image = np.repeat(np.arange(IMAGES), per_image)
    ease = generator.normal(0, 0.25, IMAGES)[image] + generator.normal(0, 0.15, len(image))
    before = np.clip(0.55 + ease, 0.05, 0.95)  # room for the effect on either side
    after = before + effect
    shared = generator.random(len(image))
    draw = np.where(generator.random(len(image)) < 0.6, shared, generator.random(len(image)))
    right, right_after = shared < before, draw < after
    tokens = generator.integers(5, 15, IMAGES)
    nats = 2.0 * tokens + generator.normal(0, 2, IMAGES)
    nats_after = nats + tokens * np.log1p(-effect) + generator.normal(0, 1, IMAGES)
    closed = {"example_id": [f"q{k}" for k in range(len(image))], "image": image.astype(str), "task": generator.choice(tasks, len(image))}
    captions = {"example_id": [f"c{k}" for k in range(IMAGES)], "image": np.arange(IMAGES).astype(str), "task": ["caption"] * IMAGES}
    return table(closed, captions, right, nats, tokens), table(closed, captions, right_after, nats_after, tokens)


def table(closed: dict, captions: dict, right: np.ndarray, nats: np.ndarray, tokens: np.ndarray) -> pl.DataFrame:
    same = {"split": "evaluation", "answer": "", "valid": True, "part": None, "whole": None}
    types = {"right": pl.Float32, "nats": pl.Float64, "tokens": pl.Int32, "part": pl.Float64, "whole": pl.Float64}
    questions = pl.DataFrame({**closed, "right": right.astype(np.float32)}).with_columns(nats=1.0, tokens=1)
    written = pl.DataFrame({**captions, "nats": nats, "tokens": tokens}).with_columns(right=None)
    frames = [
        frame.with_columns(**{k: pl.lit(v) for k, v in same.items()}).select(ANSWERS.names).cast(types) for frame in (questions, written)
    ]
    return pl.concat(frames)


def simulate(effect: float, seed: int = 0, runs: int = RUNS, tasks: tuple[str, ...] = TASKS[:1]) -> list[list[Comparison]]:
    generator = np.random.default_rng([seed, round(1000 * effect) + 1000])
    return [compare(*pair(generator, effect, tasks), settings(run)) for run in range(runs)]


def settings(run: int) -> Statistics:
    """Another seed for each run: the same draws in all would make their errors the same too."""
    return Statistics(bootstrap=1000, sign_flips=1000, seed=run)


def headlines(runs: list[list[Comparison]], metric: str) -> list[Comparison]:
    return [next(c for c in run if c.metric == metric and c.task is None) for run in runs]


@pytest.mark.parametrize("effect", [0.0, 0.005, 0.02])
def test_intervals_cover_the_truth_as_often_as_they_say(effect: float) -> None:
    """Three times a thousand runs: of one thousand the share itself has an interval of 2.7 points."""
    runs = [run for seed in range(3) for run in simulate(effect, seed)]
    for metric, truth in (("accuracy", effect), ("perplexity", 1 - effect)):
        found = headlines(runs, metric)
        coverage = np.mean([c.low <= truth <= c.high for c in found])
        print(f"{metric}, effect {effect:g}: coverage {coverage:.3f}, gains {np.mean([c.gain for c in found]):.3f}")
        assert 0.93 <= coverage <= 0.97, (metric, coverage)


def test_where_nothing_changed_a_family_of_tests_finds_something_in_one_run_of_twenty_at_most() -> None:
    runs = simulate(0.0, tasks=TASKS)
    families = {"headlines": [[c for c in run if c.task is None] for run in runs], "tasks": [[c for c in run if c.task] for run in runs]}
    for name, family in families.items():
        found = {"p_holm": [min(c.p_holm for c in run) < 0.05 for run in family], "gain": [any(c.gain for c in run) for run in family]}
        for what, false in found.items():
            rate = binomtest(sum(false), RUNS)
            print(f"{name}, {what}: {rate.statistic:.3f}, at least {rate.proportion_ci().low:.3f}")
            assert rate.proportion_ci().low <= 0.05, (name, what, rate.statistic)


def test_the_detectable_gain_is_shown_four_times_out_of_five() -> None:
    """A gain of the size that samples with that gain call detectable: it changes answers itself, so it is more than without one."""
    gain = 0.0
    for seed in range(4):
        gain = float(np.mean([c.detectable for c in headlines(simulate(gain, seed, 50), "accuracy")]))
    shown = np.mean([c.low > 0 for c in headlines(simulate(gain, 4, 500), "accuracy")])
    print(f"true gain {gain:.4f}: shown in {shown:.3f} of runs")
    assert 0.75 <= shown <= 0.85


def test_not_worse_is_claimed_wrongly_in_one_run_of_twenty_at_most() -> None:
    """At a true loss of exactly the margin."""
    runs = [run for seed in range(3) for run in simulate(-settings(0).margin, seed)]
    rate = binomtest(sum(c.p_not_worse < 0.05 for c in headlines(runs, "accuracy")), len(runs))
    print(f"not worse, wrongly: {rate.statistic:.3f}")
    assert rate.proportion_ci().low <= 0.05
