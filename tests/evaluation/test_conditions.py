"""Evaluations made under other conditions are not compared."""

from pathlib import Path

import pytest

from headwise.evaluation.conditions import check_conditions, conditions, library_versions
from headwise.files import MANIFEST, write_json

MANIFEST_CONTENT = {
    "inputs": {"index": "abc"},
    "model": "def",
    "dtype": "torch.float32",
    "settings": {"seed": 0},
    "versions": {"torch": "2.14.1"},
}


def _evaluation(folder: Path, **changed: object) -> Path:
    write_json({**MANIFEST_CONTENT, **changed}, folder / MANIFEST)
    return folder


def test_equal_conditions_pass_whatever_else_the_manifests_say(tmp_path: Path) -> None:
    arms = [_evaluation(tmp_path / name, outputs={"answers.parquet": name}) for name in ("base", "top", "bottom")]
    check_conditions(arms)
    assert conditions(arms[0])["index"] == "abc" and set(library_versions()) >= {"torch", "transformers", "peft"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("inputs", {"index": "other"}),
        ("model", "other"),
        ("dtype", "torch.bfloat16"),
        ("settings", {"seed": 1}),
        ("versions", {"torch": "2.15.0"}),
    ],
)
def test_a_condition_that_differs_is_named_with_both_values(tmp_path: Path, name: str, value: object) -> None:
    base, top = _evaluation(tmp_path / "base"), _evaluation(tmp_path / "top", **{name: value})
    with pytest.raises(ValueError, match=rf"'base' and 'top' do not compare: {'index' if name == 'inputs' else name} is .* evaluate both"):
        check_conditions([base, base, top])
