"""The profile, RAH-LoRA and head gains steps on a tiny model and data set in a folder."""

import json
from dataclasses import replace

import pytest
from pydantic import TypeAdapter

from headwise.calibration.adapter import load, parameter_count
from headwise.calibration.rah_lora.schema import GAINS, TARGETS
from headwise.calibration.rah_lora.settings import RahLora
from headwise.files import MANIFEST, read_json, read_table, write_json
from headwise.observation import Observation
from headwise.profile.settings import Profile
from headwise.vlm import load_vlm
from tasks import head_gains, profile, rah_lora
from tests import tiny
from tests.dataset import write_dataset

SETTINGS = RahLora(p_isal=40.0, p_caf=20.0, layers=(0.0, 1.0), beta=0.0, delta=1.0)
PROFILE = Profile(examples=5, probes=2, max_new_tokens=3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_dataset(folder / "data/images", calibration=2, evaluation=2)
    tiny.save(tiny.tiny_vlm(), folder / "model")
    observed = {"model": "model", "dtype": "float32", "batch_size": 4}
    params = {
        "head_changes": {"rah": {}, "rah-one-anchor": {"anchors": 1}},
        "rah_lora": TypeAdapter(RahLora).dump_python(SETTINGS),
        "profile": TypeAdapter(Profile).dump_python(PROFILE),
    }
    (folder / "params.yaml").write_text(json.dumps({"attention": observed, **params}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        profile.write_head_profile(profile.IMAGES, profile.PROFILE, Observation(**observed), PROFILE)
        yield folder


def test_the_steps_write_whole_folders_and_the_same_bytes_again(place):
    written = []
    for _ in range(2):
        rah_lora.main(["--arm", "rah"])
        written.append({file.name: file.read_bytes() for file in (place / "data/adapters/rah").iterdir()})
    assert written[0] == written[1]
    tables = {"targets.parquet", "trials.parquet", "curve.parquet"}
    assert set(written[0]) == {"adapter_config.json", "adapter_model.safetensors", "calibration.json", "manifest.json", *tables}
    folder = place / "data/adapters/rah"
    found, targets = read_json(folder / "calibration.json"), read_table(folder / "targets.parquet", TARGETS)
    assert found["targets"] == len(targets) >= found["accepted"] >= 3 and found["rollback_rate"] == 0
    assert found["parameters"] == parameter_count(folder) and found["proof"]["loaded"] == 0 and found["examples"] == 5
    assert str(place) not in "".join(file.read_text() for file in folder.glob("*.json"))
    load(load_vlm(place / "model", dtype="float32"), folder)


def test_an_arm_changes_the_settings_of_the_run(place):
    rah_lora.main(["--arm", "rah-one-anchor"])
    folder = place / "data/adapters/rah-one-anchor"
    assert read_json(folder / "manifest.json")["settings"] == TypeAdapter(RahLora).dump_python(replace(SETTINGS, anchors=1), mode="json")
    assert read_table(folder / "targets.parquet", TARGETS)["anchors"].list.len().max() == 1


def test_the_profile_says_what_it_cost_and_how_the_scores_go_together(place):
    found = read_json(place / "data/profile/profile.json")
    assert found["questions"] == 5 and set(found["isal_caf_rank_correlation"]) == {"absolute", "signed"}
    assert 0 <= found["caf_signed_overlap"] <= 1
    assert found["forward_equivalents"]["causal_flow"] == pytest.approx(3 * 2 / 5)
    assert {file.name for file in (place / "data/profile").iterdir()} == {
        *("bad.parquet", "cosines.safetensors", "heads.parquet", "manifest.json", "profile.json", "sample.parquet")
    }


def test_what_every_head_brings_alone_is_measured(place):
    rah_lora.main(["--arm", "rah"])
    head_gains.main(["--arm", "rah"])
    gains = read_table(place / "data/gains/rah/gains.parquet", GAINS)
    accepted = read_json(place / "data/adapters/rah/calibration.json")["accepted"]
    assert len(gains) == accepted + 1 and gains["layer"].null_count() == 1 and set(gains["examples"]) == {5}
    assert (gains["low"] <= gains["gain"]).all() and (gains["gain"] <= gains["high"]).all() and gains["gain"].abs().min() > 0


def test_a_profile_of_another_revision_is_refused(place, tmp_path):
    manifest = read_json(place / "data/profile" / MANIFEST)
    for file in (place / "data/profile").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_json({**manifest, "model": "another"}, tmp_path / MANIFEST)
    observed = Observation(model="model", dtype="float32")
    with pytest.raises(ValueError, match="made with revision another of the model, model has"):
        rah_lora.calibrate(place / "data/images", tmp_path, tmp_path / "out", observed, SETTINGS)
    assert not (tmp_path / "out").exists()
