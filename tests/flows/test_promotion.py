"""The verdict as plain functions; what champions have to beat."""

from dataclasses import replace
from typing import Literal

import pytest

from flows.promotion import Verdict, against_base, against_champion, against_idle, against_silent, against_uncommitted, shortfalls, verdict
from headwise.evaluation.compare import Comparison
from headwise.examples import Example


def _comparison(split: str, metric: Literal["accuracy", "perplexity"], low: float, high: float) -> Comparison:
    effect = (low + high) / 2
    return Comparison(split, metric, None, 0.9, 0.9 + effect, effect, low, high, 0.01, 0.04, 0.04, None, 0.5, 0.5, 200, 50)


TARGET = _comparison("evaluation", "perplexity", 0.85, 0.95)
PROBE = _comparison("forgetting", "accuracy", -0.01, 0.01)


def test_better_and_harmless_is_champion() -> None:
    found = verdict([against_base([TARGET, PROBE], margin=0.02)])
    assert found.better and found.sentence.startswith("Champion: against the base model evaluation caption perplexity")
    assert "0.85 to 0.95" in found.sentence and "forgetting accuracy" in found.sentence


@pytest.mark.parametrize(
    ("comparisons", "why"),
    [
        ([replace(TARGET, high=1.0), PROBE], "is no gain"),
        ([TARGET, replace(PROBE, low=-0.021)], "may lose more than 0.02"),
        ([TARGET, PROBE, _comparison("forgetting", "perplexity", 0.9, 1.03)], "may lose more than 0.02"),
        ([TARGET, replace(PROBE, low=0.0, high=0.0, num_examples=100)], "0.02: so few questions (100) cannot show less than 0.036"),
        ([replace(TARGET, num_images=9), PROBE], "is from 9 images, 10 at least"),
        ([TARGET, replace(PROBE, num_images=9)], "is from 9 images, 10 at least"),
        ([PROBE], "no captions"),
        ([TARGET], "no forgetting split"),
        ([replace(TARGET, task="caption"), PROBE], "no captions"),
    ],
)
def test_anything_less_says_why_not(comparisons: list[Comparison], why: str) -> None:
    found = verdict([against_base(comparisons, margin=0.02)])
    assert not found.better and found.sentence.startswith("No champion: ") and why in found.sentence


def test_what_no_adapter_could_pass_is_known_from_the_examples() -> None:
    captions = [_example("evaluation", "caption", image) for image in range(10)]
    probe = [_example("forgetting", "colour", image) for image in range(183)]
    assert shortfalls([*captions, *probe], 0.02) == []
    assert shortfalls([*captions, *probe[1:]], 0.02) == [
        "182 closed questions in the forgetting split cannot exclude a loss of 0.02, only one of 0.0201"
    ]
    few = [*captions[1:], *probe, *(_example("forgetting", "caption", image) for image in range(3))]
    assert shortfalls(few, 0.02) == [
        "the evaluation split's captions show 9 images, 10 are needed",
        "the forgetting split's captions show 3 images, 10 are needed",
    ]
    assert shortfalls([], 0.02) == [
        "the evaluation split's captions show 0 images, 10 are needed",
        "the forgetting split shows 0 images, 10 are needed",
    ]


def _example(split: str, task: str, image: int) -> Example:
    return Example(f"{split}-{task}-{image}", f"{split}-{image}.png", None, "What?", ("x",), None, task, split)


def test_the_margin_is_compared_with_the_end_of_the_interval() -> None:
    assert against_base([TARGET, replace(PROBE, low=-0.02)], margin=0.02).better
    assert not against_base([TARGET, replace(PROBE, low=-0.02)], margin=0.019).better


def test_a_challenger_has_to_beat_the_champion_too() -> None:
    base = against_base([TARGET, PROBE], margin=0.02)
    better, same = against_champion([TARGET], "3"), against_champion([replace(TARGET, high=1.01)], "3")
    assert verdict([base, better]).better
    assert "against version 3, the champion so far, evaluation caption perplexity" in verdict([base, better]).sentence
    found = verdict([base, same])
    assert not found.better and found.sentence.startswith("No champion: against the base model") and "is no gain" in found.sentence
    assert not against_champion([PROBE], "3").better
    assert not verdict([Verdict(False, "no captions"), better]).better


def test_an_adapter_that_changes_nothing_is_no_champion() -> None:
    assert against_idle({}) == against_idle({"accepted": 3}) == against_idle({"heads": 3}) == []
    assert against_idle({"heads": 0})
    assert against_silent({}) == against_silent({"operator": "first_token"}) == []
    assert not against_silent({"operator": "sinks"})[0].better
    found = verdict([*against_idle({"accepted": 0}), against_base([TARGET, PROBE], margin=0.02)])
    assert not found.better and found.sentence.startswith("No champion: the adapter changes nothing, as no head was selected")


def test_uncommitted_code_promotes_nothing_and_says_which() -> None:
    assert against_uncommitted(()) == []
    found = verdict([against_base([TARGET, PROBE], margin=0.02), *against_uncommitted(("flows/promotion.py",))])
    assert not found.better and "not committed (flows/promotion.py)" in found.sentence
