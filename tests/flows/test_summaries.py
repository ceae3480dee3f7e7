"""Numbers for MLflow and rows for a reader, from the files that stages write."""

from pathlib import Path

import polars as pl
import pyarrow as pa

from flows.summaries import stage_metrics, stage_table
from headwise.examples import Example, write_examples
from headwise.files import write_json, write_table
from headwise.masks.table import MASKS, MASKS_FILE
from headwise.scores.schema import HEADS, HEADS_FILE


def test_metrics_are_the_numbers_in_the_file_that_the_stage_declares(tmp_path: Path) -> None:
    write_json({"evaluation": {"perplexity": 9.5, "valid": None}, "name": "x", "layers": [1, 2]}, tmp_path / "metrics.json")
    write_json({"parameters": 8, "proof": {"merged": 1e-6}}, tmp_path / "calibration.json")
    for settings in ("manifest.json", "adapter_config.json"):
        write_json({"r": 7}, tmp_path / settings)
    assert stage_metrics("evaluation@top", [tmp_path, tmp_path / "missing"]) == {"evaluation.perplexity": 9.5}
    assert stage_metrics("calibration@top", [tmp_path]) == {"parameters": 8, "proof.merged": 1e-6}
    assert stage_metrics("scores", [tmp_path]) == {}
    assert stage_table("calibration@top", [tmp_path]) == [
        {"quantity": "parameters", "value": 8},
        {"quantity": "proof.merged", "value": 1e-6},
    ]


def test_reasons_that_differ_in_their_numbers_alone_are_one_row(tmp_path: Path) -> None:
    areas = ("0.0009", "5e-05", "1.2e-04")
    reasons = [None, "the mask is empty", *(f"covers {area} of the image, less than min_area = 0.001" for area in areas)]
    row = dict.fromkeys(MASKS.names)
    known = {
        "example_id": "a",
        "object": 0,
        "phrase": "cat",
        "height": 2,
        "width": 2,
        "rle": "04",
        "box": [0.0] * 4,
        "area": 0.5,
        "source": "x",
    }
    rows = [{**row, **{k: v for k, v in known.items() if k in MASKS.names}, "reason": reason} for reason in reasons]
    write_table(pa.Table.from_pylist(rows, schema=MASKS), tmp_path / MASKS_FILE, MASKS)
    found = {row["state"]: row["rows"] for row in stage_table("masks", [tmp_path])}
    assert found == {"usable": 1, "the mask is empty": 1, "covers … of the image, less than min_area = 0.001": 3}


def test_the_images_are_counted_by_split_and_task(tmp_path: Path) -> None:
    examples = [Example(str(i), f"{i // 2}.png", None, "?", ("a",), None, "colour", "evaluation") for i in range(4)]
    write_examples(examples, tmp_path)
    assert stage_table("images", [tmp_path]) == [{"split": "evaluation", "task": "colour", "examples": 4, "images": 2}]


def test_scores_are_means_per_layer(tmp_path: Path) -> None:
    rows = [(layer, head, name, layer + head, 5, None, None) for layer in (0, 1) for head in (0, 1) for name in ("a", "b")]
    write_table(pl.DataFrame(rows, schema=HEADS.names, orient="row"), tmp_path / HEADS_FILE, HEADS)
    assert stage_table("scores", [tmp_path]) == [{"layer": 0, "a": 0.5, "b": 0.5}, {"layer": 1, "a": 1.5, "b": 1.5}]


def test_an_evaluation_has_a_row_per_split_and_task(tmp_path: Path) -> None:
    content = {"evaluation": {"accuracy": 0.5, "n": 4, "tasks": {"colour": {"accuracy": 0.25, "n": 2}}}}
    write_json(content, tmp_path / "metrics.json")
    assert stage_table("evaluation@top", [tmp_path]) == [
        {"split": "evaluation", "task": "all", "accuracy": 0.5, "n": 4},
        {"split": "evaluation", "task": "colour", "accuracy": 0.25, "n": 2},
    ]
