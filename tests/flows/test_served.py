"""The registered model as MLflow loads it, near the checkout and far from it."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
from peft import LoraConfig, get_peft_model
from PIL import Image

from headwise.calibration.adapter import load_calibrated, weights_digest
from headwise.calibration.settings import CALIBRATION
from headwise.examples import decode_image
from headwise.files import write_json
from headwise.vlm import generate
from tests import tiny
from tests.flows.project import ROOT

QUESTION = "What colour is it?"
LONGEST_ANSWER = 32


@pytest.fixture(scope="module")
def pyfunc() -> ModuleType:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Any type hint is inferred as AnyType")  # MLflow's words about its own types
        import mlflow.pyfunc

    return mlflow.pyfunc


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory, pyfunc: ModuleType) -> Path:
    """A model folder `base`, an adapter on it, and `model`, what the registry would hold."""
    folder = tmp_path_factory.mktemp("registered")
    tiny.save(tiny.tiny_vlm(), folder / "base")
    config = LoraConfig(r=2, target_modules=r".*language_model\.layers\.\d+\.self_attn\.q_proj", init_lora_weights=False)
    get_peft_model(tiny.new_tiny_vlm().base, config).save_pretrained(folder / "adapter")
    write_json({"base_sha256": weights_digest(tiny.tiny_vlm().base), "dtype": "float32"}, folder / "adapter" / CALIBRATION)
    pyfunc.save_model(
        folder / "model",
        python_model=str(ROOT / "flows" / "served.py"),
        artifacts={"adapter": str(folder / "adapter")},
        model_config={"model": str(folder / "base")},
        pip_requirements=[],
    )
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture that lies on its side and says so, with transparent parts."""
    exif = Image.Exif()
    exif[274] = 6
    image = tiny.image(3).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(tmp_path / "picture.png", exif=exif.tobytes())
    return tmp_path / "picture.png"


def test_it_answers_about_pictures_as_people_have_them_wherever_it_is_loaded(
    registered: Path, picture: Path, pyfunc: ModuleType, tmp_path: Path
) -> None:
    image = decode_image(picture.read_bytes(), "picture.png")
    assert image.size == (90, 120)
    adapted = load_calibrated(str(registered / "base"), registered / "adapter")
    expected = generate(adapted, [image], [QUESTION], LONGEST_ANSWER)
    rows, model = [{"image": str(picture), "question": QUESTION}], str(registered / "model")
    assert pyfunc.load_model(model).predict(rows) == expected
    program = f"from mlflow.pyfunc import load_model; print(load_model({model!r}).predict({rows!r}))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == f"{expected!r}\n", done.stderr


def test_a_base_model_that_got_other_weights_is_refused(registered: Path, pyfunc: ModuleType) -> None:
    tiny.save(tiny.new_tiny_vlm(seed=1), registered / "base")
    with pytest.raises(ValueError, match=r"the weights have sha256 \w+, the adapter was trained on"):
        pyfunc.load_model(str(registered / "model"))
