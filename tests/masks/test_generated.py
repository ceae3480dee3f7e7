from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headwise.examples import CAPTION, Example
from headwise.masks.annotation import Pictured, Row
from headwise.masks.florence2 import load_florence2
from headwise.masks.generated import GeneratedMasks, asked_text, key_objects, names
from headwise.masks.rle import decode
from headwise.masks.sam2 import Segmenter, load_sam2
from headwise.masks.settings import Grounding, MaskQuality, Masks, Segmentation
from tests.mask_models import CUT, Recorded, digest, florence_model, florence_processor, save_florence, save_sam2

HEIGHT, WIDTH = 48, 64
LENIENT = MaskQuality(min_area=0, max_area=1, min_predicted_iou=0, min_stability=0, min_box_iou=0, max_overlap=1)
SETTINGS = Masks(source="generated", segmentation=Segmentation(dtype="float32", batch_size=2), quality=LENIENT)
GROUND = "<CAPTION_TO_PHRASE_GROUNDING>"


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Segmenter:
    return load_sam2(save_sam2(tmp_path_factory.mktemp("sam2") / "model"), SETTINGS.segmentation)


def example(name: str, question: str = "What is it?", answer: str = "a cat", phrase: str | None = None, task: str = "name") -> Example:
    return Example(name, "images/a.png", None, question, (answer,) if answer else (), phrase, task, "calibration")


def pictured(*examples: Example, seed: int = 0) -> Pictured:
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Pictured(Image.fromarray(pixels), HEIGHT, WIDTH, examples)


def annotator(segmenter: Segmenter, written: Mapping[tuple[str, str], str], settings: Masks = SETTINGS) -> GeneratedMasks:
    return GeneratedMasks(Recorded(florence_model(), florence_processor(), settings.grounding, written), segmenter, settings)


def rows_of(segmenter: Segmenter, shown: Pictured, written: Mapping[str, str], settings: Masks = SETTINGS) -> list[Row]:
    by_image = {(digest(shown.image), prompt): text for prompt, text in written.items()}
    bad: dict[str, str] = {}
    rows = annotator(segmenter, by_image, settings)([shown], bad)
    assert bad == {}
    return rows


def short(rows: Sequence[Row]) -> list[tuple[object, ...]]:
    return [(row["object"], row["phrase"], row["key"], row["reason"]) for row in rows]


CAT, DOG = "a cat<loc_100><loc_100><loc_500><loc_500>", "a dog<loc_600><loc_100><loc_900><loc_900>"


def test_objects_of_the_answer_are_key_and_masks_fill_the_image(segmenter: Segmenter) -> None:
    asked = example("q", "Who sits left of a dog?", "a cat")
    rows = rows_of(segmenter, pictured(asked), {f"{GROUND}Who sits left of a dog? a cat": DOG + CAT})
    assert short(rows) == [(0, "a dog", False, None), (1, "a cat", True, None)]
    assert rows[1]["box"] == pytest.approx((0.1005 * WIDTH, 0.1005 * HEIGHT, 0.5005 * WIDTH, 0.5005 * HEIGHT))
    for row in rows:
        mask = decode(str(row["rle"]), HEIGHT, WIDTH)
        assert mask.any() and row["area"] == pytest.approx(mask.mean())
        assert 0 <= float(str(row["predicted_iou"])) <= 1 and 0 <= float(str(row["stability"])) <= 1
        assert (row["example_id"], row["image"], row["source"]) == ("q", "images/a.png", "florence2+sam2")


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (example("phrase", phrase="the <red> circle"), "the red circle"),
        (example("empty phrase", "Where?", "left", phrase=" <> "), "Where? left"),
        (example("question", "How many dogs?", "two"), "How many dogs? two"),
        (example("caption", "Describe it.", "A cat by a tree.", task=CAPTION), "A cat by a tree."),
        (example("unanswered", "Where is it?", ""), "Where is it?"),
        (example("denied", "Is there a bird?", "No."), None),
        (example("counted", "How many birds are there?", "0"), None),
        (example("not so", "Is the ball red?", "no"), "Is the ball red? no"),
        (example("a number", "What is on the jersey?", "0"), "What is on the jersey? 0"),
        (example("denied with a phrase", "Is there a bird?", "no", phrase="bird"), "bird"),
        (example("wordless", "", ""), ""),
    ],
    ids=lambda value: value.id if isinstance(value, Example) else "",
)
def test_what_is_looked_for(asked: Example, text: str | None) -> None:
    assert asked_text(asked) == text


