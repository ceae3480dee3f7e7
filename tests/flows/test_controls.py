"""The table of the controls, from answers made up so that the effects are known."""

import numpy as np
import polars as pl
import pytest

from flows.cells import EFFECTS, as_markdown, mean_answers, table_rows
from flows.controls import answers, pairs_of
from headwise.evaluation.statistics import Statistics
from headwise.evaluation.table import ANSWERS

SETTINGS = Statistics(bootstrap=200, sign_flips=200)
NUM_IMAGES = 30


def _answers(nats: float, seed: int) -> pl.DataFrame:
    """A caption and a closed question for every image; `nats` per token, plus noise that differs between seeds."""
    noise = np.random.default_rng(seed).normal(0, 0.02, NUM_IMAGES)
    rows = []
    for number in range(NUM_IMAGES):
        base = {"image": f"{number}", "split": "evaluation", "answer": "", "valid": True, "tokens": 10, "part": None, "whole": None}
        rows.append({**base, "example_id": f"c{number}", "task": "caption", "right": None, "nats": 10 * (nats + noise[number])})
        rows.append({**base, "example_id": f"q{number}", "task": "colour", "right": float(number % 2), "nats": 1.0})
    types = {"right": pl.Float32, "tokens": pl.Int32, "part": pl.Float64, "whole": pl.Float64}
    return pl.DataFrame(rows, schema_overrides=types).select(ANSWERS.names)


BASE = _answers(2.0, 0)
CELLS = {
    0: {"base": BASE, "top": _answers(1.8, 1), "bottom": "stage calibration@bottom failed: ValueError: the loss is nan"},
    1: {"base": BASE, "top": _answers(1.9, 2), "bottom": _answers(2.0, 3)},
}


def page(cells: dict[int, dict[str, pl.DataFrame | str]]) -> str:
    rows = table_rows("scenes", pairs_of(("top", "random", "all")), cells, SETTINGS)
    return as_markdown(rows, answers(rows))


def test_every_seed_has_a_row_and_the_mean_over_seeds_too() -> None:
    rows = table_rows("scenes", pairs_of(("top", "bottom")), CELLS, SETTINGS)
    top = {row["seed"]: row for row in rows if (row["arm"], row["against"], row.get("metric")) == ("top", "base", "perplexity")}
    assert set(top) == {0, 1, None}
    assert top[None]["seeds"] == 2 and top[None]["effect"] == pytest.approx(np.sqrt(top[0]["effect"] * top[1]["effect"]))
    assert top[None]["verdict"] == "gain" and 0.8 < top[None]["low"] < top[None]["effect"] < top[None]["high"] < 1


def test_a_failed_cell_keeps_its_reason_and_the_mean_uses_the_others() -> None:
    rows = table_rows("scenes", pairs_of(("top", "bottom")), CELLS, SETTINGS)
    (failed,) = [row for row in rows if row.get("reason")]
    assert (failed["arm"], failed["seed"]) == ("bottom", 0) and "the loss is nan" in str(failed["reason"])
    (mean,) = [row for row in rows if row["arm"] == "bottom" and row.get("seed", 0) is None and row["metric"] == "perplexity"]
    assert mean["seeds"] == 1
    text = as_markdown(rows, answers(rows))
    assert "- scenes, bottom, seed 0: stage calibration@bottom failed: ValueError: the loss is nan" in text
    assert {len(line.split("|")) for line in text.splitlines() if line.startswith("|")} == {13}


