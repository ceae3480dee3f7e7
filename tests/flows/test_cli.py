"""The command: help with examples, and mistakes as one line before anything is imported, started or run."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from flows.cli import app
from headwise.examples import OBJECTS
from headwise.files import write_table
from headwise.masks.rle import encode
from tests.flows.project import ROOT

HEAVY = ("torch", "transformers", "peft", "prefect", "mlflow", "dvc", "matplotlib", "polars")
runner = CliRunner()


def test_the_command_is_imported_at_once() -> None:
    script = f"import flows.cli, sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_flow_is_imported_without_a_model_library() -> None:
    script = f"import flows.nightly, flows.controls, sys; print([n for n in {HEAVY[:3]} + ('mlflow', 'matplotlib') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["run", "annotate", "controls", "heads", "report", "data", "models"])
def test_every_command_has_help_with_examples(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0 and "Examples" in result.output and f"headwise {command}" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--data", "films"], "--data films: neither scenes, photos, a text benchmark=FOLDER, nor a folder"),
        (["run", "--set", "selection.k=many"], "selection.k: Input should be a valid integer"),
        (["run", "--model", "nonsense"], "model 'nonsense': neither"),
        (["ablations", "--arms", "top"], "'top' is no arm of RAH-LoRA: those are rah, "),
        (
            ["run", "--set", "rah_lora.layers=[0.5, 0.2]"],
            "rah_lora: Value error, layers = [0.5, 0.2]: the first share of the",
        ),
        (["controls", "--data", "films"], "data.0: Input should be 'scenes' or 'photos'"),
        (["heads"], "no run: none yet: start with `headwise run`"),
        (["report", "--run", "monday"], "no run named 'monday'; the runs are: none yet"),
        (["models", "./nowhere"], "model './nowhere': neither 'headwise-smol'"),
        (["data", "films"], "--data films: neither"),
    ],
)
def test_bad_input_is_one_line_and_nothing_was_made(project: Path, arguments: list[str], message: str) -> None:
    result = runner.invoke(app, arguments)
    lines = result.output.strip().splitlines()
    assert result.exit_code == 2 and len(lines) == 1 and lines[0].startswith("headwise: ") and message in lines[0]
    assert not (project / ".headwise").exists()


@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_URI", "PREFECT_API_URL"])
def test_a_server_that_does_not_answer_stops_the_run_before_it_exists(
    project: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:9/api")
    result = runner.invoke(app, ["run"])
    assert result.exit_code == 2 and result.output.startswith(f"headwise: {variable} = http://127.0.0.1:9/api: no answer")
    assert len(result.output.strip().splitlines()) == 1 and not (project / ".headwise").exists()


def test_outside_a_checkout_the_command_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["run"])
    assert result.exit_code == 2 and "no dvc.yaml here or above" in result.output


def test_data_shows_what_a_folder_holds_and_what_it_leaves_out(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = [{"id": "b", "image": "0.png"}]
    for number, split in enumerate(["calibration", "calibration", "evaluation", "evaluation"]):
        _draw(folder / f"{number}.png", grey=number)
        rows.append({"image": f"{number}.png", "question": "What colour?", "answer": "red", "phrase": "disc", "split": split})
    (folder / "index.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mask = np.zeros((8, 8), dtype=bool)
    mask[2:6, 2:6] = True
    objects = [{"image": f"{n}.png", "object": 0, "phrase": "disc", "height": 8, "width": 8, "rle": encode(mask)} for n in range(4)]
    write_table(pa.Table.from_pylist(objects, schema=OBJECTS), folder / "objects.parquet", OBJECTS)
    allowed = ["--set", "images.max_bad_share=0.6", "--set", "scores.min_images=2", "--set", "calibration.examples=all"]
    alike = "images to calibrate with are, or look like, images to judge by"

    def data(*arguments: str) -> str:
        return " ".join(runner.invoke(app, ["data", str(folder), *arguments]).output.split())

    assert alike in data(*allowed)
    allowed += ["--set", "images.min_distance=0"]
    shown = data(*allowed)
    assert alike not in shown and "evaluation: shows a gain of 62.6 points" in shown
    assert "with a usable mask" in shown and "calibration vqa 2 2 2" in shown and "evaluation vqa 2 2 -" in shown
    assert "left out: b: no question in the index" in shown
    assert "no adapter can become champion: the evaluation split's captions show 0 images" in shown
    assert "more than max_bad_share" in data()
    assert "scores.min_images = 20" in data(*allowed[:2], *allowed[4:])
    assert "no caption among 2 examples" in data(*allowed[:4])
    objects[1]["phrase"] = "ring"
    write_table(pa.Table.from_pylist(objects, schema=OBJECTS), folder / "objects.parquet", OBJECTS)
    refused = data(*allowed)
    assert "left out: 000002: images/1-" in refused and "no object is 'disc', the image has ['ring']" in refused
    assert "headwise: 1 of 1 examples are bad" in refused, "of its shard"
    objects[1]["phrase"] = "disc"
    write_table(pa.Table.from_pylist(objects, schema=OBJECTS), folder / "objects.parquet", OBJECTS)
    strict = ["--set", "masks.quality.min_area=0.9"]
    assert "0 images of split 'calibration' have a usable mask of a key object" in data(*allowed, *strict)
    (folder / "objects.parquet").unlink()
    made = data(*allowed)
    assert "the data have no masks (objects.parquet or instances.json), so models have to make them; masks.grounding.model: model" in made
    assert "masks.segmentation.model: model 'facebook/sam2.1-hiera-tiny': not a folder" in made
    assert "calibration vqa 2 2 -" in made, "the masks are yet to be made"
    assert "model 'florence-community/Florence-2-base': not a folder, and not to be had" in made
    assert "masks.source = exact, and" in data(*allowed, "--set", "masks.source=exact")


def test_models_lists_the_families() -> None:
    result = runner.invoke(app, ["models"])
    assert result.exit_code == 0 and "fast_vlm" in result.output and "headwise-smol" in result.output


def _draw(path: Path, grey: int) -> None:
    from PIL import Image

    Image.new("L", (8, 8), grey).save(path)
