"""The ZeroTuning and evaluation steps on a tiny model that sees and a data set in a folder."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from pydantic import TypeAdapter

from headwise.calibration.adapter import attached, load_calibrated, parameter_count
from headwise.calibration.steering import read_readout, read_steering
from headwise.calibration.zerotuning.schema import HEADS, TRIALS
from headwise.calibration.zerotuning.settings import ZeroTuning
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.table import BASE, read_answers
from headwise.examples import open_image, read_examples, write_examples
from headwise.files import read_json, read_table
from headwise.labels import score_labels, tokenised
from headwise.observation import Observation
from headwise.report.page import write_report
from headwise.vlm import load_vlm
from tasks import evaluation, zerotuning
from tests import tiny
from tests.dataset import write_dataset
from tests.tiny import NUM_HEADS, NUM_LAYERS

SETTINGS = ZeroTuning(examples=9, shares=(0.2, 0.5), up=(2.0, 8.0), down=(0.5,))
CHANGES = {"zero": {}, "act": {"operator": "sinks", "up": [], "down": [0.5]}, "label-bias": {"readout": "bias"}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_dataset(folder / "data/images", calibration=6, evaluation=4)
    tiny.save(tiny.tiny_vlm(), folder / "model")
    params = {
        "attention": {"model": "model", "dtype": "float32", "batch_size": 4},
        "steering_changes": CHANGES,
        "zerotuning": TypeAdapter(ZeroTuning).dump_python(SETTINGS, mode="json"),
        "evaluation": TypeAdapter(Evaluation).dump_python(Evaluation(closed="labels", batch_size=3)),
        "statistics": {},
    }
    (folder / "params.yaml").write_text(json.dumps(params))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for arm in CHANGES:
            zerotuning.main(["--arm", arm])
        for arm in (BASE, *CHANGES):
            evaluation.main(["--arm", arm])
        yield folder


def test_the_step_writes_a_whole_folder_and_the_same_bytes_again(place: Path) -> None:
    folder = place / "data/adapters/zero"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    zerotuning.main(["--arm", "zero"])
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert set(before) == {
        *(
            "adapter_config.json",
            "steering.safetensors",
            "calibration.json",
            "manifest.json",
            "heads.parquet",
            "trials.parquet",
            "bad.parquet",
        )
    }
    claims, trials = read_json(folder / "calibration.json"), read_table(folder / "trials.parquet", TRIALS)
    heads = read_table(folder / "heads.parquet", HEADS)
    assert len(heads) == NUM_LAYERS * NUM_HEADS and claims["heads"] == (heads["gamma"] != 1).sum() > 0
    assert claims["parameters"] == parameter_count(folder) and claims["first_token"] == "<|im_start|>" and claims["examples"] == 9
    best = trials.filter("kept").row(-1, named=True)
    assert (claims["direction"], claims["share"], claims["gamma"]) == (best["direction"], best["share"], best["gamma"])
    assert best["nats"] < trials["nats"][0] and claims["forward_equivalents"]["profile"] == 3
    assert str(place) not in "".join(file.read_text() for file in folder.glob("*.json"))


def test_a_loaded_folder_answers_as_the_evaluation_did_and_comes_off_again(place: Path) -> None:
    vlm = load_vlm(place / "model", dtype="float32")
    asked = [one for one in read_examples(place / "data/images") if one.split == "evaluation" and one.task == "colour"]
    labels = tokenised(vlm, ("blue", "green", "red"))

    def likely() -> torch.Tensor:
        images = [open_image(place / "data/images", one) for one in asked]
        with torch.no_grad():
            return score_labels(vlm, images, [one.question for one in asked], labels).log_probs

    plain = likely()
    with attached(vlm, place / "data/adapters/zero"):
        steered = likely()
    assert torch.equal(likely(), plain) and not torch.equal(steered, plain)
    assert parameter_count(place / "data/adapters/zero") == NUM_LAYERS * NUM_HEADS
    answers = read_answers(place / "data", "zero").filter(pl.col("task") == "colour").sort("example_id")
    right = [labels.words.index(one.answers[0]) for one in sorted(asked, key=lambda one: one.id)]
    order = sorted(range(len(asked)), key=lambda at: asked[at].id)
    nats = -steered.log_softmax(-1)[order][range(len(asked)), right]
    np.testing.assert_allclose(answers["nats"].to_numpy(), nats.numpy(), atol=1e-4)
    assert answers["answer"].to_list() == [labels.words[place] for place in steered[order].argmax(-1).tolist()]


def test_controls_and_comparisons_change_what_they_say(place: Path) -> None:
    vlm = load_vlm(place / "model", dtype="float32")
    bias, act = place / "data/adapters/label-bias", place / "data/adapters/act"
    assert not read_steering(vlm, bias).strength.any() and set(read_readout(bias).bias) == {"colour", "count"}
    assert read_steering(vlm, act).operator == "sinks" and read_readout(act).bias == {}
    base, biased = (read_answers(place / "data", arm).drop_nulls("right") for arm in (BASE, "label-bias"))
    assert not np.allclose(base["nats"].to_numpy(), biased["nats"].to_numpy())
    captions = [read_answers(place / "data", arm).filter(pl.col("task") == "caption")["nats"].to_list() for arm in (BASE, "label-bias")]
    assert captions[0] == captions[1]


def test_the_report_shows_what_was_steered(place: Path, tmp_path: Path) -> None:
    page = write_report(place, tmp_path / "report", {}).read_text(encoding="utf-8")
    claims = read_json(place / "data/adapters/zero/calibration.json")
    assert f"in {claims['heads']} of {NUM_LAYERS * NUM_HEADS} heads, chosen by the likelihood of the right labels on 9 calibration" in page
    assert "charts/steered-light.png" in page and "What the arm zero tried" in page and "Steering, arm by arm" in page
    assert "the model as it is" in page and "label-bias" in page


def test_what_cannot_generate_is_refused_where_it_would_have_to(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sinks is steered in passes without a cache alone, so the model cannot generate"):
        load_calibrated("model", place / "data/adapters/act")
    examples = write_dataset(tmp_path / "images", calibration=6, evaluation=4)
    free = [replace(one, id=f"{one.id}-free", task="name", answers=(f"name {n}",)) for n, one in enumerate(examples)]
    write_examples([*examples, *free], tmp_path / "images")
    observed, settings = Observation(model="model", dtype="float32"), replace(SETTINGS, operator="sinks", up=(), down=(0.5,))
    with pytest.raises(ValueError, match="the operator 'sinks' works in passes without a cache alone, and task 'name' is answered freely"):
        zerotuning.calibrate(tmp_path / "images", tmp_path / "act", observed, settings)


def test_data_without_closed_questions_are_refused(place: Path, tmp_path: Path) -> None:
    examples = [one for one in read_examples(place / "data/images") if one.task == "caption"]
    write_examples(examples, tmp_path / "images")
    with pytest.raises(ValueError, match="split 'calibration' has no question with a closed set of answers to calibrate with"):
        zerotuning.calibrate(tmp_path / "images", tmp_path / "out", Observation(model="model", dtype="float32"), SETTINGS)
    assert not (tmp_path / "out").exists()
