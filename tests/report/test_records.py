"""The tables beside the figures: readable whatever the tests hold."""

from pathlib import Path

import numpy as np
import polars as pl

from headwise.examples import write_bad
from headwise.files import write_json, write_table
from headwise.masks.table import MASKS
from headwise.report.records import MAX_BAD_ROWS, bad_examples, calibrations_table, number, statistical_tests
from tests.synthetic import mask_frame, mask_row


def test_tests_of_any_shape_become_tables(tmp_path: Path) -> None:
    content = {
        "across_layers": {"kruskal": 41.25, "kruskal_p": 3.2e-7},
        "within_layers": [{"layer": 0, "p": 0.4}, {"layer": 1, "p": None}],
        "note": "drift",
        "deep": {"a_b": {"c": {"d": 0.123456}}},
        "odd": [1, 2.5, None],
        "none": {},
    }
    write_json(content, tmp_path / "tests.json")
    tables = {table.title: table for table in statistical_tests(tmp_path / "tests.json")}
    assert tables["Values"].rows == (("note", "drift"),)
    assert tables["Do the layers differ? Kruskal-Wallis over their heads' means"].rows == (("kruskal", "41.25"), ("kruskal p", "< 0.001"))
    assert [table.rows for title, table in tables.items() if "heads of a layer" in title] == [(("layer 0", "0.4"), ("layer 1", "–"))]
    assert (tables["Deep"].columns, tables["Deep"].rows) == (("", "c d"), (("a b", "0.1235"),))
    assert tables["Odd"].rows == (("values", "1, 2.5, –"),)
    assert len(tables) == 6


def test_numbers_are_short_and_signed_with_a_minus() -> None:
    assert [number(value) for value in (True, None, 3, -0.25, 1234567.0, "x")] == ["yes", "–", "3", "−0.25", "1.235e+06", "x"]
    assert number(0.0004, "friedman_p") == "< 0.001" and number(0.0004, "tau") == "0.0004"


def test_a_calibration_is_summed_up_by_its_ends(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    claim = {"layers": [3, 5], "parameters": 73_728, "examples": 36, "base_sha256": "f" * 64, "proof": {"loaded": 0.0, "merged": 1.9e-6}}
    write_json(claim, tmp_path / "top" / "calibration.json")
    losses = pl.DataFrame({"step": range(20), "loss": [4.0, 2.0, *[9.0] * 16, 1.0, 0.5]})
    table = calibrations_table(tmp_path, {"top": losses, "all": losses.head(5)})
    assert table.columns[1:4] == ("layers", "parameters", "examples")
    assert table.rows[0] == ("top", "3, 5", "73728", "36", "20", "3.000", "0.750", "0", "1.9e−06")
    assert table.rows[1] == ("all", "–", "–", "–", "5", "4.000", "9.000", "–", "–")


def test_a_long_list_of_bad_examples_is_cut_and_says_so(tmp_path: Path) -> None:
    assert bad_examples(tmp_path) is None
    for shard in ("shard=00", "shard=01"):
        (tmp_path / "attention" / shard).mkdir(parents=True)
    write_bad({}, tmp_path / "attention/shard=00")
    write_bad({f"e{n:03}": "the file is empty" for n in range(MAX_BAD_ROWS + 5)}, tmp_path / "attention/shard=01")
    found = bad_examples(tmp_path)
    assert found is not None
    assert found.sentence == "Left out, by step: attention/shard=01: 205. The first 200 are shown."
    assert len(found.table.rows) == MAX_BAD_ROWS


def test_an_example_about_no_object_is_listed_with_its_reason(tmp_path: Path) -> None:
    mask = np.ones((4, 4), dtype=bool)
    nothing = mask_row("a", mask, object=None, phrase=None, key=False, rle=None, reason="no object is meant")
    (tmp_path / "masks/shard=00").mkdir(parents=True)
    write_table(mask_frame([nothing, mask_row("b", mask, reason="too large")]), tmp_path / "masks/shard=00/masks.parquet", MASKS)
    found = bad_examples(tmp_path)
    assert found is not None
    assert found.table.rows == (("a", "masks", "no object is meant"), ("b", "masks", "thing: too large"))
