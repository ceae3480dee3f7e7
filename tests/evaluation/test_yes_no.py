"""POPE's and MME's rules, by cases worked by hand from their authors' programs."""

import polars as pl
import pytest

from headwise.evaluation.yes_no import mme_answer, mme_figures, mme_rule, pope_answer, pope_figures, pope_rule
from headwise.examples import Example


def asked(label: str) -> Example:
    return Example("a", "a.jpg", None, "Is there a dog in the image?", (label,), None, "random", "pope")


@pytest.mark.parametrize(
    ("answer", "said", "valid"),
    [
        ("Yes", "yes", True),
        ("no", "no", True),
        ("No, there is no dog.", "no", True),
        ("There is not a dog", "no", True),
        ("Yes. There is no cat though.", "yes", True),  # only the first sentence counts
        ("NO", "yes", True),  # the program knows No and no alone
        ("Nope", "yes", False),
        ("no.", "no", True),
        ("There is,no doubt, a dog", "yes", True),  # the comma goes before the words are told apart: "isno"
        ("nothing", "yes", False),
        ("", "yes", False),  # what says neither counts as yes
        ("a dog", "yes", False),
        ("It is a knot", "yes", False),
        ("no\nyes", "yes", True),  # words are split at spaces alone: "no\nyes" is one word
    ],
)
def test_what_pope_takes_an_answer_for(answer: str, said: str, valid: bool) -> None:
    assert pope_answer(answer) == said
    assert [pope_rule(answer, asked(label)).right for label in ("yes", "no")] == ([1, 0] if said == "yes" else [0, 1])
    assert pope_rule(answer, asked("yes")).valid is valid


def table(rows: list[tuple[str, str, str, str]], rule) -> pl.DataFrame:
    """From (image, task, answer, label)."""
    judged = [rule(answer, asked(label)).right for _, _, answer, label in rows]
    return pl.DataFrame(
        {"image": [row[0] for row in rows], "task": [row[1] for row in rows], "answer": [row[2] for row in rows], "right": judged}
    )


def test_popes_figures_by_hand() -> None:
    said = [("Yes", "yes")] * 3 + [("Yes, it is", "no")] * 1 + [("No", "yes")] * 2 + [("no", "no")] * 4
    found = pope_figures(table([("a", "random", answer, label) for answer, label in said], pope_rule))
    assert found == {"accuracy": 7 / 10, "precision": 3 / 4, "recall": 3 / 5, "f1": 2 * 3 / (2 * 3 + 1 + 2), "yes_share": 4 / 10}


def test_popes_figures_that_divide_by_nothing_are_none_and_never_0_or_1() -> None:
    never = pope_figures(table([("a", "random", "no", "no")], pope_rule))
    assert never["precision"] is never["recall"] is never["f1"] is None and never["accuracy"] == 1
    assert set(pope_figures(table([], pope_rule).cast({"answer": pl.String, "right": pl.Float64})).values()) == {None}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("  NO ", "no"),
        ("y", "yes"),
        ("N.", "no"),
        ("x", "other"),
        ("Yes, the picture shows it", "yes"),
        ("Not at all", "no"),  # "not " has "no" in its first four letters
        ("I know", "other"),  # "i kn"
        ("A no", "no"),  # "a no"
        ("It is not", "other"),
        ("", "other"),
        ("Eyes", "yes"),  # "eyes"
    ],
)
def test_what_mme_takes_an_answer_for(answer: str, said: str) -> None:
    assert mme_answer(answer) == said
    assert mme_rule(answer, asked("yes")).right == float(said == "yes") and mme_rule(answer, asked("yes")).valid is (said != "other")


def test_mmes_scores_by_hand() -> None:
    """Count: one image of three wholly right, four of six answers: 66.67 + 33.33. OCR: all of one image: 200. Code: none: 50 + 0."""
    rows = [
        *[("1", "count", "Yes", "yes"), ("1", "count", "No", "no")],
        *[("2", "count", "Yes", "yes"), ("2", "count", "Yes", "no")],
        *[("3", "count", "No", "yes"), ("3", "count", "No", "no")],
        *[("4", "OCR", "Yes", "yes"), ("4", "OCR", "no", "no")],
        *[("5", "code_reasoning", "maybe", "yes"), ("5", "code_reasoning", "no", "no")],
    ]
    found = mme_figures(table(rows, mme_rule))
    assert found["count"] == pytest.approx(100 * (4 / 6 + 1 / 3)) and found["OCR"] == 200 and found["code_reasoning"] == 50
    assert found["perception"] == pytest.approx(300) and found["cognition"] == 50


def test_an_image_whose_second_answer_is_lost_has_no_score() -> None:
    with pytest.raises(ValueError, match=r"MME, count: 1 has 1 questions answered"):
        mme_figures(table([("1", "count", "Yes", "yes")], mme_rule))
