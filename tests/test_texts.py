"""Texts as data: drawn, asked with and without a chat template, and read from the archive that the movie reviews come in."""

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from flows.arguments import read_arguments, steering_settings
from flows.inspection import try_data
from flows.parameters import Night, Parameters
from headwise import reviews
from headwise.benchmarks.benchmark import Source
from headwise.benchmarks.registry import BENCHMARKS, read_questions
from headwise.data import TEXT_BENCHMARKS, DataSource, write_data
from headwise.evaluation.settings import Evaluation
from headwise.examples import Example, read_examples
from headwise.files import sha256_file
from headwise.leakage import check_text_leaks
from headwise.observation import EMBEDDED, EMBEDDED_TEXT, Observation
from headwise.vlm import encode, generate, load_vlm
from tests import tiny
from tests.flows.project import ROOT

SENTIMENT = "\nIs the sentiment of this review positive or negative? Answer with one word."


def sst2(folder: Path, number: int = 12) -> Path:
    """GLUE's form; the last line stands there twice."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"film {place} is {('dull', 'fine')[place % 2]}\t{place % 2}" for place in range(number)]
    (folder / "dev.tsv").write_text("\n".join(["sentence\tlabel", *lines, lines[-1]]) + "\n")
    return folder


def drawn(source: DataSource, folder: Path) -> list[Example]:
    assert write_data(source, folder, lambda done, total: None) == {}
    return read_examples(folder)


def test_texts_are_one_task_drawn_by_the_seed_and_none_twice(tmp_path: Path) -> None:
    source = DataSource(kind="texts", texts="sst2", path=str(sst2(tmp_path / "files")), calibration=7, evaluation=5)
    found = drawn(source, tmp_path / "one")
    assert [sum(one.split == split for one in found) for split in ("calibration", "evaluation")] == [7, 5]
    assert {one.task for one in found} == {"sst2"} and all(one.image is None for one in found)
    assert len({one.question for one in found}) == 12 and found[0].question.endswith(SENTIMENT)
    assert {one.question.split()[4].partition("\n")[0]: one.answers[0] for one in found} == {"dull": "negative", "fine": "positive"}
    other = drawn(replace(source, seed=1), tmp_path / "two")
    assert {one.id for one in other if one.split == "evaluation"} != {one.id for one in found if one.split == "evaluation"}
    with pytest.raises(ValueError, match=r"sst2: 6 texts for calibration, 7 are asked for: lower images\.calibration"):
        drawn(replace(source, evaluation=6), tmp_path / "three")


def test_sentences_that_a_benchmark_holds_out_are_judged_by_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = frozenset(f"sst2/{number:06d}" for number in (1, 4, 5, 8))
    monkeypatch.setitem(TEXT_BENCHMARKS, "sst2", replace(TEXT_BENCHMARKS["sst2"], held_out=held_out))
    source = DataSource(kind="texts", texts="sst2", path=str(sst2(tmp_path / "files")), calibration=8, evaluation=3)
    found = drawn(source, tmp_path / "one")
    assert all((one.id in held_out) == (one.split == "evaluation") for one in found) and len(found) == 11
    with pytest.raises(ValueError, match=r"sst2: 4 texts for evaluation, 5 are asked for: lower images\.evaluation"):
        drawn(replace(source, evaluation=5), tmp_path / "two")


def test_the_reviews_held_out_are_a_fixed_list() -> None:
    held_out = TEXT_BENCHMARKS["reviews"].held_out
    assert len(held_out) == 2000 and "reviews/000002" not in held_out and max(held_out) < "reviews/009023"
    assert sha256_file(ROOT / "headwise/benchmarks/reviews_test.txt") == "b7b0b50a649479186157808d063745104f6516c0383493fbfe3babe5d87faab8"


def test_texts_to_calibrate_with_are_not_judged_as_a_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(sst2(tmp_path / "files"))
    found = drawn(DataSource(kind="texts", texts="sst2", path=path, calibration=7, evaluation=5), tmp_path / "data")
    judged = read_questions(Source(name="sst2", path=path), tmp_path / "data").examples
    calibrated = sorted(one.id for one in found if one.split == "calibration")
    with pytest.raises(ValueError, match=rf"7 texts to calibrate with are texts of the benchmark sst2: .*{calibrated[0]}"):
        check_text_leaks([one for one in found if one.split == "calibration"], judged, "of the benchmark sst2")
    held_out = frozenset(one.id for one in found if one.split == "evaluation")
    monkeypatch.setitem(BENCHMARKS, "sst2", replace(BENCHMARKS["sst2"], held_out=held_out))
    judged = read_questions(Source(name="sst2", path=path), tmp_path / "data").examples
    assert {one.id for one in judged} == held_out
    check_text_leaks([one for one in found if one.split == "calibration"], judged, "of the benchmark sst2")


def test_a_run_on_texts_needs_no_mask_model_and_asks_as_the_model_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path, model = str(sst2(tmp_path / "files")), str(tiny.save(tiny.new_tiny_lm(), tmp_path / "model"))
    parameters = Parameters(
        images=DataSource(kind="texts", texts="sst2", path=path, calibration=7, evaluation=5),
        attention=Observation(model=model),
        benchmarks=(Source(name="sst2", path=path),),
        arms=("zero",),
    )
    asked = parameters.as_params()
    assert asked["images"]["prompt"] == SENTIMENT and asked["benchmarks"]["sst2"]["prompt"] is None and asked["mask_weights"] == {}
    bare = replace(parameters, attention=replace(parameters.attention, chat_template=False)).as_params()
    assert bare["images"]["prompt"] == bare["benchmarks"]["sst2"]["prompt"] == "\nSentiment:"
    trial = try_data(Night(images=parameters.images), lambda done, total: None)
    assert trial.rows == [("calibration", "sst2", "7", "7", "-"), ("evaluation", "sst2", "5", "5", "-")] and trial.refusals == []


def test_arms_that_would_change_nothing_measured_are_refused() -> None:
    for arm in ("act", "zero-key", "auto-pasta", "label-bias", "temperature"):
        with pytest.raises(ValueError, match=f"arms {arm}: they change how labels are told apart and no free answer"):
            Parameters(arms=("zero", arm))
        labelled = Parameters(arms=("zero", arm), evaluation=Evaluation(closed="labels"))
        with pytest.raises(ValueError, match=f"arms {arm}: they change how labels are told apart, and benchmarks"):
            replace(labelled, benchmarks=(Source(name="pope"),))


def test_the_comparison_asks_a_model_as_suits_the_data(tmp_path: Path) -> None:
    text, other, seen = (
        read_arguments(data, model, "zero", steering_settings(data, model))
        for data, model in (
            (f"sst2={tmp_path}", EMBEDDED_TEXT),
            (f"sst2={tmp_path}", "someone/a-model"),
            ("scenes", EMBEDDED),
        )
    )
    assert (text.attention.chat_template, other.attention.chat_template, seen.attention.chat_template) == (False, True, True)
    assert (text.images.evaluation, seen.images.evaluation) == (1200, DataSource().evaluation)
    for one in (text, other, seen):
        assert one.attention.dtype == "float32" and one.evaluation.closed == "labels" and one.statistics.margin == 0.01


def archive(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def test_the_reviews_are_taken_out_of_the_pinned_archive_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="the movie reviews are not there; `make reviews` downloads them"):
        reviews.reviews_folder()
    inner = archive(f"{reviews.FOLDER}/{reviews.REVIEWS}", b"1\t2.27\tThe Rock is new.\n")
    outer = archive(reviews.INNER, inner)
    (tmp_path / reviews.ARCHIVE).write_bytes(outer)
    with pytest.raises(ValueError, match="delete it and run `make reviews`"):
        reviews.reviews_folder()
    monkeypatch.setattr(reviews, "SHA256", hashlib.sha256(outer).hexdigest())
    folder = reviews.reviews_folder()
    assert (folder / reviews.REVIEWS).read_text() == "1\t2.27\tThe Rock is new.\n"
    (tmp_path / reviews.ARCHIVE).unlink()
    assert reviews.reviews_folder() == folder


def test_without_a_chat_template_the_prompt_is_the_text_itself(tmp_path: Path) -> None:
    folder = tiny.save(tiny.new_tiny_lm(), tmp_path / "model")
    bare, chat = (load_vlm(folder, dtype="float32", chat_template=chat_template) for chat_template in (False, True))
    ids = encode(bare, [None], ["a film\nSentiment:"]).inputs["input_ids"][0].tolist()
    assert (
        ids
        == bare.tokenizer("a film\nSentiment:")["input_ids"]
        != encode(chat, [None], ["a film\nSentiment:"]).inputs["input_ids"][0].tolist()
    )
    assert isinstance(generate(bare, [None], ["a film\nSentiment:"], 2)[0], str)
    seeing = tiny.save(tiny.new_tiny_vlm(), tmp_path / "seeing")
    with pytest.raises(ValueError, match="chat_template = false is for text alone"):
        load_vlm(seeing, chat_template=False)


@pytest.mark.slow
def test_the_embedded_language_model_goes_on_with_english() -> None:
    vlm = load_vlm(EMBEDDED_TEXT, chat_template=False)
    assert (vlm.num_layers, vlm.num_heads, vlm.num_kv_heads) == (30, 9, 3)
    assert "Paris" in generate(vlm, [None], ["The capital of France is"], 8)[0]