@pytest.mark.parametrize(
    ("asked", "phrases", "key"),
    [
        (example("answer", "What is left of the dog?", "a black cat"), ["the dog", "cat"], [False, True]),
        (example("question", "How many dogs are there?", "two"), ["dogs", "tree"], [True, False]),
        (example("none", "What colour?", "red"), ["tree"], [False]),
        (example("caption", answer="x", task=CAPTION), ["tree", "dog"], [True, True]),
        (example("no words", "?", "!"), ["tree"], [True]),
        (example("none found", "What?", "a cat"), [], []),
    ],
    ids=lambda value: value.id if isinstance(value, Example) else "",
)
def test_which_objects_are_key(asked: Example, phrases: list[str], key: list[bool]) -> None:
    assert key_objects(asked, phrases, chosen=True) == key


def test_of_a_phrase_everything_found_is_key_unless_florence_chose() -> None:
    asked = example("p", phrase="the cat")
    assert key_objects(asked, ["animal", "An animal"], chosen=True) == [True, True]
    assert key_objects(asked, ["animal", "cat"], chosen=False) == [False, True]
    assert key_objects(asked, [], chosen=True) == []


def test_of_a_phrase_with_a_relation_the_object_that_is_named_first_is_key() -> None:
    asked = example("p", phrase="man left of the bus")
    assert key_objects(asked, ["man", "the bus", "A man"], chosen=True) == [True, False, True]


def test_where_florence_names_what_is_there_a_phrase_without_words_names_none_of_it() -> None:
    assert key_objects(example("p", phrase="🐱"), ["a cat", "a dog"], chosen=False) == [False, False]


def test_words_name_each_other_whole() -> None:
    assert names("a black cat", "The Cat") and names("cat", "a cat on a mat")
    assert not names("a cattle", "cat") and not names("", "cat") and not names("the", "the cat")
    assert names("红色的猫", "猫") and not names("红色的猫", "狗")
    assert names("un café", "cafe\u0301") and not names("café", "cafe")
    assert not names("बिल", "बोल")


def test_zero_boxes_are_a_row_with_the_reason(segmenter: Segmenter) -> None:
    (row,) = rows_of(segmenter, pictured(example("q")), {})
    assert (row["object"], row["key"], row["rle"], row["height"]) == (None, False, None, HEIGHT)
    assert str(row["reason"]).startswith("nothing found: Florence-2 wrote no box")


def test_nothing_that_is_meant_among_what_was_found_is_a_row_too(segmenter: Segmenter) -> None:
    rows = rows_of(segmenter, pictured(example("q", "What colour?", "red")), {f"{GROUND}What colour? red": DOG})
    assert short(rows) == [(0, "a dog", False, None), (None, None, False, "nothing found: nothing that is meant among a dog")]


def test_an_answer_that_was_cut_off_says_so_beside_what_was_read(segmenter: Segmenter) -> None:
    rows = rows_of(segmenter, pictured(example("q", phrase="a cat")), {f"{GROUND}a cat": CAT + "a cat<loc_1>" + CUT})
    reason = "cut off: Florence-2's answer is longer than max_new_tokens = 512"
    assert short(rows) == [(0, "a cat", True, None), (None, None, False, reason)]


def test_phrases_that_the_processor_bans_are_no_objects(segmenter: Segmenter) -> None:
    asked = example("q", "How many cats are in the image?", "two")
    text = CAT + "the image<loc_0><loc_0><loc_999><loc_999>"
    rows = rows_of(segmenter, pictured(asked), {f"{GROUND}How many cats are in the image? two": text.replace("a cat", "cats")})
    assert short(rows) == [(0, "cats", True, None)]


def test_a_denied_object_is_not_looked_for(segmenter: Segmenter) -> None:
    (row,) = rows_of(segmenter, pictured(example("q", "Is there a dog?", "no")), {f"{GROUND}Is there a dog? no": DOG})
    assert str(row["reason"]).startswith("no object is meant:")


def test_boxes_outside_the_image_are_cut_or_dropped_with_the_reason(segmenter: Segmenter) -> None:
    text = "a cat<loc_500><loc_500><loc_1500><loc_1200><loc_1100><loc_100><loc_1300><loc_300><loc_7><loc_9><loc_7><loc_400>"
    rows = rows_of(segmenter, pictured(example("q", phrase="a cat")), {f"{GROUND}a cat": text})
    assert [row["reason"] for row in rows] == [None, "the box has no area in the image", "the box has no area in the image"]
    assert rows[0]["box"] == pytest.approx((0.5005 * WIDTH, 0.5005 * HEIGHT, WIDTH, HEIGHT))
    assert rows[1]["rle"] is None and all(row["key"] for row in rows)


