"""A benchmark asked of a small real model, in shards."""

import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import yaml

from headwise.benchmarks.benchmark import Source
from headwise.evaluation.compare import compare
from headwise.evaluation.conditions import check_conditions
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.statistics import Statistics
from headwise.evaluation.table import ANSWERS, ANSWERS_FILE, Incomplete, answer_folders, read_answers
from headwise.files import MANIFEST, read_json, read_table
from headwise.observation import Observation
from tasks.benchmark import write_benchmark
from tests import tiny
from tests.benchmarks.official import WRITERS

SETTINGS = Evaluation(batch_size=4, max_new_tokens=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.new_tiny_vlm(), tmp_path_factory.mktemp("model"))


def ask(model: Path, name: str, folder: Path, data: Path, number: int = 2, arm: str = "base", **fields: object) -> None:
    observed = Observation(model=str(model), dtype="float32")
    for place in range(number):
        output = data / "benchmarks" / name / arm / f"shard={place:02d}"
        source = Source(name=name, path=str(folder), prompt="", **fields)
        write_benchmark(source, data / "images", None, output, observed, SETTINGS, (place, number))


def test_shards_hold_every_answer_once_and_say_by_which_protocol(model: Path, tmp_path: Path) -> None:
    WRITERS["pope"](tmp_path / "pope")
    ask(model, "pope", tmp_path / "pope", tmp_path)
    answers = read_answers(tmp_path, "base")
    assert len(answers) == 12 == answers["example_id"].n_unique() and set(answers["split"]) == {"pope"}
    assert set(answers["right"]) <= {0, 1} and answers["nats"].null_count() == 0
    folders = answer_folders(tmp_path, "base")
    assert list(folders) == ["pope, shard=00", "pope, shard=01"]
    manifest = read_json(folders["pope, shard=00"] / MANIFEST)
    assert "POPE (Li et al. 2023)" in str(manifest["protocol"]) and manifest["questions"] == 12 and manifest["examples"] == 6
    ask(model, "pope", tmp_path / "pope", tmp_path / "whole", number=1)
    whole = read_answers(tmp_path / "whole", "base")
    assert answers.sort("example_id").select("example_id", "answer", "right").equals(whole.select("example_id", "answer", "right"))


def test_a_shard_that_is_missing_or_cut_is_named(model: Path, tmp_path: Path) -> None:
    WRITERS["pope"](tmp_path / "pope")
    ask(model, "pope", tmp_path / "pope", tmp_path)
    first, second = answer_folders(tmp_path, "base").values()
    content = (second / ANSWERS_FILE).read_bytes()
    (second / ANSWERS_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"shard=01/answers.parquet: not a readable Parquet file"):
        read_answers(tmp_path, "base")
    (second / ANSWERS_FILE).unlink()
    with pytest.raises(Incomplete, match=r"pope/base: 1 of 2 shards have answers"):
        read_answers(tmp_path, "base")
    shutil.rmtree(first)
    with pytest.raises(ValueError, match="no answers of 'base'"):
        read_answers(tmp_path, "base")


def test_two_models_are_compared_setting_by_setting(model: Path, tmp_path: Path) -> None:
    WRITERS["pope"](tmp_path / "pope")
    ask(model, "pope", tmp_path / "pope", tmp_path)
    base = read_answers(tmp_path, "base")
    better = base.with_columns(right=pl.lit(1.0, pl.Float32))
    found = {c.task: c for c in compare(base, better, Statistics(bootstrap=200, sign_flips=200))}
    assert set(found) == {None, "random", "popular", "adversarial"} and all(c.split == "pope" for c in found.values())
    ask(model, "pope", tmp_path / "pope", tmp_path, arm="top", limit=2, number=1)
    with pytest.raises(ValueError, match="source is"):
        check_conditions([tmp_path / "benchmarks/pope" / arm / "shard=00" for arm in ("base", "top")])


def test_boxes_and_descriptions_are_written_and_not_read(model: Path, tmp_path: Path) -> None:
    for name in ("refcoco", "coco"):
        WRITERS[name](tmp_path / name)
        ask(model, name, tmp_path / name, tmp_path, number=1)
    answers = read_answers(tmp_path, "base")
    read = answers.filter(pl.col("nats").is_not_null())
    assert set(read["task"]) == {"caption"} and set(answers["task"]) == {"caption", "chair", "testA"}
    metrics = read_json(tmp_path / "benchmarks/refcoco/base/shard=00/metrics.json")
    assert isinstance(metrics["refcoco"], dict) and metrics["refcoco"]["valid"] == 0 and metrics["refcoco"]["accuracy"] == 0


def test_a_shard_without_a_question_or_with_broken_images_fails_and_says_so(model: Path, tmp_path: Path) -> None:
    WRITERS["textvqa"](tmp_path / "textvqa")
    with pytest.raises(ValueError, match="1 questions are too few for 2 shards; set fewer `shards`, or a higher limit"):
        ask(model, "textvqa", tmp_path / "textvqa", tmp_path)
    next((tmp_path / "textvqa/train_images").iterdir()).write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 1 examples are bad"):
        ask(model, "textvqa", tmp_path / "textvqa", tmp_path, number=1)


def test_a_cut_file_of_answers_is_named(model: Path, tmp_path: Path) -> None:
    WRITERS["textvqa"](tmp_path / "textvqa")
    ask(model, "textvqa", tmp_path / "textvqa", tmp_path, number=1)
    path = tmp_path / "benchmarks/textvqa/base/shard=00" / ANSWERS_FILE
    assert len(read_table(path, ANSWERS)) == 1
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"shard=00.answers\.parquet: not a readable Parquet file"):
        read_answers(tmp_path, "base")
    with pytest.raises(ValueError, match="no answers of 'top'"):
        read_answers(tmp_path, "top")


def test_the_module_runs_in_a_clone(model: Path, tmp_path: Path) -> None:
    WRITERS["sst2"](tmp_path)
    params = {
        "shards": [0],
        "benchmarks": {"sst2": {"name": "sst2", "path": str(tmp_path)}},
        "attention": {"model": str(model), "dtype": "float32"},
        "evaluation": {"max_new_tokens": 2},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    command = [sys.executable, "-m", "tasks.benchmark", "--name", "sst2", "--arm", "base", "--shard", "0"]
    subprocess.run(command, cwd=tmp_path, check=True)
    answers = read_answers(tmp_path / "data", "base")
    assert answers["image"].to_list() == answers["example_id"].to_list() == ["sst2/000000", "sst2/000001"]
    failed = subprocess.run([*command[:-1], "7"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert failed.returncode and failed.stderr.strip().endswith("shard 7 is none of params.yaml's shards [0]")
