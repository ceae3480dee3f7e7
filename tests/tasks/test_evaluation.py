"""The evaluation step on a tiny model and data set in a folder."""

import json
import shutil

import pytest

from headwise.calibration.adapter import write_adapter
from headwise.calibration.lora import fit_lora
from headwise.calibration.settings import Lora
from headwise.evaluation.compare import compare
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.statistics import Statistics
from headwise.evaluation.table import ANSWERS, metrics
from headwise.examples import BAD, read_examples
from headwise.files import read_json, read_table
from headwise.observation import Observation
from tasks import evaluation
from tests import tiny
from tests.dataset import write_dataset

SETTINGS = Evaluation(batch_size=4, max_new_tokens=3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, its data, and an adapter that has seen the evaluation captions."""
    folder = tmp_path_factory.mktemp("place")
    images = folder / "data/images"
    write_dataset(images, calibration=1, evaluation=4, forgetting=2)
    tiny.save(tiny.tiny_vlm(), folder / "model")
    lora = Lora(rank=4, alpha=8, learning_rate=0.03, steps=25, batch_size=6)
    fit = fit_lora(tiny.tiny_vlm(), images, read_examples(images, "evaluation"), range(4), lora, lambda done, total: None)
    (folder / "data/adapters/top").mkdir(parents=True)
    write_adapter(fit.config, fit.weights, "model", folder / "data/adapters/top")
    params = {"attention": {"model": "model", "dtype": "float32"}, "evaluation": {"batch_size": 4, "max_new_tokens": 3}}
    (folder / "params.yaml").write_text(json.dumps(params))
    return folder


@pytest.fixture(scope="module")
def evaluated(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for arm in ("base", "top"):
            evaluation.main(["--arm", arm])
    return place / "data/evaluations"


def test_the_step_judges_the_evaluation_and_forgetting_splits(evaluated):
    answers = read_table(evaluated / "base/answers.parquet", ANSWERS)
    assert sorted(answers["split"].unique()) == ["evaluation", "forgetting"] and len(answers) == 18
    assert read_json(evaluated / "base/metrics.json") == metrics(answers)
    assert read_table(evaluated / "base/bad.parquet", BAD).is_empty()
    assert set(read_json(evaluated / "base/manifest.json")["inputs"]) == {"index"}
    assert set(read_json(evaluated / "top/manifest.json")["inputs"]) == {"index", "adapter"}


def test_an_adapter_that_saw_the_captions_gains(evaluated):
    base, top = (read_table(evaluated / arm / "answers.parquet", ANSWERS) for arm in ("base", "top"))
    (captions,) = [
        c for c in compare(base, top, Statistics(bootstrap=200, sign_flips=200)) if (c.split, c.metric) == ("evaluation", "perplexity")
    ]
    assert captions.high < 1 and captions.after < captions.before and captions.num_images == 4
    assert not captions.gain, "four images have 16 signs to flip, so no p-value below 12.5 %"


def test_a_rerun_gives_the_same_bytes(evaluated, place, monkeypatch):
    before = {file.name: file.read_bytes() for file in (evaluated / "base").iterdir()}
    monkeypatch.chdir(place)
    evaluation.main(["--arm", "base"])
    assert {file.name: file.read_bytes() for file in (evaluated / "base").iterdir()} == before


def test_too_many_broken_images_fail_the_step(place, tmp_path):
    images = shutil.copytree(place / "data/images", tmp_path / "images")
    (images / "images/evaluation-0.png").write_bytes(b"")
    with pytest.raises(ValueError, match="3 of 18 examples are bad"):
        evaluation.write_evaluation(images, None, tmp_path / "out", Observation(model=str(place / "model")), SETTINGS)
    assert not (tmp_path / "out").exists()


def test_without_a_forgetting_split_the_evaluation_is_alone(tmp_path):
    write_dataset(tmp_path / "images", evaluation=1, calibration=1)
    assert {example.split for example in evaluation.evaluated(tmp_path / "images")} == {"evaluation"}


def test_an_arm_without_an_adapter_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="data/adapters/topp: the arm has no adapter; base asks the model as it is"):
        evaluation.main(["--arm", "topp"])
