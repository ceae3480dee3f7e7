"""Multiple choice: the letter that an answer names, as LLaVA's evaluation of ScienceQA reads it (Lu et al. 2022, arXiv 2209.09513)."""

import re
from collections.abc import Sequence

from headwise.evaluation.judgement import Judgement
from headwise.examples import Example

OPTION = re.compile(r"^([A-Z])\. ", re.MULTILINE)
ALONE = re.compile(r"\(?([A-Za-z])\)?[.:]?")
LEADING = re.compile(r"([A-Z])[.):] ")
NAMED = re.compile(r"answer is:? \(?([A-Z])\b")


def options_text(options: Sequence[str]) -> str:
    """A line per option, each with its letter."""
    return "\n".join(f"{letter(place)}. {option}" for place, option in enumerate(options))


def letter(place: int) -> str:
    """A for the first option, B for the second."""
    return chr(ord("A") + place)


def chosen_letter(answer: str) -> str | None:
    """The letter alone (`b`, `(B)`, `B.`), at the beginning of an option's line (`B. a cat`), or named once by "the answer is B"; else
    None. The article of "A cat" is none.
    """
    text = answer.strip()
    if (found := ALONE.fullmatch(text)) or (found := LEADING.match(text)):
        return found[1].upper()
    named = set(NAMED.findall(text))
    return named.pop() if len(named) == 1 else None


def choice_rule(answer: str, example: Example) -> Judgement:
    """Right if the letter is the reference; valid if it is one of the question's options."""
    chosen = chosen_letter(answer)
    return Judgement(float(chosen == example.answers[0]), chosen in OPTION.findall(example.question))
