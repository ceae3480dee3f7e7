import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from headwise.examples import BAD
from headwise.files import read_json, read_table, sha256_file, write_table
from headwise.masks.table import MASKS
from headwise.scores.head_impact import HeadImpact
from headwise.scores.schema import EXAMPLE_SCORES, HEADS
from tasks.scores import write_scores
from tests.synthetic import look_at, mask_frame, mask_row, one_view, square, write_part

GRID = (6, 6)
SETTINGS = HeadImpact(bootstrap=20, min_images=10, max_bad_share=0.2)


def write_inputs(folder: Path) -> dict[str, Path]:
    """Masks and two shards of attention for 14 examples; layer 1 looks at the objects. One more example is observed without a mask."""
    rng = np.random.default_rng(0)
    masks = {f"e{i:02d}": square(GRID, int(rng.integers(5)), int(rng.integers(5)), 2) for i in range(14)}
    maps = {example_id: look_at(mask, GRID, rng, (3, 2)) for example_id, mask in masks.items()}
    maps["x"] = maps["e00"]
    (folder / "masks/shard=00").mkdir(parents=True)
    rows = [mask_row(example_id, mask) for example_id, mask in masks.items()]
    write_table(mask_frame(rows), folder / "masks/shard=00/masks.parquet", MASKS)
    shards = {f"shard={i:02d}": folder / f"attention/shard={i:02d}" for i in range(2)}
    for i, shard in enumerate(shards.values()):
        write_part(shard / "part.parquet", {name: maps[name] for name in sorted(maps)[i::2]}, one_view(*GRID))
    return shards


def test_the_step_writes_scores_of_all_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_inputs(tmp_path)
    write_scores([tmp_path / "masks/shard=00"], list(shards.values()), tmp_path / "scores", SETTINGS)
    heads = read_table(tmp_path / "scores/heads.parquet", HEADS)
    examples = read_table(tmp_path / "scores/examples.parquet", EXAMPLE_SCORES)
    assert set(examples["example_id"]) == {f"e{i:02d}" for i in range(14)}
    impact = heads.filter(pl.col("statistic") == "head_impact")
    assert impact.sort("value", descending=True)["layer"].to_list()[:2] == [1, 1]
    assert read_table(tmp_path / "scores/bad.parquet", BAD)["example_id"].to_list() == ["x"]
    counts = {"observed": 15, "scored": 14, "images": 14, "left_out": {}, "bad": {"missing mask": 1}}
    assert read_json(tmp_path / "scores/tests.json")["examples"] == counts
    assert "warning: 1 examples have no score, missing mask" in capsys.readouterr().out
    manifest = read_json(tmp_path / "scores/manifest.json")
    assert manifest["inputs"] == {
        "masks/shard=00": sha256_file(tmp_path / "masks/shard=00/masks.parquet"),
        **{f"attention/{name}": sha256_file(shard / "part.parquet") for name, shard in shards.items()},
    }


def test_a_second_run_gives_the_same_bytes(tmp_path: Path) -> None:
    shards = write_inputs(tmp_path)
    for name in ("first", "second"):
        write_scores([tmp_path / "masks/shard=00"], list(shards.values()), tmp_path / name, SETTINGS)
    files = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert files == ["bad.parquet", "examples.parquet", "heads.parquet", "manifest.json", "tests.json"]
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards = write_inputs(tmp_path)
    with pytest.raises(ValueError, match=r"no attention of \['shard=07'\]"):
        write_scores([tmp_path / "masks/shard=00"], [*shards.values(), tmp_path / "attention/shard=07"], tmp_path / "scores", SETTINGS)
    assert not (tmp_path / "scores").exists()


def test_too_few_images_leave_no_folder(tmp_path: Path) -> None:
    shards = write_inputs(tmp_path)
    with pytest.raises(ValueError, match=r"14 images \(14 of 15 observed examples\) can be scored, scores.min_images = 20 are needed"):
        write_scores([tmp_path / "masks/shard=00"], list(shards.values()), tmp_path / "scores", HeadImpact(max_bad_share=0.2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attention", "masks"]


def test_scores_and_selection_run_in_a_clone_on_the_shards_of_its_parameters_alone(tmp_path: Path) -> None:
    write_inputs(tmp_path / "data")
    params = {"shards": [0], "scores": {"bootstrap": 20, "min_images": 2, "max_bad_share": 0.2}, "selection": {"k": 1}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    for module in (["tasks.scores"], ["tasks.selection", "--arm", "top"]):
        subprocess.run([sys.executable, "-m", *module], cwd=tmp_path, check=True)
    counts = {"observed": 8, "scored": 7, "images": 7, "left_out": {}, "bad": {"missing mask": 1}}
    assert read_json(tmp_path / "data/scores/tests.json")["examples"] == counts
    selection = read_json(tmp_path / "data/selections/top/selection.json")
    assert selection["layers"] == [1]
    assert selection["scores_sha256"] == sha256_file(tmp_path / "data/scores/heads.parquet")
