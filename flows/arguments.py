"""From the command line to the flows' typed parameters: everything is validated before any run exists."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from flows.parameters import COMPOSED, SECTIONS, Composed, Kinds, Parameters, validated
from flows.promotion import Promotion


def read_arguments(data: str, model: str, arms: str, settings: Sequence[str] | None) -> tuple[Parameters, Promotion]:
    """The parameters of a run; what `--set` says wins.

    Raises ValueError naming each wrong field, or the data or model that is nowhere.
    """
    content = parse_overrides(settings or (), (*SECTIONS, "promotion"))
    content["images"] = {**_images(data), **content.get("images", {})}
    content["attention"] = {"model": _absolute(model), **content.get("attention", {})}
    promotion = validated(TypeAdapter(Promotion), content.pop("promotion", {}), "promotion")
    parameters = validated(TypeAdapter(Parameters), {**content, "arms": _listed(arms)})
    parameters.as_params()
    return parameters, promotion


def parse_overrides(pairs: Iterable[str], sections: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`section.field=value` strings as nested values, each value read as YAML.

    Raises ValueError that shows the form and the sections.
    """
    content: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        path, equals, text = pair.partition("=")
        section, dot, name = path.partition(".")
        if not (equals and dot and name) or section not in sections:
            raise ValueError(f"--set {pair}: write section.field=value, with a section of {', '.join(sections)}")
        content.setdefault(section, {})[name] = yaml.safe_load(text)
    return content


def read_kinds(text: str) -> tuple[Composed, ...]:
    """Data sets that Headwise composes itself, separated by commas. Raises ValueError naming a wrong one."""
    kinds: TypeAdapter[tuple[Composed, ...]] = TypeAdapter(Kinds)
    return validated(kinds, _listed(text), "data")


def flow_arguments(parameters: Parameters) -> dict[str, Any]:
    """The nightly flow's arguments; how many shards there are is the graph's business."""
    return {name: getattr(parameters, name) for name in (*SECTIONS, "arms")}


def run_name(data: str) -> str:
    """The workspace of a run that got no name: the kind of data, or the folder's name."""
    return data if data in COMPOSED else Path(data).expanduser().resolve().name


def _images(data: str) -> dict[str, str]:
    if data in COMPOSED:
        return {"kind": data}
    if not Path(data).expanduser().is_dir():
        raise ValueError(f"--data {data}: neither {' nor '.join(COMPOSED)} nor a folder; see `headwise data --help`")
    return {"kind": "folder", "path": _absolute(data)}


def _absolute(name: str) -> str:
    """The run works in a clone of its own, so a folder is named from the root; anything else stays as it is."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
