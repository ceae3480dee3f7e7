"""Drawn scenes: their masks, questions and captions are true of the pixels, and the seed decides everything."""

import numpy as np
import pytest

from headwise.compositions import SIZE, SPLIT_SHARES, Composition, split_of
from headwise.scenes import (
    COLOURS,
    DRIFT_COLOURS,
    DRIFT_SHAPES,
    DRIFT_WORDS,
    SHAPES,
    WORDS,
    Figure,
    Plan,
    compose_scene,
    descriptions,
)

SEEDS = range(60)


def scene(seed: int, *, drift: bool = False) -> Composition:
    return compose_scene(np.random.default_rng(seed), "evaluation", drift=drift)


def centre(mask: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return rows.mean(), columns.mean()


def test_the_seed_decides_image_masks_and_questions() -> None:
    first, second = scene(3), scene(3)
    assert first.image.tobytes() == second.image.tobytes()
    assert first.questions == second.questions
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(first.things, second.things, strict=True))
    assert first.image.tobytes() != scene(4).image.tobytes()


@pytest.mark.parametrize("seed", SEEDS)
def test_masks_are_disjoint_and_show_the_colour_that_names_them(seed: int) -> None:
    found = scene(seed)
    pixels = np.asarray(found.image).astype(int)
    assert np.sum([thing.mask for thing in found.things], axis=0).max() == 1
    for thing in found.things:
        assert thing.mask.shape == (SIZE, SIZE)
        assert 100 < thing.mask.sum() < SIZE * SIZE / 6
        if not thing.phrase.startswith("word "):
            colour = np.array(COLOURS[thing.phrase.split()[0]])
            share = (np.abs(pixels[thing.mask] - colour).sum(-1) == 0).mean()
            assert share > 0.3, f"{thing.phrase}: {share:.0%} of its pixels have its colour"


@pytest.mark.parametrize("seed", SEEDS)
def test_answers_hold_in_the_masks(seed: int) -> None:
    found = scene(seed)
    figures = {thing.phrase.split()[1]: centre(thing.mask) for thing in found.things if not thing.phrase.startswith("word ")}
    number = sum(not thing.phrase.startswith("word ") for thing in found.things)
    for question in found.questions:
        words = question.question.rstrip("?").split()
        if question.task == "relation":
            assert bool(figures[words[2]][1] < figures[words[-1]][1]) == (question.answer == "left")
        elif question.task == "position":
            axis, sign = {"left": (1, 1), "right": (1, -1), "top": (0, 1), "bottom": (0, -1)}[words[-1]]
            assert min(figures, key=lambda shape: sign * figures[shape][axis]) == question.answer
        elif question.task == "count":
            assert question.answer == str(number)
        elif question.task == "exists":
            asked = " ".join(words[-2:])
            assert (asked in {thing.phrase for thing in found.things}) is (question.answer == "yes")
        elif question.task == "word":
            assert any(thing.phrase == f"word {question.answer}" for thing in found.things)


def test_the_first_question_asks_for_the_caption_and_names_every_thing() -> None:
    for seed in SEEDS:
        found = scene(seed)
        assert [q.task for q in found.questions].index("caption") == 0
        caption = found.questions[0].answer
        assert all(thing.phrase.removeprefix("word ") in caption for thing in found.things)


def test_every_kind_of_question_comes_and_yes_is_half() -> None:
    questions = [q for seed in range(400) for q in scene(seed).questions]
    assert {q.task for q in questions} == {
        *("caption", "colour", "shape", "size", "texture", "relation", "position", "exists", "count", "word")
    }
    exists = [q.answer for q in questions if q.task == "exists"]
    assert 0.42 < exists.count("yes") / len(exists) < 0.58


def test_only_the_drift_has_its_names() -> None:
    def words(drift: bool) -> set[str]:
        return {word for seed in range(200) for q in scene(seed, drift=drift).questions for word in q.answer.strip(".").split()}

    new = {*DRIFT_COLOURS, *DRIFT_SHAPES, *DRIFT_WORDS}
    assert not new & words(drift=False)
    assert new <= words(drift=True)
    assert {*COLOURS, *SHAPES, *WORDS} <= words(drift=True)


def test_no_two_splits_share_a_composition(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr("headwise.scenes.split_of", lambda key: drawn.append(key) or split_of(key))
    for split in SPLIT_SHARES:
        for seed in range(20):
            compose_scene(np.random.default_rng(seed), split)
            assert split_of(drawn[-1]) == split
    first, second = Figure("star", "red", "small", "plain", 0, 1), Figure("ring", "blue", "large", "dotted", 2, 2)
    assert Plan((first, second), None).split == Plan((second, first), None).split


def test_what_is_said_of_a_thing_is_one_of_the_known_descriptions() -> None:
    known = descriptions()
    assert len(set(known)) == len(known)
    for seed in SEEDS:
        things = scene(seed).things
        assert {thing.description or thing.phrase for thing in things} <= set(known)
        figures = [thing.description for thing in things if thing.description]
        assert all(int(said.split()[0]) == len(figures) for said in figures if said[0].isdigit())


def test_no_white_figure_stands_beside_a_white_card() -> None:
    scenes = [scene(seed) for seed in range(200)]
    with_word = [found for found in scenes if any(thing.phrase.startswith("word ") for thing in found.things)]
    said = " ".join(f"{q.question} {q.answer}" for found in with_word for q in found.questions)
    assert len(with_word) > 50
    assert "white" not in said
    assert any("white" in q.question for found in scenes for q in found.questions)
