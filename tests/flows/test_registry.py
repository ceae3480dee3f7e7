"""MLflow's registry for real, on sqlite."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.promotion import Verdict
from flows.registry import Adapter, Judgement, fetch_adapter, find_champion, find_version, promote, read_adapter
from flows.tracking import Record, open_client, recorded
from headwise.calibration.adapter import adapter_digest

BETTER, WORSE = Verdict(True, "Champion: better."), Verdict(False, "No champion: no gain.")
FIRST = Judgement(BETTER, "j1", None)
NAME = "model.scenes"


def test_aliases_move_only_when_they_should(project: Path) -> None:
    client = open_client()
    first, second = _adapter(project / "first"), _adapter(project / "second")
    assert find_champion(client, NAME) is None
    with recorded(client, "night", {}) as record:
        assert "version 1 of 'model.scenes', alias champion." in promote(record, NAME, first, "base", FIRST)
        assert _aliases(client) == {"challenger": "1", "champion": "1"}
    _check_model(client, record, first)
    with recorded(client, "next night", {}) as record:
        assert "alias challenger; champion stays version 1." in promote(record, NAME, second, "base", Judgement(WORSE, "j2", "1"))
        assert _aliases(client) == {"challenger": "2", "champion": "1"}
        promote(record, NAME, second, "base", Judgement(BETTER, "j3", "1"))  # judged anew by another evaluation: no third version
        assert _aliases(client) == {"challenger": "2", "champion": "2"}
    with recorded(client, "another model", {}) as record:
        promote(record, "other.scenes", first, "base", FIRST)  # another model's champion is another entry's
        assert _aliases(client) == {"challenger": "2", "champion": "2"}
    champion = find_champion(client, NAME)
    assert champion is not None and champion.tags["adapter.sha256"] == second.sha256 and champion.tags["judgement.sha256"] == "j3"
    _check_fetched(client, second, project / "fetched")


def _check_fetched(client: MlflowClient, adapter: Adapter, out: Path) -> None:
    champion = find_champion(client, NAME)
    assert champion is not None
    fetch_adapter(client, champion, out)
    assert read_adapter(out) == Adapter(out, adapter.sha256, "base-weights", "base-revision") and adapter_digest(out) == adapter.sha256
    weights = next(Path(".headwise/mlflow", str(champion.run_id)).rglob("second/adapter_model.safetensors"))
    weights.write_bytes(b"other")
    with pytest.raises(ValueError, match=f"version 2 of 'model.scenes': its adapter is [0-9a-f]+, registered was {adapter.sha256}"):
        fetch_adapter(client, champion, out)
    weights.unlink()
    with pytest.raises(ValueError, match=r"version 2 of .* is not in MLflow"):
        fetch_adapter(client, champion, out)
    assert adapter_digest(out) == adapter.sha256  # what was there stays


def test_a_champion_that_another_run_made_meanwhile_stays(project: Path) -> None:
    client, slower, faster = open_client(), _adapter(project / "slower"), _adapter(project / "faster")
    with recorded(client, "faster night", {}) as record:
        promote(record, NAME, faster, "base", FIRST)
    with recorded(client, "slower night", {}) as record:  # it was judged when there was no champion
        assert "alias challenger; meanwhile version 1 became champion" in promote(record, NAME, slower, "base", FIRST)
    assert _aliases(client) == {"challenger": "2", "champion": "1"}
    found = find_version(client, NAME, slower)
    assert found is not None and "judgement.sha256" not in found.tags  # so the next run judges again


def test_a_judgement_that_is_not_final_is_not_recorded(project: Path) -> None:
    client, adapter = open_client(), _adapter(project / "first")
    with recorded(client, "night", {}) as record:
        promote(record, NAME, adapter, "base", Judgement(WORSE, None, "1"))
    found = find_version(client, NAME, adapter)
    assert found is not None and "judgement.sha256" not in found.tags


@pytest.mark.parametrize("cut", ["create_model_version", "set_registered_model_alias", "set_model_version_tag"])
def test_a_promotion_that_was_cut_short_is_made_again(project: Path, monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
    """The judgement is recorded last: after a kill anywhere before, the next run does all of it, and no version is there twice."""
    client, adapter = open_client(), _adapter(project / "first")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), recorded(client, "night", {}) as record, monkeypatch.context() as patch:
        patch.setattr(client, cut, killed)
        promote(record, NAME, adapter, "base", FIRST)
    found = find_version(client, NAME, adapter) if cut != "create_model_version" else None
    assert found is None or "judgement.sha256" not in found.tags
    with recorded(client, "night", {}) as record:
        promote(record, NAME, adapter, "base", FIRST)
    assert _aliases(client) == {"challenger": "1", "champion": "1"} and len(client.search_model_versions(f"name = '{NAME}'")) == 1


def _check_model(client: MlflowClient, record: Record, adapter: Adapter) -> None:
    version = client.get_model_version(NAME, "1")
    assert version.run_id == record.run_id and version.tags["verdict"] == BETTER.sentence
    assert (version.tags["adapter.sha256"], version.tags["base.revision"]) == (adapter.sha256, "base-revision")
    folder = Path(client.download_artifacts(record.run_id, "model"))
    stored = next(folder.rglob("first/adapter_model.safetensors"))
    assert stored.read_bytes() == (adapter.folder / "adapter_model.safetensors").read_bytes()
    assert (folder / "served.py").is_file() and "torch==" in (folder / "requirements.txt").read_text()


def _adapter(folder: Path) -> Adapter:
    """Files that are an adapter as far as a registry can tell."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(folder.name.encode())
    claims = {"adapter_sha256": adapter_digest(folder), "base_sha256": "base-weights"}
    (folder / "calibration.json").write_text(json.dumps(claims))
    (folder / "manifest.json").write_text(json.dumps({"model": "base-revision"}))
    return read_adapter(folder)


def _aliases(client: MlflowClient) -> dict[str, str]:
    (found,) = client.search_registered_models(f"name = '{NAME}'")
    return {alias: str(version) for alias, version in found.aliases.items()}
