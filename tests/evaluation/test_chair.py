"""CHAIR, by hand."""

from pathlib import Path

import pytest

from headwise.evaluation.chair import chair_rule, mentions, objects_in, read_synonyms, vocabulary_of, with_double_words
from headwise.examples import Example

NAMES = {
    **dict.fromkeys(("person", "man", "woman", "people"), "person"),
    **{name: name for name in ("dog", "hot dog", "bus", "dress", "traffic light", "knife", "sheep")},
    "motor bike": "motorcycle",
}
VOCABULARY = vocabulary_of(NAMES)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A man with a dog.", ["person", "dog"]),
        ("Two men and three women beside buses", ["person", "person", "bus"]),
        ("A hot dog", ["hot dog"]),  # and no dog
        ("Hot dogs for the dogs!", ["hot dog", "dog"]),
        ("a dog, a dog and a Dog", ["dog", "dog", "dog"]),  # each mention counts
        ("His dress is on the bus", ["dress", "bus"]),
        ("traffic lights", ["traffic light"]),
        ("traffic and a light", []),
        ("a motor bike's knives", ["knife"]),  # "bike's" is another word
        ("sheep", ["sheep"]),
        ("doggy", []),
        ("", []),
    ],
)
def test_which_objects_a_text_mentions(text: str, found: list[str]) -> None:
    assert mentions(text, VOCABULARY) == found


@pytest.mark.parametrize(
    ("answer", "there", "judged"),
    [
        ("A man with a dog", ("person", "dog"), (1, True, 0, 2)),
        ("A man with a dog", ("person",), (0, True, 1, 2)),
        ("A dog, a dog and a bus", ("bus",), (0, True, 2, 3)),
        ("A quiet street", ("bus",), (1, False, 0, 0)),  # nothing said, nothing hallucinated, and not valid
        ("People", ("person",), (1, True, 0, 1)),
        ("A dog", (), (0, True, 1, 1)),
        ("", ("bus",), (1, False, 0, 0)),
        ("A hot dog", ("dog",), (0, True, 1, 1)),
    ],
)
def test_hallucinations_by_hand(answer: str, there: tuple[str, ...], judged: tuple[int, bool, int, int]) -> None:
    found = chair_rule(VOCABULARY)(answer, Example("q", "a.jpg", None, "Describe the image.", there, None, "chair", "coco"))
    assert (found.right, found.valid, found.part, found.whole) == judged


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a baby elephant and an adult cat", ["elephant", "cat"]),
        ("a baby with a bear cub", ["person", "bear"]),
        ("a passenger train on a train track", ["train"]),
        ("a passenger jet", ["airplane"]),
        ("two toilet seats", ["toilet"]),
        ("a seat beside the home plate and a plate", ["chair", "plate"]),
        ("a man in a bow tie", ["person", "tie"]),
    ],
)
def test_words_that_mean_something_else_together_as_in_the_authors_program(text: str, found: list[str]) -> None:
    singles = dict.fromkeys(("baby", "adult", "man", "passenger"), "person") | {"jet": "airplane", "seat": "chair", "toilet": "toilet"}
    names = singles | {name: name for name in ("elephant", "cat", "bear", "train", "plate", "tie")}
    assert mentions(text, vocabulary_of(with_double_words(names))) == found


def test_synonyms_are_read_as_the_authors_write_them(tmp_path: Path) -> None:
    file = tmp_path / "synonyms.txt"
    file.write_text("person, girl, boy\ndog, puppy\n\nbus\n", encoding="utf-8")
    names = read_synonyms(file)
    assert names == {"person": "person", "girl": "person", "boy": "person", "dog": "dog", "puppy": "dog", "bus": "bus"}
    assert objects_in(["Two girls", "a puppy"], vocabulary_of(names)) == {"person", "dog"}
    file.write_text("dog, puppy\nwolf, puppy\n", encoding="utf-8")
    with pytest.raises(ValueError, match="'puppy' stands for both 'dog' and 'wolf'"):
        read_synonyms(file)
