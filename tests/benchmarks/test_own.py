"""POPE and CHAIR made from a run's own data."""

from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest

from headwise.benchmarks.benchmark import Source
from headwise.benchmarks.hallucination import PER_IMAGE, SETTINGS, pope_examples
from headwise.benchmarks.registry import files_digest, read_questions
from headwise.data import DataSource, write_data
from headwise.examples import read_examples

OBJECTS_OF = {
    "1.jpg": ["dog", "ball", "tree"],
    "2.jpg": ["dog", "ball"],
    "3.jpg": ["dog", "ball", "car"],
    "4.jpg": ["cat"],
    "5.jpg": ["car", "road"],
    "6.jpg": ["car", "road", "cat"],
}


def absent(setting: str, image: str, seed: int = 0) -> list[str]:
    """The objects that a setting asks for although they are not there."""
    found = [e for e in pope_examples(OBJECTS_OF, seed, "") if (e.task, e.image, e.answers) == (setting, image, ("no",))]
    return [e.question.removeprefix("Is there a ").removeprefix("Is there an ").removesuffix(" in the image?") for e in found]


def test_each_image_is_asked_for_as_much_that_is_there_as_that_is_not() -> None:
    examples = pope_examples(OBJECTS_OF, 0, "")
    for (_, image, answer), number in Counter((e.task, e.image, e.answers[0]) for e in examples).items():
        assert number == min(PER_IMAGE, len(OBJECTS_OF[str(image)])), (image, answer)
    for example in examples:
        own = OBJECTS_OF[str(example.image)]
        named = example.question.split()[3].rstrip("?")
        assert (named in own) is (example.answers == ("yes",)) and (example.phrase == named) is (named in own)
    assert {example.task for example in examples} == set(SETTINGS) and len({e.id for e in examples}) == len(examples)


def test_popular_ones_are_the_commonest_and_adversarial_ones_stand_beside_the_images_own() -> None:
    """Counts: dog, ball, car 3, cat, road 2, tree 1. Beside a car and a road: cat twice, dog and ball once (with the car), tree never."""
    assert absent("popular", "5.jpg") == ["ball", "dog"]
    assert absent("adversarial", "5.jpg") == ["cat", "ball"]
    assert absent("popular", "4.jpg") == ["ball"] and absent("adversarial", "4.jpg") == ["car"]
    drawn = {tuple(absent("random", "5.jpg", seed)) for seed in range(20)}
    assert len(drawn) > 5 and {name for names in drawn for name in names} == {"dog", "ball", "cat", "tree"}


def test_an_image_with_every_object_has_no_question() -> None:
    assert {e.image for e in pope_examples({"1.jpg": ["dog", "cat"], "2.jpg": ["dog"]}, 0, "")} == {"2.jpg"}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "images"
    write_data(DataSource(calibration=2, evaluation=12, forgetting=2), folder, lambda _done, _all: None)
    return folder


def test_scenes_are_asked_about_their_held_out_images_alone(scenes: Path) -> None:
    evaluated = {example.image for example in read_examples(scenes, "evaluation")}
    pope, coco = (read_questions(Source(name=name), scenes) for name in ("pope", "coco"))
    assert {example.image for example in coco.examples} == evaluated and {example.image for example in pope.examples} <= evaluated
    assert {example.task for example in pope.examples} == set(SETTINGS)
    assert Counter(e.answers for e in pope.examples)["yes",] == Counter(e.answers for e in pope.examples)["no",]
    assert files_digest(Source(name="pope")) == ""


def test_scenes_own_captions_hallucinate_nothing_and_those_of_other_images_do(scenes: Path) -> None:
    coco = read_questions(Source(name="coco"), scenes)
    judge = coco.askings["chair"].rule
    assert judge is not None
    captions = {example.image: example.answers[0] for example in read_examples(scenes, "evaluation") if example.task == "caption"}
    for example in coco.examples:
        own = judge(captions[example.image], example)
        assert own.right == 1 and own.valid and own.whole, captions[example.image]
    pairs = [(one, other) for one, other in permutations(coco.examples, 2) if one.image != other.image]
    strangers = [judge(captions[other.image], one) for one, other in pairs]
    assert sum(judged.part or 0 for judged in strangers) > 0.7 * sum(judged.whole or 0 for judged in strangers)


def test_data_without_objects_have_neither(tmp_path: Path, scenes: Path) -> None:
    (tmp_path / "index.parquet").write_bytes((scenes / "index.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"no objects\.parquet, so no object is known to ask about"):
        read_questions(Source(name="pope"), tmp_path)
