"""The parameters of a run: each stage's own settings, together, and as the `params.yaml` of its clone.

`python -m flows.parameters > params.yaml` writes the defaults again after a setting changed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from headwise.arms import HEAD_ARMS, LAYER_ARMS, STEERING_ARMS, Arm, HeadArm
from headwise.benchmarks.benchmark import Source
from headwise.benchmarks.registry import BENCHMARKS, OWN, files_digest
from headwise.calibration.rah_lora.settings import RahLora
from headwise.calibration.settings import Lora
from headwise.calibration.zerotuning.settings import FIRST_TOKEN, ZeroTuning
from headwise.data import COMPOSED, MASK_FILES, Composed, DataSource, has_masks, photographs, text_prompt, texts_folder
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.statistics import Statistics
from headwise.harness.request import check_task, harness_python
from headwise.hub import TRANSFORMERS_FILES, commit, weights_digest, weights_folder
from headwise.masks.settings import Grounding, Masks, Segmentation, files_of, weights_folders
from headwise.observation import EMBEDDED, EMBEDDED_TEXT, Observation
from headwise.profile.settings import Profile
from headwise.scores.head_impact import HeadImpact
from headwise.selection import Criterion

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

T = TypeVar("T")
EMBEDDED_MODELS, EMBEDDED_WEIGHTS = (EMBEDDED, EMBEDDED_TEXT), "headwise/weights"
DRAWING_CODE = "headwise/scenes.py"
FOLDERS = ("path", "cutouts", "backgrounds")
"""The fields of `images` that name folders of the user."""


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values themselves. Raises ValueError if one is given twice."""
    if len(set(values)) < len(values):
        raise ValueError(f"{list(values)} names one twice")
    return values


