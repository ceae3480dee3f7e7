"""One parameter, end to end: the flow's type, the command line, params.yaml, the step."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from prefect import Flow
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validate
from prefect.utilities.schema_tools.validation import is_valid_schema
from pydantic import TypeAdapter

from flows.annotate import annotate
from flows.arguments import parse_overrides, read_arguments, read_kinds
from flows.controls import controls
from flows.nightly import nightly
from flows.parameters import DEFAULTS, EMBEDDED, SECTIONS, Night, located_masks, mask_weights, model_name, slug, weights
from flows.registry import registered_name
from headwise.calibration.rah_lora.settings import RahLora
from headwise.calibration.settings import Lora
from headwise.calibration.zerotuning.settings import ZeroTuning
from headwise.data import DataSource
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.statistics import Statistics
from headwise.hub import weights_digest
from headwise.masks.settings import Grounding, MaskQuality, Masks, Segmentation
from headwise.observation import Observation
from headwise.profile.settings import Profile
from headwise.scores.head_impact import HeadImpact
from headwise.selection import Criterion
from tasks.command import read_settings
from tests.flows.project import ROOT

CHANGED = {
    "images": DataSource(seed=7),
    "masks": Masks(source="exact", quality=MaskQuality(min_area=0.01)),
    "attention": Observation(max_examples=7),
    "scores": HeadImpact(mask_object="union"),
    "selection": Criterion(k=7),
    "calibration": Lora(steps=7),
    "profile": Profile(probes=7),
    "rah_lora": RahLora(rank=7, layers=(0.25, 0.75)),
    "zerotuning": ZeroTuning(examples=7, layers=(0.25, 0.75)),
    "evaluation": Evaluation(batch_size=7),
    "statistics": Statistics(seed=7),
}


def test_params_yaml_holds_the_defaults_and_nothing_else() -> None:
    assert yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")) == DEFAULTS.as_params()


def test_every_section_is_read_back_as_the_settings_that_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(CHANGED) == set(SECTIONS)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(replace(DEFAULTS, **CHANGED).as_params()), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for section, settings in CHANGED.items():
        assert read_settings(section, type(settings)) == settings != getattr(DEFAULTS, section)
    assert read_settings("arms", list[str]) == ["top", "bottom"] and read_settings("shards", list[int]) == [0, 1]


def test_the_command_line_gives_the_same_types() -> None:
    night = read_arguments("scenes", EMBEDDED, "top, all", ["selection.k=6", "statistics.margin=0.1", "images.variant=plain"])
    assert night == Night(
        arms=("top", "all"),
        selection=Criterion(k=6),
        images=DataSource(kind="scenes", variant="plain"),
        statistics=Statistics(margin=0.1),
        name="scenes-plain",
    )
    assert read_arguments("scenes", EMBEDDED, "top", None, "monday").name == "monday"
    assert read_kinds("photos,scenes") == ("photos", "scenes")


def test_a_folder_of_any_name_gives_a_run_name_and_a_registered_name(tmp_path: Path) -> None:
    pictures = tmp_path / "My Pictures"
    pictures.mkdir()
    night = read_arguments(str(pictures), EMBEDDED, "top", None)
    assert re.fullmatch("My-Pictures-[0-9a-f]{6}", night.name) and registered_name(night) == f"headwise-smol.{night.name}"
    assert registered_name(DEFAULTS) == "headwise-smol.scenes"
    assert model_name("org/vlm-7b") == "org-vlm-7b"
    names = []
    for folder in ("run1", "run2"):
        (tmp_path / folder / "checkpoint-500").mkdir(parents=True)
        (tmp_path / folder / "checkpoint-500" / "config.json").write_text("{}")
        names.append(model_name(str(tmp_path / folder / "checkpoint-500")))
    assert all(re.fullmatch(r"checkpoint-500-[0-9a-f]{6}", name) for name in names) and len(set(names)) == 2
    assert slug("café: 2") == "caf-2" and len(slug("фото")) == 12 and len(slug("x" * 99)) == 80


def test_folders_are_named_from_the_root_wherever_they_were_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pictures", "model"):
        (tmp_path / name).mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "pictures/objects.parquet").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = set[str]()
    for images, model in (("pictures", "model"), ("~/pictures", "~/model"), ("./pictures", str(tmp_path / "model"))):
        parameters = replace(DEFAULTS, images=DataSource(kind="folder", path=images), attention=Observation(model=model))
        params = parameters.as_params()
        assert params["images"]["path"] == params["source"] == str(tmp_path / "pictures")
        assert params["attention"]["model"] == params["weights"] == str(tmp_path / "model")
        names.add(registered_name(parameters))
    assert len(names) == 1 and re.fullmatch(r"model-[0-9a-f]{6}\.pictures-[0-9a-f]{6}", *names)


@pytest.mark.parametrize(
    ("data", "model", "arms", "settings", "message"),
    [
        ("nowhere", EMBEDDED, "top", [], "--data nowhere: neither scenes, photos, a text benchmark=FOLDER, nor a folder"),
        ("scenes", "nonsense", "top", [], "model 'nonsense': neither 'headwise-smol'"),
        ("scenes", "/nowhere/model", "top", [], "model '/nowhere/model': neither"),
        (
            "scenes",
            EMBEDDED,
            "top,middle",
            [],
            r"arms\.1: .*no arm 'middle': it is one of top, bottom, random, all, rah, .* \(given \"middle\"\)",
        ),
        ("scenes", EMBEDDED, "topp", [], r"^arms\.0: [^;]*$"),
        ("scenes", EMBEDDED, "top,top", [], "names one twice"),
        ("scenes", EMBEDDED, "", [], "arms: Tuple should have at least 1 item"),
        ("scenes", EMBEDDED, "top", ["selection.k=0"], r"selection\.k: Input should be greater than or equal to 1 \(given 0\)"),
        ("scenes", EMBEDDED, "top", ["selection.kk=1"], r"--set selection\.kk=1: selection has no 'kk', it has statistic, k, seed"),
        ("scenes", EMBEDDED, "top", ["masks.quality.area=1"], r"masks\.quality has no 'area', it has min_area, max_area"),
        ("scenes", EMBEDDED, "top", ["selection.k.x=1"], r"selection\.k has no 'x', see `selection` in params\.yaml"),
        ("scenes", EMBEDDED, "top", ["masks.quality.min_area=2"], r"masks\.quality\.min_area: Input should be less than or equal to 1"),
        ("scenes", EMBEDDED, "top", ["images.variant=old"], r"images\.variant: Input should be 'plain' or 'drift'"),
        ("scenes", EMBEDDED, "top", ["images.kind=photos"], "--set images.kind: the command's own arguments name the data and the model"),
        ("scenes", EMBEDDED, "top", ["attention.model=a/b"], "--set attention.model: the command's own arguments name"),
        ("scenes", EMBEDDED, "top", ["images.cutouts=a"], "images: .*cutouts is for photos, and the data are of kind 'scenes'"),
        (".", EMBEDDED, "top", ["images.forgetting=9"], "forgetting is for scenes and photos, and the data are of kind 'folder'"),
        ("scenes", EMBEDDED, "top", ["statistics.margin=2"], r"statistics\.margin: Input should be less than or equal to 1"),
        ("scenes", EMBEDDED, "top", ["colour.k=2"], "write section.field=value, with a section of images, masks"),
        ("scenes", EMBEDDED, "top", ["selection=2"], "write section.field=value"),
    ],
)
def test_a_mistake_is_named_with_its_field(data: str, model: str, arms: str, settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_arguments(data, model, arms, settings).as_params()


def test_a_model_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nor a folder with a config\.json"):
        weights(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert weights(str(tmp_path)) == str(tmp_path.resolve())


def test_a_model_that_the_hub_does_not_give_is_named() -> None:
    with pytest.raises(ValueError, match="'nobody/nothing': not a folder, and not to be had from the Hugging Face Hub"):
        weights("nobody/nothing")


def test_wrong_kinds_are_named() -> None:
    with pytest.raises(ValueError, match=r"data\.1: Input should be 'scenes' or 'photos'"):
        read_kinds("scenes,films")


def test_overrides_are_yaml_and_reach_the_fields_of_fields() -> None:
    pairs = [
        "selection.k=1",
        "selection.statistic=x",
        "images.path=[1, 2]",
        "masks.grounding.num_beams=1",
        "masks.grounding.task=detection",
    ]
    assert parse_overrides(pairs) == {
        "selection": {"k": 1, "statistic": "x"},
        "images": {"path": [1, 2]},
        "masks": {"grounding": {"num_beams": 1, "task": "detection"}},
    }


def test_where_masks_come_from_is_decided_once(tmp_path: Path) -> None:
    own = DataSource(kind="folder", path=str(tmp_path))
    assert located_masks(Masks(), DataSource()).source == "exact"
    models = {part: str(tmp_path / part) for part in ("grounding", "segmentation")}
    for folder, file in zip(models.values(), ("config.json", "own.pt"), strict=True):
        Path(folder).mkdir()
        (Path(folder) / file).write_text("{}")
    made = Masks(grounding=Grounding(model=models["grounding"]), segmentation=Segmentation(model=models["segmentation"]))
    assert located_masks(made, own).source == "generated"
    with pytest.raises(ValueError, match="model 'florence-community/Florence-2-base': not a folder"):
        located_masks(Masks(), own)
    (tmp_path / "instances.json").touch()
    assert located_masks(Masks(), own).source == "exact" and mask_weights(located_masks(Masks(), own)) == {}
    assert located_masks(replace(made, source="generated"), own).source == "generated"
    assert located_masks(made, own) == Masks(source="exact"), "models that make no masks change nothing"
    (tmp_path / "instances.json").unlink()
    with pytest.raises(ValueError, match=r"masks\.source = exact, and .* has neither objects\.parquet nor instances\.json"):
        located_masks(Masks(source="exact"), own)


def test_folders_of_mask_models_are_named_from_the_root_and_watched_by_their_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, file in (("florence", "config.json"), ("sam2", "own.pt")):
        Path(name).mkdir()
        (tmp_path / name / file).write_text("{}")
    models = Masks(source="generated", grounding=Grounding(model="florence"), segmentation=Segmentation(model="./sam2"))
    params = replace(DEFAULTS, masks=models).as_params()
    assert params["masks"]["grounding"]["model"] == str(tmp_path / "florence")
    assert params["masks"]["segmentation"]["model"] == str(tmp_path / "sam2")
    assert params["mask_weights"] == {
        "grounding": weights_digest(tmp_path / "florence", ["*.json"]),
        "segmentation": weights_digest(tmp_path / "sam2", ["*.pt"]),
    }
    (tmp_path / "sam2/notes.md").write_text("mine")
    assert replace(DEFAULTS, masks=models).as_params() == params, "what nobody reads changes nothing"


@pytest.mark.parametrize(
    ("settings", "right"),
    [
        ({}, True),
        ({"images": {"kind": "photos", "calibration": 10}, "arms": ["top"], "name": "monday"}, True),
        ({"images": {"kind": "films"}}, False),
        ({"selection": {"k": 0}}, False),
        ({"selection": {"kk": 1}}, False),
        ({"selections": {"k": 1}}, False),
        ({"arms": []}, False),
        ({"statistics": {"margin": 2}}, False),
        ({"statistik": {"margin": 0.1}}, False),
        ({"name": "My Pictures"}, False),
    ],
)
def test_prefects_form_refuses_what_the_types_refuse(settings: dict[str, object], right: bool) -> None:
    """What the server checks before it creates a run: the schema of the deployment, as `prefect deploy` makes it."""
    schema = parameter_schema(nightly).model_dump_for_openapi()
    assert is_valid_schema(schema, preprocess=False) is None
    assert (validate({"settings": settings}, schema) == []) is right


@pytest.mark.parametrize("flow", [nightly, controls, annotate])
def test_the_form_shows_literal_defaults_and_descriptions(flow: Flow[..., object]) -> None:
    schema = parameter_schema(flow).model_dump_for_openapi()
    for shown in schema["properties"].values():
        assert shown["description"] and shown["default"]
    plain = TypeAdapter(Night).dump_python(Night(), mode="json")
    for title in {"Night", "Parameters"} & set(schema["definitions"]):
        for name, shown in schema["definitions"][title]["properties"].items():
            assert shown["default"] == plain[name], name
    for definition in schema["definitions"].values():
        assert all("description" in field for field in definition["properties"].values()), definition["title"]
