"""Letters in answers to multiple choice, by hand."""

import pytest

from headwise.evaluation.choices import choice_rule, chosen_letter, options_text
from headwise.examples import Example

QUESTION = f"Which is a mammal?\n{options_text(['A shark', 'a bat', 'a hen'])}\nAnswer with the option's letter."


@pytest.mark.parametrize(
    ("answer", "letter", "valid"),
    [
        ("B", "B", True),
        (" b ", "B", True),
        ("B.", "B", True),
        ("(B)", "B", True),
        ("B. a bat", "B", True),
        ("C) a hen", "C", True),
        ("B: a bat", "B", True),
        ("The answer is B.", "B", True),
        ("Bats nurse their young, so the answer is (B)", "B", True),
        ("The answer is A. The answer is B.", None, False),  # it names two
        ("A shark is a fish", None, False),  # an article is no letter
        ("a bat", None, False),
        ("D", "D", False),  # not offered
        ("", None, False),
        ("BC", None, False),
        ("Because", None, False),
    ],
)
def test_which_letter_an_answer_names(answer: str, letter: str | None, valid: bool) -> None:
    example = Example("q", None, None, QUESTION, ("B", "a bat"), None, "choice", "scienceqa")
    judged = choice_rule(answer, example)
    assert chosen_letter(answer) == letter
    assert (judged.right, judged.valid) == (float(letter == "B"), valid)
