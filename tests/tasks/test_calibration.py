"""The calibration step on a tiny model and data set in a folder."""

import json

import pytest
from pydantic import TypeAdapter

from headwise.calibration.adapter import load, parameter_count
from headwise.calibration.lora import LOSSES
from headwise.calibration.settings import Lora
from headwise.examples import BAD
from headwise.files import read_json, read_table, write_json
from headwise.observation import Observation
from headwise.selection import Criterion, Selection
from headwise.vlm import load_vlm
from tasks import calibration
from tests import tiny
from tests.dataset import write_dataset

SETTINGS = Lora(rank=2, alpha=4, learning_rate=0.01, steps=3, batch_size=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_dataset(folder / "data/images", calibration=2)
    tiny.save(tiny.tiny_vlm(), folder / "model")
    selection = Selection(arm="top", criterion=Criterion(k=2), layers=(1, 2), num_layers=tiny.NUM_LAYERS)
    (folder / "data/selections/top").mkdir(parents=True)
    write_json(TypeAdapter(Selection).dump_python(selection, mode="json"), folder / "data/selections/top/selection.json")
    params = {"attention": {"model": "model", "dtype": "float32"}, "calibration": TypeAdapter(Lora).dump_python(SETTINGS)}
    (folder / "params.yaml").write_text(json.dumps(params))
    return folder


def test_the_step_writes_a_whole_adapter_and_the_same_bytes_again(place, monkeypatch):
    monkeypatch.chdir(place)
    written = []
    for _ in range(2):
        calibration.main(["--arm", "top"])
        written.append({file.name: file.read_bytes() for file in (place / "data/adapters/top").iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "bad.parquet",
        "calibration.json",
        "losses.parquet",
        "manifest.json",
    }
    folder = place / "data/adapters/top"
    found = read_json(folder / "calibration.json")
    assert (found["layers"], found["examples"], found["bad"]) == ([1, 2], 2, 0)  # the captions alone
    assert found["parameters"] == parameter_count(folder) and found["proof"]["loaded"] == 0.0
    assert len(read_table(folder / "losses.parquet", LOSSES)) == 3 and read_table(folder / "bad.parquet", BAD).is_empty()
    assert str(place) not in "".join(file.read_text() for file in folder.glob("*.json"))
    load(load_vlm(place / "model", dtype="float32"), folder)


def test_a_selection_for_another_model_is_refused(place, tmp_path):
    chosen = read_json(place / "data/selections/top/selection.json") | {"num_layers": 30}
    write_json(chosen, tmp_path / "selection.json")
    with pytest.raises(ValueError, match=r"chosen among 30 layers, .* has 4"):
        calibration.calibrate(place / "data/images", tmp_path / "selection.json", tmp_path / "out", observed(place), SETTINGS)
    assert not (tmp_path / "out").exists()


def test_without_a_calibration_split_there_is_no_adapter(place, tmp_path):
    write_dataset(tmp_path / "images", evaluation=1)
    with pytest.raises(ValueError, match="no example in split 'calibration'"):
        calibration.calibrate(
            tmp_path / "images", place / "data/selections/top/selection.json", tmp_path / "out", observed(place), SETTINGS
        )
    assert not (tmp_path / "out").exists()


def observed(place) -> Observation:
    return Observation(model=str(place / "model"), dtype="float32")
