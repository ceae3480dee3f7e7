"""What the steps' command lines share: settings from params.yaml in the type that declares them, and mistakes as one line."""

import sys
import traceback
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

PARAMS = Path("params.yaml")
RESPONSES = "HEADWISE_RESPONSES"
"""The variable that names the file in which is kept what models said; where it is not set nothing is kept."""
CODE = Path(__file__).resolve().parents[1]
OURS = (CODE / "headwise", CODE / "tasks")
T = TypeVar("T")


def read_settings(section: str, type_: type[T]) -> T:
    """The section of params.yaml, or of one of its sections (`benchmarks.pope`), as the stage's frozen settings.

    Raises ValueError naming the file, the section and each wrong field.
    """
    content = yaml.safe_load(PARAMS.read_text(encoding="utf-8")) or {}
    for part in section.split("."):
        if part not in content:
            raise ValueError(f"{PARAMS}: no section {section!r}; it has {sorted(content)}")
        content = content[part]
    try:
        return TypeAdapter(type_).validate_python(content)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']} (given {e['input']!r})" for e in error.errors())
        raise ValueError(f"{PARAMS}, section {section!r}: {wrong}") from error


def shard_place(shard: int) -> tuple[int, int]:
    """The shard's place among params.yaml's `shards`, and how many those are. Raises ValueError if it is none of them."""
    shards = read_settings("shards", list[int])
    if shard not in shards:
        raise ValueError(f"shard {shard} is none of {PARAMS}'s shards {shards}")
    return shards.index(shard), len(shards)


def read_shard(program: str, description: str | None, arguments: Sequence[str] | None) -> tuple[int, int, int]:
    """The shard that the command line names, its place and their number."""
    parser = ArgumentParser(prog=program, description=description)
    parser.add_argument("--shard", type=int, required=True, help=f"one of {PARAMS}'s shards")
    shard = parser.parse_args(arguments).shard
    return shard, *shard_place(shard)


@contextmanager
def plain_errors() -> Iterator[None]:
    """What Headwise itself raises as a ValueError ends the step as that one line; any other error, such as one of numpy's on our line,
    keeps its traceback.
    """
    try:
        yield
    except ValueError as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = any(Path(last.filename).resolve().is_relative_to(folder) for folder in OURS)
        if not (ours and last.line and last.line.startswith("raise ")):
            raise
        sys.exit(" ".join(str(error).split()))
