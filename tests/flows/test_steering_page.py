"""The page of ZeroTuning's comparison, from answers made up so that the effects are known."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from flows.cells import compared, table_rows
from flows.steering import REVIEWS, steering
from flows.steering_page import CONTROLS, agreement, as_markdown, choices, equivalence, gains
from headwise.calibration.zerotuning.schema import HEADS
from headwise.evaluation.statistics import Statistics
from headwise.evaluation.table import ANSWERS, BASE
from headwise.files import frame_of, write_json, write_table

SETTINGS = Statistics(bootstrap=400, sign_flips=400, margin=0.01)
PAIRS = [(BASE, "zero"), *((control, "zero") for control in (*CONTROLS, "zero-exact"))]


def answers(accuracy: float, seed: int, number: int = 4000, invalid: int = 0) -> pl.DataFrame:
    """Questions, of which the easiest are right; the seed moves a few."""
    noise = np.random.default_rng(seed).normal(0, 0.002, number)
    hard = np.arange(number) / number
    right = (hard + noise < accuracy).astype(np.float32)
    frame = pl.DataFrame({"example_id": [f"{place:05d}" for place in range(number)], "right": right, "nats": 1.5 - right})
    frame = frame.with_columns(
        image=pl.col("example_id"),
        split=pl.lit("evaluation"),
        task=pl.lit("reviews"),
        answer=pl.lit("positive"),
        valid=pl.Series(np.arange(number) >= invalid),
        tokens=pl.lit(1, pl.Int32),
        part=pl.lit(None, pl.Float64),
        whole=pl.lit(None, pl.Float64),
    )
    return frame.select(ANSWERS.names)


def cells(**levels: float):
    """A temperature answers as the model as it is, and is surer of what is right."""
    names = {name.replace("_", "-"): level for name, level in levels.items()}
    found = {seed: {arm: answers(level, 10 * seed + at) for at, (arm, level) in enumerate(names.items())} for seed in (1, 2, 3)}
    for cell in found.values():
        if "temperature" in cell:
            cell["temperature"] = cell[BASE].with_columns(pl.col("nats") - 0.01)
    return found


def test_a_gain_has_to_beat_both_controls() -> None:
    better = cells(base=0.80, zero=0.83, label_bias=0.81, temperature=0.80)
    said = gains(table_rows("reviews", PAIRS, better, SETTINGS, compared))
    assert [line.rsplit(", ", 1)[1] for line in said[:3]] == ["better."] * 3 and said[3].endswith("zero is a gain.")
    assert 2.5 < float(said[0].removeprefix("zero against the model as it is: ").split()[0]) < 3.5
    only_threshold = cells(base=0.80, zero=0.83, label_bias=0.83, temperature=0.80)
    said = gains(table_rows("reviews", PAIRS, only_threshold, SETTINGS, compared))
    assert said[1].startswith("zero against the control label-bias") and said[1].endswith("not shown to be better.")
    assert said[3].endswith("zero is no gain.")
    surer = {seed: {**cell, "temperature": cell[BASE].with_columns(pl.col("nats") - 0.1)} for seed, cell in better.items()}
    said = gains(table_rows("reviews", PAIRS, surer, SETTINGS, compared))
    assert said[2].startswith("zero against the control temperature: 1.0") and said[2].endswith("not shown to be better.")
    without = cells(base=0.80, zero=0.83)
    said = gains(table_rows("reviews", PAIRS, without, SETTINGS, compared))
    assert said[-1] == "Whether zero is a gain is open: it was not compared with label-bias, temperature."


def test_two_profiles_are_equivalent_only_where_the_seeds_say_so() -> None:
    near = equivalence(table_rows("reviews", PAIRS, cells(base=0.8, zero=0.83, zero_exact=0.831), SETTINGS, compared), 0.01)
    assert len(near) == 1 and "over 3 seeds, equivalent within 1 points" in near[0]
    far = equivalence(table_rows("reviews", PAIRS, cells(base=0.8, zero=0.83, zero_exact=0.85), SETTINGS, compared), 0.01)
    assert "not shown to be equivalent" in far[0] and far[0].startswith("zero against zero-exact: -2.0")
    assert equivalence(table_rows("reviews", PAIRS, cells(base=0.8, zero=0.83), SETTINGS, compared), 0.01) == []
    same = {seed: {"zero": answers(0.8, 1), "zero-exact": answers(0.8, 1)} for seed in (1, 2, 3)}
    assert (
        "0.00 points over 3 seeds, equivalent within 1 points"
        in equivalence(table_rows("reviews", PAIRS, same, SETTINGS, compared), 0.01)[0]
    )


def test_seeds_that_agree_do_not_make_up_for_too_few_questions() -> None:
    """Each seed sees the same 400 questions, on which the two profiles' answers differ often, and as often for the better."""
    few = answers(0.8, 0, number=400)
    flipped = np.random.default_rng(0).choice(400, 80, replace=False)
    right = few["right"].to_numpy().copy()
    right[flipped] = 1 - right[flipped]
    right[flipped[: int(right.sum() - few["right"].sum())]] = 0
    other = few.with_columns(right=pl.Series(right, dtype=few["right"].dtype))
    found = {seed: {"zero": other, "zero-exact": few} for seed in (1, 2, 3)}
    (line,) = equivalence(table_rows("reviews", PAIRS, found, SETTINGS, compared), 0.01)
    assert "not shown to be equivalent" in line


