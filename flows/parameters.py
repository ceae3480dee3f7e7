"""The parameters of a run: each stage's own settings, together, and as the `params.yaml` of its clone.

`python -m flows.parameters > params.yaml` writes the defaults again after a setting changed.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from headwise.calibration.settings import Lora
from headwise.cutouts import STAMPS, installed_photographs
from headwise.data import DataSource
from headwise.evaluation.settings import Evaluation
from headwise.masks.quality import MaskQuality
from headwise.observation import Observation
from headwise.scores.head_impact import HeadImpact
from headwise.selection import Arm, Criterion

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

T = TypeVar("T")
EMBEDDED, EMBEDDED_WEIGHTS = "headwise-smol", "headwise/weights"
DRAWING_CODE = "headwise/scenes.py"


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values themselves. Raises ValueError if one is given twice."""
    if len(set(values)) < len(values):
        raise ValueError(f"{list(values)} names one twice")
    return values


Arms = Annotated[
    tuple[Arm, ...],
    Field(min_length=1, description="Which layers to calibrate; the first arm is the candidate, the others are its controls"),
    AfterValidator(distinct),
]
Composed = Literal["scenes", "photos"]
COMPOSED: tuple[Composed, ...] = get_args(Composed)
Kinds = Annotated[tuple[Composed, ...], Field(min_length=1), AfterValidator(distinct)]
Shards = Annotated[tuple[Annotated[int, Field(ge=0, le=9)], ...], Field(min_length=1), AfterValidator(distinct)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class Parameters:
    """Everything that decides what a run computes: one frozen settings class per stage, and the two lists that `dvc.yaml` expands."""

    images: DataSource = DataSource()
    masks: MaskQuality = MaskQuality()
    attention: Observation = Observation()
    scores: HeadImpact = HeadImpact()
    selection: Criterion = Criterion()
    calibration: Lora = Lora()
    evaluation: Evaluation = Evaluation()
    arms: Arms = ("top", "bottom")
    shards: Shards = (0, 1)

    def as_params(self) -> dict[str, Any]:
        """The content of `params.yaml`: these fields, and `source` and `weights`, the files that DVC watches for them.

        Raises ValueError if the data or the model named here is nowhere.
        """
        plain = TypeAdapter(Parameters).dump_python(self, mode="json")
        return {**plain, "source": source(self.images), "weights": weights(self.attention.model)}


DEFAULTS = Parameters()
SECTIONS = tuple(f.name for f in fields(Parameters) if f.name not in ("arms", "shards"))


def source(images: DataSource) -> str:
    """Where the examples come from: the drawing code, the installed cut-outs, or the user's folder.

    Raises ValueError if the user's folder is not there, or the cut-outs are not installed, with the command that installs them.
    """
    if images.kind == "scenes":
        return DRAWING_CODE
    if images.kind == "photos":
        installed_photographs()
        return str(STAMPS)
    folder = Path(images.path).expanduser()
    if not images.path or not folder.is_dir():
        raise ValueError(f"images.path = {images.path!r}: no such folder; `headwise data --help` shows what it must hold")
    return str(folder.resolve())


def weights(model: str) -> str:
    """The files that a model's weights come from: a folder of the repository, the user's folder, or a snapshot from the Hugging Face Hub.

    Raises ValueError if the model is none of these.
    """
    if model == EMBEDDED:
        return EMBEDDED_WEIGHTS
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return str(folder.resolve())
    if folder.is_dir() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ValueError(f"model {model!r}: neither {EMBEDDED!r}, nor a folder with a config.json, nor an id on the Hugging Face Hub")
    return _snapshot(model)


def _snapshot(model: str) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"model {model!r}: not a folder, and not to be had from the Hugging Face Hub ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def validated(adapter: TypeAdapter[T], content: object, name: str = "") -> T:
    """The content as the adapter's type. Raises ValueError with one clause per wrong field: its name, what is wrong, what was given."""
    try:
        return adapter.validate_python(content)
    except ValidationError as error:
        raise ValueError("; ".join(_clause(name, wrong) for wrong in error.errors())) from error


def _clause(name: str, wrong: "ErrorDetails") -> str:
    path = ".".join(map(str, (name, *wrong["loc"]) if name else wrong["loc"]))
    return f"{path}: {wrong['msg']} (given {json.dumps(wrong['input'], default=str)})"


if __name__ == "__main__":
    print(yaml.safe_dump(DEFAULTS.as_params(), sort_keys=False, allow_unicode=True), end="")
