"""Short answers: the official VQA normalisation and soft accuracy (Antol et al. 2015; Goyal et al. 2017, visualqa.org/evaluation)."""

import re
from collections.abc import Iterable, Sequence
from itertools import product

from headwise.evaluation.judgement import Judgement, Rule
from headwise.examples import Example

NUMBERS = {"none": "0"} | {
    word: str(value) for value, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
}
ARTICLES = frozenset({"a", "an", "the"})
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Apostrophes and colons stay: girl's is not girls, and 10:30 is a time."""

STEMS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could i might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "he i it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "": "i'm ma'am o'clock 'twas y'all",
}
CONTRACTIONS = tuple(stem + ending for ending, stems in STEMS.items() for stem in stems.split())
"""The contractions that the official evaluation restores; not those whose bare letters are another word, as in well, its or shed."""

LEAST_ANNOTATORS = 4
"""With fewer references no answer could reach 3 matches among the other annotators."""

_DIGIT_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


def _without_apostrophes(word: str) -> set[str]:
    """Every way to write the word with at least one apostrophe left out."""
    parts = word.split("'")
    joints = product(("'", ""), repeat=len(parts) - 1)
    return {parts[0] + "".join(joint + part for joint, part in zip(chosen, parts[1:], strict=True)) for chosen in joints} - {word}


_RESTORED = {short: word for word in CONTRACTIONS for short in _without_apostrophes(word)}


def normalise(answer: str) -> str:
    """The answer as the official evaluation compares it.

    Lower case; punctuation out (beside a space, or where the text has a number with commas), else a space in its place; full stops
    out unless a digit follows; number words up to ten as digits; no articles; contractions with their apostrophes.
    """
    text = " ".join(answer.split()).replace("’", "'").lower()
    text = _PERIOD.sub("", _strip_punctuation(text))
    words = (NUMBERS.get(word, word) for word in text.split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in ARTICLES)


def _strip_punctuation(text: str) -> str:
    has_number = _DIGIT_COMMA.search(text) is not None
    stripped = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if beside_space or has_number else " ")
    return stripped


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """Share in [0, 1] of being right: `min(matches / 3, 1)`, averaged over the sets that leave one annotator out.

    So 1, 2, 3 and 4 matches of 10 annotators give 0.3, 0.6, 0.9 and 1. With fewer than four references (one exact answer, or a
    few ways to say it) the answer is right if it is one of them. Raises ValueError without a reference.
    """
    if not references:
        raise ValueError(f"answer {answer!r}: no reference to compare with")
    given = normalise(answer)
    same = [normalise(reference) == given for reference in references]
    if len(same) < LEAST_ANNOTATORS:
        return float(any(same))
    matches = sum(same)
    return sum(min((matches - left_out) / 3, 1.0) for left_out in same) / len(same)


def vqa_rule(answer: str, example: Example) -> Judgement:
    """`soft_accuracy`; valid unless nothing is left of the answer."""
    return Judgement(soft_accuracy(answer, example.answers), bool(normalise(answer)))


def known_rule(examples: Iterable[Example]) -> Rule:
    """`soft_accuracy`, for questions with few possible answers: valid is what is a reference of any of these examples."""
    known = frozenset(normalise(reference) for example in examples for reference in example.answers)

    def judge(answer: str, example: Example) -> Judgement:
        return Judgement(soft_accuracy(answer, example.answers), normalise(answer) in known)

    return judge


def exact_rule(answer: str, example: Example) -> Judgement:
    """Right if the answer is a reference, in small letters and without a full stop at its end, as GQA's evaluation of LLaVA takes it."""
    given = answer.strip().rstrip(".").lower()
    return Judgement(float(given in (reference.strip().lower() for reference in example.answers)), bool(given))