def distinct_names(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """The sources themselves. Raises ValueError if two are of one benchmark."""
    distinct(tuple(source.name for source in sources))
    return sources


Arms = Annotated[
    tuple[Arm, ...],
    Field(
        min_length=1,
        description="How to calibrate: a LoRA on the top, bottom, random or all layers, or RAH-LoRA (rah) and its controls; the first arm "
        "is the candidate, the others are its controls",
    ),
    AfterValidator(distinct),
]
Kinds = Annotated[tuple[Composed, ...], Field(min_length=1), AfterValidator(distinct)]
Shards = Annotated[
    tuple[Annotated[int, Field(ge=0, le=9)], ...],
    Field(min_length=1, description="In how many parts masks are made and attention is observed, and their numbers"),
    AfterValidator(distinct),
]
Benchmarks = Annotated[
    tuple[Source, ...],
    Field(description="What else every model is asked: the field's benchmarks, from their official files"),
    AfterValidator(distinct_names),
]
LONGEST_NAME = 80
Name = Annotated[
    str,
    Field(
        pattern=rf"^[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}$",
        description="The run's workspace; the same name again recomputes only what changed",
    ),
]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class Parameters:
    """Everything that decides what a run computes: one frozen settings class per stage, and the two lists that `dvc.yaml` expands."""

    images: Annotated[DataSource, Field(description="The data: drawn scenes, composed photographs, or a folder of your own")] = DataSource()
    masks: Annotated[Masks, Field(description="Where the masks of the objects come from, and which are good enough")] = Masks()
    attention: Annotated[Observation, Field(description="Which model is observed, and how")] = Observation()
    scores: Annotated[HeadImpact, Field(description="How attention and masks become a score per head")] = HeadImpact()
    selection: Annotated[Criterion, Field(description="By which score, and how many layers")] = Criterion()
    calibration: Annotated[Lora, Field(description="The LoRA on the chosen layers")] = Lora()
    profile: Annotated[Profile, Field(description="The unlabelled questions on which RAH-LoRA profiles heads and bounds its changes")] = (
        Profile()
    )
    rah_lora: Annotated[RahLora, Field(description="Which heads RAH-LoRA changes, and how far")] = RahLora()
    zerotuning: Annotated[ZeroTuning, Field(description="Which heads ZeroTuning steers, and how it is found out")] = ZeroTuning()
    evaluation: Annotated[Evaluation, Field(description="How models are asked")] = Evaluation()
    statistics: Annotated[Statistics, Field(description="How sure a comparison of two models has to be")] = Statistics()
    benchmarks: Benchmarks = ()
    arms: Arms = ("top", "bottom")
    measured: Annotated[
        tuple[HeadArm, ...], Field(description="Of which of these, arms of RAH-LoRA, is measured what every calibrated head brings alone")
    ] = ()
    shards: Shards = (0, 1)

    def __post_init__(self) -> None:
        """Raises ValueError where an arm would change nothing that is measured."""
        steering = {arm: replace(self.zerotuning, **STEERING_ARMS[arm]) for arm in self.arms if arm in STEERING_ARMS}
        bound = [arm for arm, own in steering.items() if own.readout != "as_is" or own.operator != FIRST_TOKEN]
        if bound and self.evaluation.closed != "labels":
            raise ValueError(
                f"arms {', '.join(bound)}: they change how labels are told apart and no free answer; set evaluation.closed=labels"
            )
        if bound and self.benchmarks:
            raise ValueError(f"arms {', '.join(bound)}: they change how labels are told apart, and benchmarks are answered freely")

    def as_params(self) -> dict[str, Any]:
        """The content of `params.yaml`: these fields with folders named from the root, benchmarks by name, and what DVC derives from them:
        `source` and `weights`, the files to watch, `photographs`, `mask_weights` and `benchmark_files`, digests of what lies elsewhere,
        `layer_arms`, `head_arms` and `steering_arms`, the arms by what they change, `head_changes` and `steering_changes`, what is
        different in each of the latter two, and `evaluated` and `benchmark_names`, what to ask of whom.

        Raises ValueError if the data or a model named here is nowhere, or the photographs are not installed, with the command for it.
        """
        plain = TypeAdapter(Parameters).dump_python(self, mode="json")
        masks = located_masks(self.masks, self.images)
        watched: dict[str, object] = {
            "source": source(self.images),
            "mask_weights": mask_weights(masks),
            "weights": weights(self.attention.model),
            "layer_arms": [arm for arm in self.arms if arm in LAYER_ARMS],
            "head_arms": [arm for arm in self.arms if arm in HEAD_ARMS],
            "head_changes": _changes(self.arms, HEAD_ARMS),
            "steering_arms": [arm for arm in self.arms if arm in STEERING_ARMS],
            "steering_changes": _changes(self.arms, STEERING_ARMS),
            "evaluated": list(self.arms),
        }
        watched["photographs"] = photographs(self.images).digest() if self.images.kind == "photos" else ""
        benchmarks = {source.name: self._asked(located_benchmark(source)) for source in self.benchmarks}
        watched["benchmark_names"] = list(benchmarks)
        watched["benchmark_files"] = {name: files_digest(source) for name, source in benchmarks.items()}
        plain["benchmarks"] = {name: TypeAdapter(Source).dump_python(source, mode="json") for name, source in benchmarks.items()}
        named = {field: _from_root(given) for field in FOLDERS if (given := getattr(self.images, field))}
        if self.images.kind == "texts":
            named["prompt"] = text_prompt(self.images, chat_template=self.attention.chat_template)
        images = {**plain["images"], **named}
        plain["masks"] = TypeAdapter(Masks).dump_python(masks, mode="json")
        return {**plain, "images": images, "attention": {**plain["attention"], "model": located(self.attention.model)}, **watched}

    def _asked(self, source: Source) -> Source:
        """The source with the words of a text benchmark for a model that just goes on, where nothing else is asked for."""
        known = BENCHMARKS.get(source.name)
        if self.attention.chat_template or known is None or known.completion is None or source.prompt is not None:
            return source
        return replace(source, prompt=known.completion)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class Night(Parameters):
    """A whole night: what is computed, and where the work lies.

    It is one argument of the flow, since Prefect's form refuses an unknown name inside an argument and accepts one beside it.
    """

    name: Name = "nightly"


DEFAULTS = Parameters()
SECTIONS = tuple(f.name for f in fields(Parameters) if f.name not in ("benchmarks", "arms", "measured", "shards"))


def slug(text: str) -> str:
    """The text as a name of files and registry entries: letters, digits, dots, underscores and dashes; a digest where none is left."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:LONGEST_NAME]
    return plain or sha256(text.encode()).hexdigest()[:12]


def data_name(images: DataSource) -> str:
    """What a data set is called: the user's folder, or its kind, the variant if it is not the drift, and a digest of the folders that
    photographs come from if they are not the installed ones. Seeds and numbers of images draw other examples of the same data.
    """
    if images.kind == "folder":
        return _folder_name(Path(source(images)))
    if images.kind == "texts":
        return "-".join([images.texts, *([_digest(_from_root(images.path))] if images.path else [])])
    own = [_from_root(folder) for folder in (images.cutouts, images.backgrounds) if folder]
    parts = [images.kind, *([images.variant] if images.variant != "drift" else []), *([_digest(*own)] if own else [])]
    return "-".join(parts)


def model_name(model: str) -> str:
    """What a model is called: the embedded one, the user's folder, or the id on the Hugging Face Hub, a dash for its slash."""
    folder = _model_folder(model)
    return _folder_name(folder) if folder else slug(model)


def _folder_name(folder: Path) -> str:
    """Its last part, and a digest of the whole path: many a model lies in a `checkpoint-500`."""
    return f"{slug(folder.name)[: LONGEST_NAME - 7]}-{_digest(str(folder))}"


def _from_root(folder: str) -> str:
    return str(Path(folder).expanduser().resolve())


def _digest(*texts: str) -> str:
    return sha256("\n".join(texts).encode()).hexdigest()[:6]


def located(model: str) -> str:
    """The model as a step in another folder finds it: the user's folder from the root, any other name as it is."""
    return str(_model_folder(model) or model)


def _model_folder(model: str) -> Path | None:
    folder = Path(model).expanduser()
    return folder.resolve() if model not in EMBEDDED_MODELS and (folder / "config.json").is_file() else None


def source(images: DataSource) -> str:
    """What DVC watches the examples by: the drawing code, or the user's folder; the photographs lie in several and count by their digest.

    Raises ValueError if the user's folder is not there.
    """
    if images.kind in COMPOSED:
        return DRAWING_CODE
    if images.kind == "texts" and not images.path:
        return str(texts_folder(images))
    folder = Path(images.path).expanduser()
    if not images.path or not folder.is_dir():
        raise ValueError(f"images.path = {images.path!r}: no such folder; `headwise data --help` shows what it must hold")
    return _from_root(images.path)


def weights(model: str) -> str:
    """The files that a model's weights come from: a folder of the repository, the user's folder, or a snapshot from the Hugging Face Hub.

    Raises ValueError if the model is none of these.
    """
    if model in EMBEDDED_MODELS:
        return EMBEDDED_WEIGHTS
    if folder := _model_folder(model):
        return str(folder)
    if Path(model).expanduser().is_dir() or model.count("/") != 1 or model.startswith((".", "/", "~")):
        own = " nor ".join(map(repr, EMBEDDED_MODELS))
        raise ValueError(f"model {model!r}: neither {own}, nor a folder with a config.json, nor an id on the Hugging Face Hub")
    return str(weights_folder(model, TRANSFORMERS_FILES))


def are_generated(masks: Masks, images: DataSource) -> bool:
    """Whether models make the masks. Raises ValueError if the data's own are asked for and there are none."""
    if images.kind == "texts":
        return False
    if masks.source == "exact" and not has_masks(images):
        raise ValueError(f"masks.source = exact, and {images.path} has neither {' nor '.join(MASK_FILES)}; see `headwise data --help`")
    return masks.source == "generated" or (masks.source == "auto" and not has_masks(images))


def located_masks(masks: Masks, images: DataSource) -> Masks:
    """Where the masks come from, decided: the data's own, or models, folders named from the root or commits on the Hub.

    Raises ValueError if the data's own are asked for and there are none, or a model is neither a folder nor to be had.
    """
    if not are_generated(masks, images):
        return replace(masks, source="exact", grounding=Grounding(), segmentation=Segmentation())  # what is not used reruns nothing
    named = {part: replace(getattr(masks, part), model=_from_root_if_there(getattr(masks, part).model)) for part in files_of(masks)}
    located = replace(masks, source="generated", **named)
    try:
        folders = weights_folders(located)
    except ValueError as error:
        made = "" if masks.source == "generated" else f"the data have no masks ({' or '.join(MASK_FILES)}), so models have to make them; "
        raise ValueError(f"{made}{error}") from error
    fixed = {part: replace(model, revision=commit(model.model, folders[part])) for part, model in named.items()}
    return replace(located, **fixed)


def located_benchmark(source: Source) -> Source:
    """The source with its folders named from the root. Raises ValueError if one of them is nowhere."""
    if source.images and not Path(source.images).expanduser().is_dir():
        raise ValueError(f"benchmark {source.name}: images = {source.images!r}: no such folder")
    if source.harnessed:
        return _located_task(source)
    if not source.path and source.name not in OWN:
        made = ", ".join(OWN)
        raise ValueError(f"benchmark {source.name}: give the folder of its files; from the run's own data only {made} can be made")
    path = _from_root_if_there(source.path) if source.path else ""
    return replace(source, path=path, images=source.images and _from_root(source.images))


def _located_task(source: Source) -> Source:
    harness_python()
    if source.images or source.prompt is not None:
        raise ValueError(f"benchmark {source.name}: lmms-eval's tasks bring their own images and prompts")
    if source.path and not Path(source.path).expanduser().is_dir():
        raise ValueError(f"benchmark {source.name}: {source.path!r}: no such folder; give the one that defines the task")
    check_task(str(source.harnessed), source.path)
    return replace(source, path=source.path and _from_root(source.path))


def mask_weights(masks: Masks) -> dict[str, str]:
    """The SHA-256 of the weights that make these located masks; empty where they are exact."""
    if masks.source == "exact":
        return {}
    folders = weights_folders(masks)
    return {part: weights_digest(folders[part], files) for part, files in files_of(masks).items()}


def _changes(arms: Sequence[str], of: Mapping[str, Mapping[str, object]]) -> dict[str, dict[str, object]]:
    return {arm: {name: _plain(value) for name, value in of[arm].items()} for arm in arms if arm in of}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _from_root_if_there(model: str) -> str:
    return _from_root(model) if Path(model).expanduser().is_dir() else model


def validated(adapter: TypeAdapter[T], content: object, name: str = "") -> T:
    """The content as the adapter's type. Raises ValueError with one clause per wrong field: its name, what is wrong, what was given."""
    try:
        return adapter.validate_python(content)
    except ValidationError as error:
        places = [wrong["loc"] for wrong in error.errors()]
        inner = [wrong for wrong in error.errors() if not any(_within(place, wrong["loc"]) for place in places)]
        raise ValueError("; ".join(_clause(name, wrong) for wrong in inner)) from error


def _within(place: tuple[int | str, ...], outer: tuple[int | str, ...]) -> bool:
    """A list whose only item is wrong is reported as empty too; the item says more."""
    return place != outer and place[: len(outer)] == outer


def _clause(name: str, wrong: "ErrorDetails") -> str:
    path = ".".join(map(str, (name, *wrong["loc"]) if name else wrong["loc"]))
    return f"{path}: {wrong['msg']} (given {json.dumps(wrong['input'], default=str)})"


if __name__ == "__main__":
    print(yaml.safe_dump(DEFAULTS.as_params(), sort_keys=False, allow_unicode=True), end="")
