import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from headwise.masks.florence2 import BINS, Answer, Florence2, Grounded, cleaned, load_florence2, parse
from headwise.masks.settings import Grounding
from tests.mask_models import POSITIONS, florence_processor, save_florence

PLAIN = Grounding(model="tiny", batch_size=3, num_beams=2, max_new_tokens=12, dtype="float32")
TEXTS = ["a cat", "the red circle left of a large blue square", "dogs", "two small green boats on the sea", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_florence(tmp_path_factory.mktemp("florence") / "model")


@pytest.fixture(scope="module")
def florence2(folder: Path) -> Florence2:
    return load_florence2(folder, PLAIN)


def pictures(number: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40 + 9 * n, 60, 3), dtype=np.uint8)) for n in range(number)]


def box(*places: int) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = ((place + 0.5) / BINS for place in places)
    return (x0, y0, x1, y1)


def marks(*places: int) -> str:
    return "".join(f"<loc_{place}>" for place in places)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("</s><s></s>", []),
        ("</s><s>a cat sits here</s><pad>", []),
        (f"</s><s>a cat{marks(1, 2, 30, 40)}</s><pad>", [("a cat", (1, 2, 30, 40))]),
        (f"a cat{marks(1, 2, 30, 40)} and a dog{marks(5, 6, 7, 8)}", [("a cat", (1, 2, 30, 40)), ("and a dog", (5, 6, 7, 8))]),
        (f"cats{marks(1, 2, 3, 4, 5, 6, 7, 8)}", [("cats", (1, 2, 3, 4)), ("cats", (5, 6, 7, 8))]),
        (f"a cat{marks(1, 2, 3, 4)}a cat{marks(1, 2, 3, 4)}", [("a cat", (1, 2, 3, 4))] * 2),
        (f"a man in a hat{marks(0, 0, 99, 99)}a hat{marks(10, 0, 20, 9)}", [("a man in a hat", (0, 0, 99, 99)), ("a hat", (10, 0, 20, 9))]),
        (f"far{marks(1005, 2, 1200, 999)}", [("far", (1005, 2, 1200, 999))]),
        (f"a cat{marks(1, 2, 3, 4)}a dog{marks(5, 6)}", [("a cat", (1, 2, 3, 4))]),
        (f"cats{marks(1, 2, 3, 4, 5, 6, 7)}", [("cats", (1, 2, 3, 4))]),
        (f"{marks(1, 2, 3, 4)}", [("", (1, 2, 3, 4))]),
        (f"une forêt 🌲{marks(1, 2, 3, 4)}", [("une forêt 🌲", (1, 2, 3, 4))]),
        (f"a leaf<poly>{marks(9, 1, 5, 8, 2, 3)}</poly>", [("a leaf", (2, 1, 9, 8))]),
        (
            f"a leaf<poly>{marks(9, 1, 5, 8)}<sep>{marks(1, 3, 2, 9)}</poly><poly>{marks(3, 3, 4, 4)}</poly>",
            [("a leaf", (1, 1, 9, 9)), ("a leaf", (3, 3, 4, 4))],
        ),
        (f"a leaf<poly>{marks(9, 1, 5, 8, 2)}", []),
        (f"a leaf<poly>{marks(9)}</poly>a cat{marks(1, 2, 3, 4)}", [("a cat", (1, 2, 3, 4))]),
    ],
)  # fmt: skip
def test_what_the_model_writes_is_read_as_phrases_with_boxes(text: str, found: list[tuple[str, tuple[int, ...]]]) -> None:
    assert parse(text) == [Grounded(phrase, box(*places)) for phrase, places in found]


WORD = st.text(alphabet="abc XYZ,.", min_size=1, max_size=8).filter(lambda word: word.strip())
NUMBERS = st.integers(0, 13).filter(lambda number: number == 0 or number >= 4)
"""After one to three places the processor's pattern takes the rest of a mark, such as `loc_7>`, for words of the next phrase."""
PIECE = st.tuples(WORD, NUMBERS.flatmap(lambda number: st.lists(st.integers(0, 999), min_size=number, max_size=number)))


@settings(max_examples=200)
@given(st.lists(PIECE, max_size=5))
def test_the_boxes_are_those_that_the_processors_own_parser_finds(pieces: list[tuple[str, list[int]]]) -> None:
    """On images of 1,000,000 pixels a side its rounding to whole pixels loses nothing."""
    text = "".join(phrase + marks(*places) for phrase, places in pieces)
    side = 1_000_000
    theirs = florence_processor().post_process_generation(f"<s>{text}</s>", task="<CAPTION_TO_PHRASE_GROUNDING>", image_size=(side, side))
    answer = theirs["<CAPTION_TO_PHRASE_GROUNDING>"]
    ours = parse(f"</s><s>{text}</s><pad>")
    assert [found.phrase for found in ours] == answer["labels"]
    assert [[round(part * side) for part in found.box] for found in ours] == answer["bboxes"]


