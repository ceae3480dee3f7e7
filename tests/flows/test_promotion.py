"""The verdict as a plain function; the registry for real, on sqlite."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flows.promotion import Promotion, Verdict, judge, promote
from flows.tracking import Record, open_client, recorded
from headwise.evaluation.compare import Comparison

BETTER, WORSE = Verdict(True, "Champion: better."), Verdict(False, "No champion: no gain.")


def _comparison(split: str, metric: Literal["accuracy", "perplexity"], low: float, high: float) -> Comparison:
    effect = (low + high) / 2
    return Comparison(split, metric, None, 0.9, 0.9 + effect, effect, low, high, 0.01, 0.04, 0.04, None, 100, 50)


TARGET = _comparison("evaluation", "perplexity", 0.85, 0.95)
PROBE = _comparison("forgetting", "accuracy", -0.01, 0.01)


def test_better_and_harmless_is_champion() -> None:
    verdict = judge([TARGET, PROBE], margin=0.02)
    assert verdict.better and "0.85 to 0.95" in verdict.sentence and "forgetting accuracy" in verdict.sentence


@pytest.mark.parametrize(
    ("comparisons", "why"),
    [
        ([replace(TARGET, high=1.0), PROBE], "is no gain"),
        ([TARGET, replace(PROBE, low=-0.021)], "may lose more than 0.02"),
        ([TARGET, PROBE, _comparison("forgetting", "perplexity", 0.9, 1.03)], "may lose more than 0.02"),
        ([PROBE], "no captions"),
        ([TARGET], "no forgetting split"),
        ([replace(TARGET, task="caption"), PROBE], "no captions"),
    ],
)
def test_anything_less_says_why_not(comparisons: list[Comparison], why: str) -> None:
    verdict = judge(comparisons, margin=0.02)
    assert not verdict.better and verdict.sentence.startswith("No champion: ") and why in verdict.sentence


def test_the_margin_is_compared_with_the_end_of_the_interval() -> None:
    assert judge([TARGET, replace(PROBE, low=-0.02)], margin=0.02).better
    assert not judge([TARGET, replace(PROBE, low=-0.02)], margin=0.019).better


def test_aliases_move_only_when_they_should(project: Path) -> None:
    client = open_client()
    settings, first, second = Promotion(), _adapter(project / "first"), _adapter(project / "second")
    with recorded(client, "night", {}) as record:
        assert "version 1" in promote(record, first, "base", BETTER, settings, changed=True)
        assert _aliases(client) == {"challenger": "1", "champion": "1"}
        assert "alias challenger" in promote(record, second, "base", WORSE, settings, changed=True)
        assert _aliases(client) == {"challenger": "2", "champion": "1"}
        assert "version 2" in promote(record, second, "base", BETTER, settings, changed=False)  # nothing changed: nothing moves
        assert _aliases(client) == {"challenger": "2", "champion": "1"}
        promote(record, second, "base", BETTER, settings, changed=True)  # judged anew by another evaluation: no third version
        assert _aliases(client) == {"challenger": "2", "champion": "2"}
        _check_model(client, record, first)


def _check_model(client: MlflowClient, record: Record, adapter: Path) -> None:
    version = client.get_model_version("headwise", "1")
    assert version.run_id == record.run_id and version.tags["adapter.sha256"] == "first" and version.tags["verdict"] == BETTER.sentence
    folder = Path(client.download_artifacts(record.run_id, "model"))
    stored = next(folder.rglob("adapter_model.safetensors"))
    assert stored.read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()
    assert (folder / "served.py").is_file() and "torch==" in (folder / "requirements.txt").read_text()


def _adapter(folder: Path) -> Path:
    folder.mkdir()
    (folder / "calibration.json").write_text(json.dumps({"adapter_sha256": folder.name}))
    (folder / "adapter_model.safetensors").write_bytes(folder.name.encode())
    return folder


def _aliases(client: MlflowClient) -> dict[str, str]:
    found = {}
    for alias in ("challenger", "champion"):
        try:
            found[alias] = client.get_model_version_by_alias("headwise", alias).version
        except MlflowException:
            continue
    return {alias: str(version) for alias, version in found.items()}
