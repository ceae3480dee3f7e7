"""The official VQA rules against their published examples and a slow loop."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwise.evaluation.vqa import CONTRACTIONS, NUMBERS, normalise, soft_accuracy


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("  Two  ", "2"),
        ("The red\tCar.", "red car"),
        ("3.5", "3.5"),
        ("1,000", "1000"),
        ("red, green", "red green"),
        ("t-shirt", "t shirt"),
        ("none", "0"),
        ("Ten", "10"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("girl's", "girl's"),
        ("girls", "girls"),
        ("10:30", "10:30"),
        ("It’s", "it's"),
        ("yes!", "yes"),
        ("a\nb", "b"),
        ("well", "well"),
        ("", ""),
    ],
)
def test_normalise(answer, normal):
    assert normalise(answer) == normal


@given(st.text(st.characters(codec="ascii", categories=["L", "N", "Z"]), max_size=30))
def test_normalise_ignores_case_and_spaces(text):
    assert normalise(f"  {text.upper()} ") == normalise(text.lower())


@pytest.mark.parametrize("word", CONTRACTIONS)
def test_every_contraction_is_restored_from_any_spelling(word):
    parts = word.split("'")
    spellings = ["".join(a + b for a, b in zip(parts, (*joints, ""), strict=True)) for joints in product(("'", ""), repeat=len(parts) - 1)]
    assert {normalise(spelling) for spelling in spellings} == {word}


def test_number_words_are_the_official_twelve():
    assert NUMBERS["none"] == NUMBERS["zero"] == "0"
    assert sorted(map(int, NUMBERS.values())) == [0, 0, *range(1, 11)]


@pytest.mark.parametrize(("matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_accuracy_of_ten_annotators(matches, score):
    references = ["red"] * matches + [f"other {i}" for i in range(10 - matches)]
    assert soft_accuracy("Red.", references) == pytest.approx(score)


@given(st.lists(st.sampled_from(["red", "blue", "one", "1"]), min_size=4, max_size=12), st.sampled_from(["red", "one", "green"]))
def test_soft_accuracy_is_the_mean_over_leave_one_out_sets(references, answer):
    slow = []
    for left_out in range(len(references)):
        others = references[:left_out] + references[left_out + 1 :]
        slow.append(min(sum(normalise(other) == normalise(answer) for other in others) / 3, 1.0))
    assert soft_accuracy(answer, references) == pytest.approx(sum(slow) / len(slow))


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [("two", ["2"], 1.0), ("2", ["3"], 0.0), ("cat", ["a cat", "kitten"], 1.0), ("dog", ["cat"] * 3, 0.0)],
)
def test_few_references_mean_exact_match(answer, references, score):
    assert soft_accuracy(answer, references) == score


def test_soft_accuracy_needs_a_reference():
    with pytest.raises(ValueError, match="no reference"):
        soft_accuracy("red", [])
