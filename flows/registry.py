"""MLflow's registry: an entry per model and data set, a version per adapter, and the aliases that say which version is in use.

Every adapter is registered as `challenger`; the alias `champion` moves if the verdict says so, last of all, when everything that it names
is stored.
"""

import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING

from flows.parameters import Parameters, data_name, model_name
from flows.promotion import Verdict
from flows.tracking import Record
from headwise.calibration.settings import CALIBRATION
from headwise.evaluation.table import CHAMPION
from headwise.files import MANIFEST, new_folder, read_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER = "challenger"
DIGEST_TAG, BASE_TAG, JUDGEMENT_TAG = "adapter.sha256", "base.revision", "judgement.sha256"
MODEL = "model"
SERVED = Path(__file__).with_name("served.py")
REQUIREMENTS = ("torch", "transformers", "peft", "timm", "safetensors", "pillow")


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, and what its calibration wrote down: its own digest, that of the base model's weights in the number type that it
    was trained in, and the model's revision, which is the same in every type.
    """

    folder: Path
    sha256: str
    base_sha256: str
    base_revision: str


@dataclass(frozen=True)
class Judgement:
    """A verdict on an adapter, the digest of all that it depends on (None if it has to be made again: something could not be asked), and
    the version of the champion that it was compared with, if there was one.
    """

    verdict: Verdict
    digest: str | None
    champion: str | None


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder that the calibration step wrote."""
    claims, manifest = read_json(folder / "calibration.json"), read_json(folder / MANIFEST)
    return Adapter(folder, str(claims["adapter_sha256"]), str(claims["base_sha256"]), str(manifest["model"]))


def registered_name(parameters: Parameters) -> str:
    """The registry's entry, such as `headwise-smol.scenes`: only adapters of one model and one data set compete for its champion."""
    return f"{model_name(parameters.attention.model)}.{data_name(parameters.images)}"


def find_version(client: "MlflowClient", name: str, adapter: Adapter) -> "ModelVersion | None":
    """The registered version that holds exactly these bytes, if there is one."""
    return next((v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get(DIGEST_TAG) == adapter.sha256), None)


def find_champion(client: "MlflowClient", name: str) -> "ModelVersion | None":
    """The version that the alias `champion` names, if it names one."""
    found = client.search_registered_models(f"name = '{name}'", max_results=1)
    number = found[0].aliases.get(CHAMPION) if found else None
    return client.get_model_version(name, str(number)) if number else None


def fetch_adapter(client: "MlflowClient", version: "ModelVersion", out: Path) -> None:
    """Put the version's adapter into the folder `out`. Raises ValueError if it cannot be had, or is not the one that was registered."""
    from mlflow.exceptions import MlflowException

    from headwise.calibration.adapter import CONFIG, adapter_digest, weights_name

    with tempfile.TemporaryDirectory() as temporary, new_folder(out) as folder:
        try:
            stored = Path(client.download_artifacts(str(version.run_id), f"{MODEL}/artifacts", temporary))
            source = next(stored.rglob(CONFIG)).parent
            for name in (CONFIG, weights_name(source), CALIBRATION, MANIFEST):
                shutil.copyfile(source / name, folder / name)
        except (MlflowException, OSError, StopIteration) as error:
            raise ValueError(f"version {version.version} of {version.name!r}: its adapter is not in MLflow ({error})") from error
        found, expected = adapter_digest(folder), version.tags.get(DIGEST_TAG)
        if found != expected:
            raise ValueError(f"version {version.version} of {version.name!r}: its adapter is {found}, registered was {expected}")


def promote(record: Record, name: str, adapter: Adapter, model: str, judgement: Judgement) -> str:
    """Register the adapter, point `challenger` at it, and `champion` too if the verdict says so; returns a sentence.

    Every step can be done again: an adapter that is registered already gets no second version. The version is tagged with the digest of
    the judgement at the very end, so that one that was cut short is made again, and one that is recorded moves no alias twice: somebody
    may have moved it on purpose. Where another run has made a champion in the meantime nothing is promoted or recorded.
    """
    client, better = record.client, judgement.verdict.better
    version = find_version(client, name, adapter) or _register(record, name, adapter, model)
    number, champion = str(version.version), find_champion(client, name)
    present = str(champion.version) if champion else None
    overtaken = better and present not in (judgement.champion, number)
    client.set_model_version_tag(name, number, "verdict", judgement.verdict.sentence)
    client.set_registered_model_alias(name, CHALLENGER, number)
    if better and not overtaken:
        client.set_registered_model_alias(name, CHAMPION, number)
    if judgement.digest and not overtaken:
        client.set_model_version_tag(name, number, JUDGEMENT_TAG, judgement.digest)
    if overtaken:
        state = f"{CHALLENGER}; meanwhile version {present} became {CHAMPION}: run again to compare with it"
    elif better:
        state = CHAMPION
    else:
        state = f"{CHALLENGER}; {CHAMPION} stays version {present}" if present else CHALLENGER
    return f"{judgement.verdict.sentence} The adapter is version {number} of {name!r}, alias {state}."


def _register(record: Record, name: str, adapter: Adapter, model: str) -> "ModelVersion":
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

    _log_model(record, adapter.folder, {"model": model})
    try:
        record.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    tags = {DIGEST_TAG: adapter.sha256, BASE_TAG: adapter.base_revision}
    return record.client.create_model_version(name, f"runs:/{record.run_id}/{MODEL}", record.run_id, tags=tags)


def _log_model(record: Record, adapter: Path, config: Mapping[str, object]) -> None:
    """The adapter folder as a pyfunc model from code: a few MB, where `mlflow.transformers` would save the whole base model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Any type hint is inferred as AnyType")  # MLflow's words about its own types
        from mlflow.pyfunc import save_model

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / MODEL
        save_model(
            folder,
            python_model=str(SERVED),
            artifacts={"adapter": str(adapter)},
            model_config=dict(config),
            pip_requirements=[f"{name}=={installed(name)}" for name in REQUIREMENTS],
        )
        record.folder(folder, MODEL)