def test_the_first_arm_is_compared_with_every_other_one() -> None:
    """An oracle: the ratio of two perplexities is the quotient of their ratios to the base model's."""
    cells = {seed: {"base": BASE, "top": _answers(1.8, 1 + seed), "bottom": _answers(1.9, 3 + seed)} for seed in (0, 1, 2)}
    rows = table_rows("scenes", pairs_of(("top", "bottom")), cells, SETTINGS)
    found = {(row["arm"], row["against"], row["seed"]): row for row in rows if row["metric"] == "perplexity"}
    for seed in (0, 1, 2, None):
        quotient = float(str(found["top", "base", seed]["effect"])) / float(str(found["bottom", "base", seed]["effect"]))
        assert found["top", "bottom", seed]["effect"] == pytest.approx(quotient)
    mean = found["top", "bottom", None]
    assert (mean["seeds"], mean["verdict"]) == (3, "gain") and not [key for key in found if key[:2] == ("bottom", "top")]
    text = as_markdown(rows, answers(rows))
    assert (
        f"Does it matter on scenes which layers are calibrated? By the captions, yes: top is better than bottom (ratio {mean['effect']:.4f}"
        in text
    )


def test_one_of_many_arms_that_differs_by_chance_does_not_decide() -> None:
    """Two comparisons at p = 0.03 and 0.9: each interval alone would decide, adjusted for two nothing is shown."""
    decisive = {"data": "scenes", "arm": "top", "split": "evaluation", "metric": "perplexity", "effect": 0.99, "low": 0.98, "high": 0.999}
    seeds = [{**decisive, "against": other, "seed": seed} for other in ("bottom", "random") for seed in range(3)]
    rows = [{**decisive, "against": "random", "p_value": 0.9, "verdict": "no gain"}, *seeds]
    by_chance, clear = ({**decisive, "against": "bottom", "p_value": p_value, "verdict": "gain"} for p_value in (0.03, 0.02))
    assert "not shown: top is better than bottom" in answers([by_chance, *rows])[0]
    assert "yes: top is better than bottom" in answers([clear, *rows])[0]


def test_seeds_that_disagree_or_are_few_show_nothing() -> None:
    """Many images make the mean's p-value as small as one likes; another training may still turn it round."""
    decisive = {"data": "scenes", "arm": "top", "against": "bottom", "split": "evaluation", "metric": "perplexity"}
    mean = {**decisive, "effect": 0.99, "low": 0.98, "high": 0.999, "p_value": 0.001, "verdict": "gain"}
    for effects, answer in (((0.97, 0.98, 0.99), "yes"), ((0.97, 0.98), "not shown"), ((0.97, 1.03, 0.97), "not shown")):
        seeds = [{**decisive, "seed": seed, "effect": effect} for seed, effect in enumerate(effects)]
        assert f"By the captions, {answer}: " in answers([mean, *seeds])[0]


def test_layers_that_make_no_difference_are_not_said_to_matter() -> None:
    cells = {0: {"base": BASE, "top": _answers(1.9, 1), "random": _answers(1.9, 2), "all": _answers(1.8, 3)}}
    text = page(cells)
    assert "By the captions, not shown: top is not shown to differ from random" in text and "; top is worse than all (" in text
    failed = {0: {**cells[0], "random": "no memory", "all": "no memory"}}
    assert "Does it matter" not in page(failed)


def test_cells_that_all_failed_are_rows_without_numbers() -> None:
    rows = table_rows("photos", pairs_of(("top",)), {0: {"base": "no cut-outs", "top": "no cut-outs"}}, SETTINGS)
    assert [(row["arm"], row["reason"]) for row in rows] == [("top", "no cut-outs")]
    assert set(rows[0]) <= set(EFFECTS.names) and "photos, top, seed 0: no cut-outs" in as_markdown(rows, answers(rows))


def test_the_mean_of_answers_keeps_the_examples_and_averages_the_figures() -> None:
    mean = mean_answers([_answers(1.8, 1), _answers(1.9, 2)])
    assert mean["example_id"].to_list() == sorted(BASE["example_id"].to_list()) and mean.columns == list(ANSWERS.names)
    both = [_answers(1.8, 1), _answers(1.9, 2)]
    for frame in both:
        assert frame["nats"].len() == mean["nats"].len()
    assert mean["nats"].mean() == pytest.approx(np.mean([frame["nats"].mean() for frame in both]))
    assert mean_answers([BASE]).equals(BASE.sort("example_id"))