@settings(max_examples=100)
@given(st.text(alphabet="a<>_/locpysend1 é", max_size=40))
def test_no_text_breaks_the_parser(text: str) -> None:
    assert all(len(found.box) == 4 for found in parse(text))


def test_a_text_cannot_hold_the_models_own_marks() -> None:
    assert cleaned("<OD> where is\n<loc_3> it?") == "OD where is loc_3 it?"
    assert cleaned(None) == cleaned(" \n") == cleaned("<>") == ""


@pytest.mark.parametrize("task", ["phrases", "vocabulary", "detection"])
def test_a_real_model_answers_every_text_through_the_true_processor(florence2: Florence2, task: str) -> None:
    asked = replace(florence2, settings=replace(PLAIN, task=task))
    answers = asked.ground(pictures(5), TEXTS)
    assert len(answers) == 5 and all(answer.objects or answer.reason for answer in answers)
    assert len(asked.describe(pictures(2))) == 2


def test_batched_is_one_by_one(tmp_path: Path) -> None:
    florence2 = load_florence2(save_florence(tmp_path / "model", places=True), PLAIN)
    prompts = [f"<CAPTION_TO_PHRASE_GROUNDING>{text}" for text in TEXTS]
    together = florence2.write(pictures(5), prompts)
    alone = [florence2.write([image], [prompt])[0] for image, prompt in zip(pictures(5), prompts, strict=True)]
    assert list(map(parse, together)) == list(map(parse, alone)) and all(map(parse, together))
    assert [text.replace("<pad>", "") for text in together] == [text.replace("<pad>", "") for text in alone]
    assert len(set(together)) > 1, "the weights answer everything alike, so this test shows nothing"


def test_the_precision_is_that_of_the_settings(folder: Path) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        asked = load_florence2(folder, replace(PLAIN, dtype=dtype))
        assert asked.model.dtype == getattr(torch, dtype)
        assert len(asked.ground(pictures(2), TEXTS[:2])) == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "nothing to look for"),
        (" <> ", "nothing to look for"),
        ("word " * 400, rf"text too long: \d+ tokens, Florence-2 reads {POSITIONS - 5 - 32} \(word word"),
        ("语" * 2000, "text too long"),
    ],
)
def test_a_text_that_cannot_be_read_is_an_answer_with_the_reason(florence2: Florence2, text: str, reason: str) -> None:
    empty, other = florence2.ground(pictures(2), [text, "a cat"])
    assert empty.objects == () and empty.reason is not None
    assert re.match(reason, empty.reason)
    assert isinstance(other, Answer) and (other.objects or str(other.reason).startswith(("nothing found", "cut off")))


@pytest.mark.parametrize("text", ["😀🌲", "красный круг", "猫が二匹", "a cat 🐈 and un garçon"])
def test_any_script_is_read(florence2: Florence2, text: str) -> None:
    assert len(florence2.ground(pictures(1), [text])) == 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "processor_config.json"])
def test_a_folder_that_lacks_a_file_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    partial = tmp_path / "partial"
    partial.mkdir()
    for file in folder.iterdir():
        if file.name != name:
            (partial / file.name).symlink_to(file)
    assert (folder / name).is_file()
    with pytest.raises(
        ValueError, match=r"tiny: not a whole Florence-2 of transformers in .*partial|partial: no weights as \*\.safetensors"
    ):
        load_florence2(partial, PLAIN)


def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (pickled / file.name).symlink_to(file)
    torch.save(load_file(folder / "model.safetensors"), pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled: no weights as \*\.safetensors; pickled ones are not read"):
        load_florence2(pickled, PLAIN)


def test_weights_that_lack_a_tensor_are_refused(folder: Path, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    partial.mkdir()
    for file in folder.iterdir():
        (partial / file.name).symlink_to(file)
    weights = load_file(folder / "model.safetensors")
    del weights["model.multi_modal_projector.image_projection.weight"]
    (partial / "model.safetensors").unlink()
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"tiny: the weights lack 1 tensors of Florence-2, the first is model\.multi_modal_projector"):
        load_florence2(partial, PLAIN)
