"""From the command line to the flows' typed parameters: everything is validated before any run exists."""

from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from flows.parameters import COMPOSED, SECTIONS, Composed, Kinds, Night, data_name, validated
from headwise.benchmarks.benchmark import LMMS, TEXT_NAMES
from headwise.benchmarks.registry import BENCHMARKS
from headwise.observation import EMBEDDED_TEXT

ARGUMENTS = ("images.kind", "images.path", "attention.model")
"""The fields that an argument of the command says already."""


def read_arguments(
    data: str, model: str, arms: str, settings: Sequence[str] | None, name: str | None = None, benchmarks: Sequence[str] | None = None
) -> Night:
    """The parameters of a run. A run that got no name is called after its data; benchmarks are `NAME`, `NAME=FOLDER` or
    `NAME=FOLDER,field=value`.

    Raises ValueError naming each wrong field, or the data that are nowhere.
    """
    refuse(settings or (), ARGUMENTS, "the command's own arguments name the data and the model")
    content: dict[str, Any] = parse_overrides(settings or ())
    content["images"] = {**_images(data), **content.get("images", {})}
    content["attention"] = {"model": model, **content.get("attention", {})}
    night = validated(
        TypeAdapter(Night),
        {**content, "arms": _listed(arms), "benchmarks": [_benchmark(text) for text in benchmarks or ()]}
        | ({"name": name} if name else {}),
    )
    return night if name else replace(night, name=data_name(night.images))


def parse_overrides(pairs: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`section.field=value` strings as nested values, each value read as YAML; a field may have fields of its own.

    Raises ValueError that shows the form, the sections, or the fields of the section.
    """
    content: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        path, equals, text = pair.partition("=")
        *sections, name = path.split(".")
        if not (equals and sections and name) or sections[0] not in SECTIONS:
            raise ValueError(f"--set {pair}: write section.field=value, with a section of {', '.join(SECTIONS)}")
        settings: Any = Night()
        values: Any = content
        for section in sections:
            settings, values = getattr(settings, section, None), values.setdefault(section, {})
            if not isinstance(values, dict):
                raise ValueError(f"--set {pair}: {section} has got a value of its own already")
        known = [f.name for f in fields(settings)] if is_dataclass(settings) else []
        if name not in known:
            has = f"it has {', '.join(known)}" if known else f"see `{sections[0]}` in params.yaml"
            raise ValueError(f"--set {pair}: {'.'.join(sections)} has no {name!r}, {has}")
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {pair}: the value is no YAML ({str(error).splitlines()[0]})") from error
    return content


def refuse(pairs: Iterable[str], names: Iterable[str], why: str) -> None:
    """Raises ValueError if `--set` names a field that the command chooses itself."""
    if found := sorted({pair.partition("=")[0] for pair in pairs} & set(names)):
        raise ValueError(f"--set {found[0]}: {why}")


def read_kinds(text: str) -> tuple[Composed, ...]:
    """Data sets that Headwise composes itself, separated by commas. Raises ValueError naming a wrong one."""
    kinds: TypeAdapter[tuple[Composed, ...]] = TypeAdapter(Kinds)
    return validated(kinds, _listed(text), "data")


def _benchmark(text: str) -> dict[str, Any]:
    """Raises ValueError that shows the form where a field has no value. A prompt comes last, commas and all."""
    text, _, prompt = text.partition(",prompt=")
    first, *others = text.split(",")
    name, _, path = first.partition("=")
    if name.strip() not in BENCHMARKS and not name.strip().startswith(LMMS):
        raise ValueError(f"--benchmark {text}: no benchmark {name.strip()!r}; there are {', '.join(BENCHMARKS)}, and {LMMS}TASK")
    content: dict[str, Any] = {"name": name.strip(), "path": path.strip()}
    for pair in others:
        field, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--benchmark {text}: write NAME, NAME=FOLDER or NAME=FOLDER,field=value")
        try:
            content[field.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--benchmark {text}: {pair} is no YAML ({str(error).splitlines()[0]})") from error
    return content | ({"prompt": prompt} if prompt else {})


def is_text(data: str) -> bool:
    """Whether these data are texts without images."""
    return data.partition("=")[0] in TEXT_NAMES


def steering_settings(data: str, model: str) -> list[str]:
    """What `headwise steering` sets unless it is told otherwise: labels, float32, within one point, and for texts how many."""
    found = ["evaluation.closed=labels", "attention.dtype=float32", "statistics.margin=0.01"]
    found += ["images.calibration=1000", "images.evaluation=1200"] if is_text(data) else []
    return [*found, "attention.chat_template=false"] if is_text(data) and model == EMBEDDED_TEXT else found


def _images(data: str) -> dict[str, str]:
    if data in COMPOSED:
        return {"kind": data}
    if is_text(data):
        name, _, path = data.partition("=")
        return {"kind": "texts", "texts": name, "path": path}
    if not Path(data).expanduser().is_dir():
        raise ValueError(f"--data {data}: neither {', '.join(COMPOSED)}, a text benchmark=FOLDER, nor a folder; see `headwise data --help`")
    return {"kind": "folder", "path": data}


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
