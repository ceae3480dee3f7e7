"""Numbers for MLflow and rows for a reader, from the files that stages write."""

from pathlib import Path

import polars as pl

from flows.summaries import stage_metrics, stage_table
from headwise.examples import Example, write_examples
from headwise.files import write_json, write_table
from headwise.scores.schema import HEADS, HEADS_FILE


def test_metrics_are_the_numbers_of_all_json_files_but_the_manifest(tmp_path: Path) -> None:
    write_json({"evaluation": {"perplexity": 9.5, "valid": None}, "name": "x", "layers": [1, 2]}, tmp_path / "metrics.json")
    write_json({"examples": 7}, tmp_path / "manifest.json")
    assert stage_metrics([tmp_path, tmp_path / "missing"]) == {"evaluation.perplexity": 9.5}
    assert stage_table("calibration@top", [tmp_path]) == [{"quantity": "evaluation.perplexity", "value": 9.5}]


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
