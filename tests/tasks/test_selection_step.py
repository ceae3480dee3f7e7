from pathlib import Path

import polars as pl
import pytest

from headwise.files import read_json, sha256_file, write_table
from headwise.scores.schema import HEADS
from headwise.selection import Criterion, LayerArm, read_selection
from tasks.selection import choose_layers


def write_heads(folder: Path) -> Path:
    """Six layers of one head, ever better."""
    rows = {"layer": range(6), "head": [0] * 6, "statistic": ["head_impact"] * 6, "value": [i / 10 for i in range(6)], "n": [20] * 6}
    frame = pl.DataFrame(rows).with_columns(low=pl.col("value") - 0.05, high=pl.col("value") + 0.05)
    folder.mkdir()
    write_table(frame, folder / "heads.parquet", HEADS)
    return folder


@pytest.mark.parametrize(("arm", "layers"), [("top", (4, 5)), ("bottom", (0, 1)), ("all", (0, 1, 2, 3, 4, 5))])
def test_the_step_writes_the_chosen_layers(tmp_path: Path, arm: LayerArm, layers: tuple[int, ...]) -> None:
    scores = write_heads(tmp_path / "scores")
    choose_layers(scores, tmp_path / arm, Criterion(k=2), arm)
    selection = read_selection(tmp_path / arm / "selection.json")
    assert (selection.arm, selection.layers, selection.num_layers) == (arm, layers, 6)
    manifest = read_json(tmp_path / arm / "manifest.json")
    assert manifest["arm"] == arm
    assert manifest["inputs"] == {"scores": sha256_file(scores / "heads.parquet")}
    assert selection.scores_sha256 == sha256_file(scores / "heads.parquet")


def test_too_large_a_k_writes_nothing(tmp_path: Path) -> None:
    scores = write_heads(tmp_path / "scores")
    with pytest.raises(ValueError, match="k = 7 layers asked for, the model has 6"):
        choose_layers(scores, tmp_path / "selections" / "top", Criterion(k=7), "top")
    assert not (tmp_path / "selections").exists()
