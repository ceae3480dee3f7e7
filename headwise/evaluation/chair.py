"""CHAIR: which of the objects that a description mentions are not in the image (Rohrbach et al. 2018, arXiv 1809.02156)."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from headwise.evaluation.judgement import Judgement, Rule
from headwise.examples import Example

CHAIR = "chair"
"""The task of a description that is written and judged; that of a caption is read."""
Vocabulary = Mapping[tuple[str, ...], str]
"""The object that each name means, "" if none; a name is one or more words in small letters."""
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")


def vocabulary_of(names: Mapping[str, str]) -> Vocabulary:
    """From names and their plurals to the objects that the names mean. (The authors make the text's words singular, which takes the s off
    a bus, a dress and of "his".)
    """
    plurals = {_engine().plural_noun(name): meant for name, meant in names.items() if words(name)}
    return {tuple(words(name)): meant for name, meant in (plurals | dict(names)).items() if words(name)}


def with_double_words(names: Mapping[str, str]) -> dict[str, str]:
    """The names and, from the authors' program, those of two words of which one alone would mean another object: an adult cat is no person,
    a toilet seat no chair, a train track and a home plate are nothing that COCO marks.
    """
    meant = {f"{age} {animal}": animal for age in ("baby", "adult") for animal in ANIMALS}
    meant |= {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet"}
    doubles = {double: names.get(single, "") for double, single in meant.items()}
    return doubles | {"train track": "", "home plate": ""} | dict(names)


def read_synonyms(path: Path) -> dict[str, str]:
    """A line per object, its names separated by commas, the first of which names the object, as in the authors' `synonyms.txt`.

    Raises ValueError where a name is given to two objects.
    """
    names: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        own = [name.strip() for name in line.split(",") if name.strip()]
        for name in own:
            if names.setdefault(name, own[0]) != own[0]:
                raise ValueError(f"{path}: {name!r} stands for both {names[name]!r} and {own[0]!r}")
    return names


def mentions(text: str, vocabulary: Vocabulary) -> list[str]:
    """The objects that a text mentions, in its order, each mention counted; where names overlap, the longest counts ("hot dog" is no
    dog).
    """
    said, longest = words(text), max(map(len, vocabulary), default=0)
    found: list[str] = []
    place = 0
    while place < len(said):
        sizes = (size for size in range(min(longest, len(said) - place), 0, -1) if tuple(said[place : place + size]) in vocabulary)
        size = next(sizes, 0)
        if size and vocabulary[tuple(said[place : place + size])]:
            found.append(vocabulary[tuple(said[place : place + size])])
        place += size or 1
    return found


def chair_rule(vocabulary: Vocabulary) -> Rule:
    """A description is right if it mentions no object but the example's answers (1 - CHAIR_s is the mean); `part` of `whole`: the
    mentions that are hallucinated, of all (CHAIR_i is the ratio of their sums); valid if it mentions any object.
    """

    def judge(answer: str, example: Example) -> Judgement:
        mentioned = mentions(answer, vocabulary)
        false = sum(name not in example.answers for name in mentioned)
        return Judgement(float(false == 0), bool(mentioned), part=float(false), whole=float(len(mentioned)))

    return judge


def objects_in(texts: Iterable[str], vocabulary: Vocabulary) -> set[str]:
    """All objects that any of the texts mentions."""
    return {name for text in texts for name in mentions(text, vocabulary)}


def words(text: str) -> list[str]:
    """The words in small letters."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)?", text.lower())


@cache
def _engine() -> Any:
    import inflect

    return inflect.engine()