def written(folder: Path, arm: str, effect: np.ndarray) -> None:
    own = folder / "data" / "adapters" / arm
    rows = [{"layer": layer, "head": head, "effect": float(value), "gamma": 1.0} for (layer, head), value in np.ndenumerate(effect)]
    write_table(frame_of(rows, HEADS), own / "heads.parquet", HEADS)
    claims = {"direction": "up", "share": 0.2, "gamma": 1.5, "heads": 4, "examples": 100}
    write_json({**claims, "forward_equivalents": {"profile": 3.0, "search": 18.0}}, own / "calibration.json")


def test_profiles_agree_by_sign_rank_and_first_heads(tmp_path: Path) -> None:
    effect = np.arange(20.0).reshape(4, 5) - 8
    written(tmp_path, "zero", effect)
    assert agreement(1, tmp_path) is None
    written(tmp_path, "zero-exact", effect[:, ::-1])
    found = agreement(1, tmp_path)
    chosen = [set(np.argsort(own.ravel())[:8].tolist()) for own in (effect, effect[:, ::-1])]
    assert found == {
        "seed": 1,
        "same sign %": 100 * float((np.sign(effect) == np.sign(effect[:, ::-1])).mean()),
        "rank correlation": pytest.approx(np.corrcoef(effect.ravel(), effect[:, ::-1].ravel())[0, 1]),
        "same of the first 40 %": 100 * len(chosen[0] & chosen[1]) / 8,
    }
    assert choices(1, tmp_path)[0]["passes, profile"] == 3.0


def test_the_page_has_every_arm_with_its_invalid_answers_and_failures(tmp_path: Path) -> None:
    found = cells(base=0.80, zero=0.83, label_bias=0.81, temperature=0.80, zero_exact=0.83)
    found = {seed: {**cell, BASE: answers(0.80, seed, invalid=400), "act": "a reason"} for seed, cell in found.items()}
    written(tmp_path, "zero", np.arange(20.0).reshape(4, 5) - 8)
    rows = table_rows("reviews", [*PAIRS, (BASE, "act")], found, SETTINGS, compared)
    page = as_markdown(rows, found, {1: tmp_path}, 0.01)
    (line,) = (line for line in page.splitlines() if line.startswith("| base |"))
    cells_of_base = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells_of_base[1] == "3" and float(cells_of_base[2]) == pytest.approx(80, abs=0.2) and cells_of_base[3] == "10"
    assert "- reviews, act, seed 2: a reason" in page and "What was chosen:" in page and "Heads by one backward" not in page


def test_arms_that_steer_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"arms: \['rah'\] steer nothing; this table compares zero,"):
        steering.fn(replace(REVIEWS, arms=("zero", "rah")))
