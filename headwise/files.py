"""Artefacts on disk: written whole or not at all, checked against their schema on write and on read, described by a manifest."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

MANIFEST = "manifest.json"


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` that takes its place, synced to disk, when the block ends without an error.

    A reader therefore sees the old folder or the whole new one, also after a crash or on a full disk.
    """
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` that takes its place, synced to disk, when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_table(table: pa.Table | pl.DataFrame, path: Path, schema: pa.Schema) -> None:
    """Write a Parquet file of exactly these columns, in this order; the bytes depend on the rows alone.

    Raises ValueError if a column is missing, left over, or holds what its type cannot.
    """
    table = table.to_arrow() if isinstance(table, pl.DataFrame) else table
    _check_columns(table.schema, path, schema)
    with new_file(path) as temporary:
        pq.write_table(table.select(schema.names).cast(schema), temporary, compression="zstd")


def read_table(path: Path, schema: pa.Schema, columns: list[str] | None = None) -> pl.DataFrame:
    """Read a Parquet file, checked against its schema.

    Raises ValueError where columns differ, a value does not fit its column's type, or the file is broken.
    """
    try:
        _check_columns(pq.read_schema(path), path, schema)
        names = columns or schema.names
        frame = pl.from_arrow(pq.read_table(path, columns=names).cast(pa.schema([schema.field(name) for name in names])))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{path}: not a readable Parquet file of {', '.join(schema.names)} ({error})") from error
    assert isinstance(frame, pl.DataFrame)
    return frame


def _check_columns(found: pa.Schema, path: Path, schema: pa.Schema) -> None:
    missing, extra = set(schema.names) - set(found.names), set(found.names) - set(schema.names)
    if missing or extra:
        raise ValueError(f"{path}: missing columns {sorted(missing)}, unknown columns {sorted(extra)}")


def write_json(content: object, path: Path) -> None:
    """Write canonical JSON: sorted keys, one space of indent, no NaN."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object. Raises ValueError naming the file if it is none."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_tree(path: Path) -> str:
    """SHA-256 of a file, or of a folder's sorted relative names and file digests, in hex."""
    if path.is_file():
        return sha256_file(path)
    lines = [f"{sha256_file(file)}  {file.relative_to(path).as_posix()}\n" for file in sorted(path.rglob("*")) if file.is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_manifest(
    folder: Path, *, stage: str, settings: object, inputs: Mapping[str, Path], extra: Mapping[str, object] | None = None
) -> None:
    """Describe an artefact: its inputs and files by SHA-256 and its parameters; no times and no ids, so a rerun gives the same bytes."""
    outputs = {file.relative_to(folder).as_posix(): sha256_file(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    content = {
        "stage": stage,
        "settings": TypeAdapter(type(settings)).dump_python(settings, mode="json"),
        "inputs": {name: sha256_tree(path) for name, path in inputs.items()},
        "outputs": outputs,
        **(extra or {}),
    }
    write_json(content, folder / MANIFEST)
