"""Composed photographs from folders of cut-outs and backgrounds made here."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headwise.compositions import SIZE
from headwise.cutouts import BACKGROUND_SHARES, Photographs, background_split, compose_photograph, read_photographs
from headwise.data import DataSource, write_data
from headwise.data import photographs as photographs_of
from headwise.examples import read_examples

NAMES = [f"{colour} {thing}" for colour in ("red", "blue", "green", "pink") for thing in ("apple", "boat", "cat", "drum", "egg", "fork")]


def write_photographs(root: Path) -> Path:
    """Two folders, of cut-outs and of backgrounds."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        pixels = np.zeros((60, 40 + number, 4), dtype=np.uint8)
        pixels[10:50, 5:-5] = (*rng.integers(0, 256, 3), 255)
        path = root / "cutouts" / "kitchen" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        path.with_suffix(".txt").write_text(f"A {name}.\nfr.utf8=autre chose\n")
    for number in range(10):
        path = root / "backgrounds" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (200, 300, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below a folder whose name says nothing about what they show."""
    return write_photographs(tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="module")
def photographs(root: Path) -> Photographs:
    return read_photographs(root / "cutouts", root / "backgrounds")


def test_names_come_from_the_caption_without_its_article(photographs: Photographs) -> None:
    assert {cutout.name for cutout in photographs.cutouts} == set(NAMES)


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("A dumper. It carries its load in the front.", "dumper"),
        ("An “odd” thing", None),
        ("Eat your broccoli!", None),
        ("A ripe, red tomato!", None),
        ("The very long name of something", None),
        ("Balsam.", "balsam"),
    ],
)
def test_sentences_are_no_names(tmp_path: Path, caption: str, name: str | None) -> None:
    from headwise.cutouts import _name

    (tmp_path / "x.txt").write_text(caption)
    assert _name(tmp_path / "x.png") == name


def test_a_file_name_names_where_no_text_does(tmp_path: Path) -> None:
    from headwise.cutouts import _name

    assert _name(tmp_path / "garden_spade.png") == "garden spade"


def test_splits_share_no_background_and_drift_no_name(photographs: Photographs) -> None:
    shared_out = [photographs.split_backgrounds(split) for split in BACKGROUND_SHARES]
    assert all(shared_out)
    assert sorted(path for part in shared_out for path in part) == sorted(photographs.backgrounds)
    known, unknown = photographs.names(drift=False), photographs.names(drift=True)
    assert not set(known) & set(unknown)
    assert sorted(known + unknown) == sorted(NAMES)


DEBIANS = {
    "pretrain": [
        *("Bridge_by_Sander_Klootwijk", "Dragonfly_by_Bolly", "Wine_by_Jakkub_Mede", "aitzgorri_by_Aitzol_Berasategi"),
        *("greentock_by_Peter_Nerlich", "life_by_Aitzol_Berasategi", "picosdeeuropa_by_Aitzol_Berasategi"),
        *("Blinds", "RainDrops", "Storm", "Wood", "YellowFlower"),
    ],
    "calibration": ["free_by_Peter_Nerlich", "friends_by_Aitzol_Berasategi", "umang_by_Abhishek_Mudgal", "GreenMeadow"],
    "evaluation": ["seeding_by_Clements_Engelhardt", "sunset_by_Aitzol_Berasategi", "Aqua", "FreshFlower", "Garden"],
    "forgetting": ["analogpattern_by_Peter_Nerlich", "Dune", "LadyBird", "TwoWings"],
}
"""The photographs of lomiri-wallpapers-16.04 and mate-backgrounds as the weights in the repository were trained on them, or not."""


@pytest.mark.parametrize("split", DEBIANS)
def test_the_trained_weights_never_saw_a_held_out_background(split: str) -> None:
    assert {background_split(f"{name}.jpg") for name in DEBIANS[split]} == {split}


def test_more_photographs_move_none_to_another_split(photographs: Photographs) -> None:
    fewer = replace(photographs, backgrounds=photographs.backgrounds[::2])
    for split in BACKGROUND_SHARES:
        assert set(fewer.split_backgrounds(split)) == set(photographs.split_backgrounds(split)) & set(fewer.backgrounds)


def test_a_split_without_a_photograph_is_named(photographs: Photographs, tmp_path: Path) -> None:
    names = [name for name in (f"{number}.jpg" for number in range(24)) if background_split(name) != "evaluation"]
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"none of the {len(names)} photographs falls to evaluation \("):
        read_photographs(photographs.cutouts[0].path.parent, tmp_path)


def test_the_digest_sees_pictures_and_names(photographs: Photographs) -> None:
    first = photographs.cutouts[0]
    others = [
        replace(photographs, backgrounds=photographs.backgrounds[1:]),
        replace(photographs, cutouts=(replace(first, name="x"), *photographs.cutouts[1:])),
        replace(photographs, cutouts=(replace(first, path=photographs.cutouts[1].path), *photographs.cutouts[1:])),
    ]
    assert len({photographs.digest(), *(other.digest() for other in others)}) == 4
    assert replace(photographs).digest() == photographs.digest()


def test_answers_hold_in_the_masks_and_the_seed_decides(photographs: Photographs) -> None:
    for seed in range(40):
        found = compose_photograph(photographs, "pretrain", np.random.default_rng(seed))
        again = compose_photograph(photographs, "pretrain", np.random.default_rng(seed))
        assert found.image.tobytes() == again.image.tobytes()
        columns = {thing.phrase: np.nonzero(thing.mask)[1].mean() for thing in found.things}
        for question in found.questions:
            if question.task in ("left", "right"):
                pick = min if question.task == "left" else max
                assert pick(columns, key=lambda phrase: columns[phrase]) == question.answer
            elif question.task == "exists":
                asked = question.question.rstrip("?").split(maxsplit=3)[3]
                assert (asked in columns) is (question.answer == "yes")


def test_the_mask_is_where_the_image_changed(photographs: Photographs) -> None:
    found = compose_photograph(photographs, "evaluation", np.random.default_rng(5))
    pixels = np.asarray(found.image).astype(int)
    for thing in found.things:
        assert thing.mask.shape == (SIZE, SIZE)
        inside = pixels[thing.mask]
        assert np.abs(inside - np.median(inside, axis=0)).mean() < 4, "the cut-outs are of one colour, the ground is noise"


def test_what_lies_beneath_is_in_no_mask(photographs: Photographs) -> None:
    beneath = 0
    for seed in range(60):
        masks = [thing.mask for thing in compose_photograph(photographs, "pretrain", np.random.default_rng(seed)).things]
        assert np.sum(masks, axis=0).max() == 1
        whole = [np.ptp(np.nonzero(mask)[0]) * np.ptp(np.nonzero(mask)[1]) for mask in masks]
        beneath += any(mask.sum() < 0.95 * size for mask, size in zip(masks, whole, strict=True))
    assert beneath, "these cut-outs are wide rectangles: some must lie over others"


def test_no_two_splits_share_a_composition(photographs: Photographs) -> None:
    def shown(split: str) -> set[tuple[str, ...]]:
        """What stands from left to right in some compositions."""
        found = [compose_photograph(photographs, split, np.random.default_rng(seed), drift=True).things for seed in range(80)]
        return {tuple(thing.phrase for thing in sorted(things, key=lambda t: np.nonzero(t.mask)[1].mean())) for things in found}

    first, second = shown("pretrain"), shown("evaluation")
    assert len(first) > 5
    assert second
    assert not first & second


def test_pretraining_never_shows_a_drift_name(photographs: Photographs) -> None:
    drift = set(photographs.names(drift=True))
    shown = {
        thing.phrase for seed in range(150) for thing in compose_photograph(photographs, "pretrain", np.random.default_rng(seed)).things
    }
    assert not shown & drift
    drifted = {
        thing.phrase
        for seed in range(150)
        for thing in compose_photograph(photographs, "calibration", np.random.default_rng(seed), drift=True).things
    }
    assert drift <= drifted


def test_any_two_folders_are_a_source_of_data(root: Path, tmp_path: Path) -> None:
    folders = {"cutouts": str(root / "cutouts"), "backgrounds": str(root / "backgrounds")}
    source = DataSource(kind="photos", calibration=2, evaluation=2, forgetting=2, **folders)
    (tmp_path / "data").mkdir()
    assert write_data(source, tmp_path / "data", lambda done, total: None) == {}
    asked = [example for example in read_examples(tmp_path / "data") if example.task in ("left", "right", "name")]
    assert asked
    assert {answer for example in asked for answer in example.answers} <= set(NAMES)
    with pytest.raises(ValueError, match="belong together"):
        photographs_of(DataSource(kind="photos", cutouts=folders["cutouts"]))


def test_too_few_files_name_the_packages(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cut-outs of 0 different names .* apt-get install tuxpaint-stamps-default"):
        read_photographs(tmp_path, tmp_path)


def test_files_of_one_name_are_too_few(root: Path, tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number}.png").touch()
        (tmp_path / f"{number}.txt").write_text("A cat.\n")
    with pytest.raises(ValueError, match=r"cut-outs of [01] different names"):
        read_photographs(tmp_path, root / "backgrounds")
