"""Which adapter is to be used: each is registered as `challenger`; `champion` it becomes only if shown to be better and harmless."""

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from flows.tracking import Record
from headwise.files import read_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from headwise.evaluation.compare import Comparison

CHALLENGER, CHAMPION = "challenger", "champion"
DIGEST_TAG = "adapter.sha256"
MODEL = "model"
SERVED = Path(__file__).with_name("served.py")
REQUIREMENTS = ("torch", "transformers", "peft", "timm", "safetensors", "pillow")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class Promotion:
    """When a new adapter becomes the champion."""

    registered_model: Annotated[str, Field(min_length=1, max_length=200, description="Name of the model in MLflow's registry")] = "headwise"
    margin: Annotated[
        float,
        Field(ge=0, le=1, description="What the forgetting probe may lose: accuracy, or a share of perplexity, at the end of the interval"),
    ] = 0.02


@plain_dataclass(frozen=True)
class Verdict:
    """Whether the candidate deserves to be champion, and the sentence that says why or why not."""

    better: bool
    sentence: str


def judge(comparisons: "Sequence[Comparison]", margin: float) -> Verdict:
    """Judge a candidate by its comparison with the base model.

    Better means: the 95 % interval of the evaluation captions' perplexity ratio lies below 1, and for every headline of the forgetting
    split the interval excludes a loss of more than `margin`. What was not measured was not shown.
    """
    target = next((c for c in comparisons if (c.split, c.metric, c.task) == ("evaluation", "perplexity", None)), None)
    probes = [c for c in comparisons if c.split == "forgetting" and c.task is None]
    if target is None:
        return Verdict(False, "No champion: the evaluation split has no captions, so there is no perplexity to judge by.")
    if not probes:
        return Verdict(False, "No champion: there is no forgetting split, so nothing shows what the adapter unlearned.")
    lost = [c for c in probes if not c.loses_at_most(margin)]
    if not target.gain:
        return Verdict(False, f"No champion: {_words(target)} is no gain, the interval is not below 1.")
    if lost:
        return Verdict(False, f"No champion: {_words(target)} is a gain, but {_words(lost[0])} may lose more than {margin:g}.")
    return Verdict(True, f"Champion: {_words(target)} is a gain, and {', '.join(map(_words, probes))} is within the margin of {margin:g}.")


def _words(comparison: "Comparison") -> str:
    c = comparison
    name = "caption perplexity" if c.metric == "perplexity" else "accuracy"
    kind = "ratio" if c.metric == "perplexity" else "difference"
    return f"{c.split} {name} {c.before:.4g} -> {c.after:.4g} ({kind} {c.effect:.4g}, 95 % interval {c.low:.4g} to {c.high:.4g})"


def promote(record: Record, adapter: Path, model: str, verdict: Verdict, settings: Promotion, *, changed: bool) -> str:
    """Register the adapter, point `challenger` at it, and `champion` too if the verdict says so; returns a sentence.

    An adapter that is registered already gets no second version, and a run that changed nothing moves no alias: somebody may have
    moved it on purpose.
    The champion moves last, when everything that it names is stored.
    """
    client, name = record.client, settings.registered_model
    digest = adapter_sha256(adapter)
    found = find_version(client, digest, name)
    if found and not changed:
        return f"Nothing changed: the adapter is version {found.version} of {name!r} already. {verdict.sentence}"
    version = found or _register(record, adapter, model, digest, name)
    number = str(version.version)
    client.set_model_version_tag(name, number, "verdict", verdict.sentence)
    client.set_registered_model_alias(name, CHALLENGER, number)
    if verdict.better:
        client.set_registered_model_alias(name, CHAMPION, number)
    return f"{verdict.sentence} The adapter is version {number} of {name!r}, alias {CHAMPION if verdict.better else CHALLENGER}."


def adapter_sha256(adapter: Path) -> str:
    """The digest of the adapter's configuration and weights that its calibration wrote down."""
    return str(read_json(adapter / "calibration.json")["adapter_sha256"])


def find_version(client: "MlflowClient", digest: str, name: str) -> "ModelVersion | None":
    """The registered version that holds exactly these bytes, if there is one."""
    return next((v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get(DIGEST_TAG) == digest), None)


def _register(record: Record, adapter: Path, model: str, digest: str, name: str) -> "ModelVersion":
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

    _log_model(record, adapter, {"model": model})
    try:
        record.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    return record.client.create_model_version(name, f"runs:/{record.run_id}/{MODEL}", record.run_id, tags={DIGEST_TAG: digest})


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
