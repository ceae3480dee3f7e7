"""Read a stage's settings from params.yaml into the type that declares them."""

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

PARAMS = Path("params.yaml")
T = TypeVar("T")


def read_settings(section: str, type_: type[T]) -> T:
    """The section of params.yaml as the stage's frozen settings.

    Raises ValueError naming the file, the section and each wrong field.
    """
    content = yaml.safe_load(PARAMS.read_text(encoding="utf-8")) or {}
    if section not in content:
        raise ValueError(f"{PARAMS}: no section {section!r}; it has {sorted(content)}")
    try:
        return TypeAdapter(type_).validate_python(content[section])
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']} (given {e['input']!r})" for e in error.errors())
        raise ValueError(f"{PARAMS}, section {section!r}: {wrong}") from error