def test_masks_that_repeat_a_better_one_of_the_phrase_are_dropped(segmenter: Segmenter) -> None:
    twice = "the cat<loc_100><loc_100><loc_500><loc_500>" + CAT
    asked = pictured(example("q", phrase="cat"))
    strict = replace(SETTINGS, quality=replace(LENIENT, max_overlap=0.9))
    found = rows_of(segmenter, asked, {f"{GROUND}cat": twice + CAT.replace("a cat", "an animal")}, strict)
    assert [row["reason"] for row in found] == [None, "repeats object 0: their IoU is 1, more than max_overlap = 0.9", None]


def test_every_gate_is_applied(segmenter: Segmenter) -> None:
    shown, written = pictured(example("q", phrase="a cat")), {f"{GROUND}a cat": CAT}
    for gate in ("min_predicted_iou", "min_stability", "min_box_iou", "min_area"):
        (row,) = rows_of(segmenter, shown, written, replace(SETTINGS, quality=replace(LENIENT, **{gate: 1.0})))
        assert f"less than {gate} = 1" in str(row["reason"])
        assert row["rle"] is not None


def test_without_words_the_model_s_own_caption_is_grounded(segmenter: Segmenter) -> None:
    written = {"<CAPTION>": "</s><s>A dog.</s>", f"{GROUND}A dog.": DOG}
    assert short(rows_of(segmenter, pictured(example("q", "", "")), written)) == [(0, "a dog", True, None)]


def test_detection_names_what_is_there_and_words_choose(segmenter: Segmenter) -> None:
    settings = replace(SETTINGS, grounding=Grounding(task="detection"))
    examples = (example("cat", "What is it?", "cat"), example("dog", phrase="dog"), example("no", "Any bird?", "no"))
    rows = rows_of(segmenter, pictured(*examples), {"<OD>": DOG + CAT}, settings)
    assert [(row["example_id"], row["phrase"], row["key"]) for row in rows] == [
        ("cat", "a dog", False),
        ("cat", "a cat", True),
        ("dog", "a dog", True),
        ("dog", "a cat", False),
        ("no", None, False),
    ]


def test_an_image_is_embedded_once_and_a_shared_text_read_once(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded: list[int] = []
    read: list[str] = []
    embed, write = type(segmenter).embed, Recorded._write_batch

    def counted(self: Segmenter, images: Sequence[Image.Image]) -> object:
        embedded.append(len(images))
        return embed(self, images)

    def noted(self: Recorded, images: list[Image.Image], prompts: list[str]) -> list[str]:
        read.extend(prompts)
        return write(self, images, prompts)

    monkeypatch.setattr(type(segmenter), "embed", counted)
    monkeypatch.setattr(Recorded, "_write_batch", noted)
    rows_of(
        segmenter, pictured(*(example(f"q{n}", phrase="a cat") for n in range(5)), example("d", phrase="a dog")), {f"{GROUND}a cat": CAT}
    )
    assert embedded == [1] and sorted(read) == [f"{GROUND}a cat", f"{GROUND}a dog"]


def test_windows_of_many_images_give_what_each_alone_gives(segmenter: Segmenter) -> None:
    window = [pictured(example(f"q{n}", phrase="a cat"), example(f"r{n}", phrase="a dog"), seed=n) for n in range(5)]
    written = {(digest(shown.image), f"{GROUND}a cat"): CAT for shown in window[::2]}
    written |= {(digest(shown.image), f"{GROUND}a dog"): DOG for shown in window[1:]}
    together = annotator(segmenter, written)(window, {})
    alone = [row for shown in window for row in annotator(segmenter, written)([shown], {})]
    assert short(together) == short(alone) and len(together) == 10
    for one, two in zip(together, alone, strict=True):
        if one["rle"] is not None:
            masks = [decode(str(row["rle"]), HEIGHT, WIDTH) for row in (one, two)]
            assert (masks[0] == masks[1]).mean() > 0.999


def test_real_models_with_random_weights_run_end_to_end(segmenter: Segmenter, tmp_path: Path) -> None:
    grounding = Grounding(model="tiny", max_new_tokens=24, num_beams=1, dtype="float32")
    florence2 = load_florence2(save_florence(tmp_path / "florence"), grounding)
    window = [pictured(example(f"q{n}", phrase="a cat"), example(f"c{n}", "", ""), seed=n) for n in range(3)]
    rows = GeneratedMasks(florence2, segmenter, replace(SETTINGS, grounding=grounding))(window, {})
    assert {row["example_id"] for row in rows} == {f"{kind}{n}" for kind in "qc" for n in range(3)}
    assert all((row["rle"] is None) <= (row["reason"] is not None) for row in rows)
