"""Artefacts on disk: written whole or not at all, checked against their schema on write and on read, described by a manifest."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from tempfile import mkdtemp

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter

MANIFEST = "manifest.json"
UNREADABLE = (pa.ArrowInvalid, pa.ArrowNotImplementedError)
"""What Arrow raises where a file is broken, or holds what a type cannot."""
PARTIAL, NEW, OLD = ".partial", "new", "old"
"""How the hidden folder of an unfinished write ends, and what lies in it: the new folder, and the one that it replaces."""


def cache_folder() -> Path:
    """What can be made again lies here: `HEADWISE_CACHE`, by default `~/.cache/headwise`."""
    return Path(os.environ.get("HEADWISE_CACHE", "~/.cache/headwise")).expanduser()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `path`, synced to disk, when the block ends without an error.

    A reader sees the old folder or the whole new one, also after a crash or on a full disk; between the two renames of the exchange it
    sees none. A process killed just there loses nothing: the next one that writes here first puts the old folder back.
    Of two processes that write at once the last to end wins.
    """
    with _workspace(path) as workspace:
        new = workspace / NEW
        new.mkdir()
        yield new
        for file in (new, *new.rglob("*")):
            _sync(file)
        with _locked(path.parent):
            if path.exists():
                path.rename(workspace / OLD)
            new.rename(path)
        _sync(path.parent)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file name that takes the place of `path`, synced to disk, when the block ends without an error."""
    with _workspace(path) as workspace:
        yield workspace / path.name
        _sync(workspace / path.name)
        (workspace / path.name).replace(path)
        _sync(path.parent)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait until no other process is inside this block for this file, which is made if need be.

    The kernel drops the lock when the process ends, however it ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with _locked(path):
        yield


@contextmanager
def _workspace(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` for this block alone, locked for as long as it lasts: an unlocked one is of a process that died."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as until_done:
        with _locked(path.parent):  # nobody takes the new one for a dead process's before it is locked
            _clear(path)
            workspace = Path(mkdtemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent))
            until_done.enter_context(_locked(workspace))
        try:
            yield workspace
        finally:
            with _locked(path.parent):
                _discard(workspace, path)


def _clear(path: Path) -> None:
    """Discard what killed processes left beside `path`."""
    for leftover in path.parent.glob(f".{escape(path.name)}.*{PARTIAL}"):
        with suppress(BlockingIOError), _locked(leftover, wait=False):
            _discard(leftover, path)


def _discard(workspace: Path, path: Path) -> None:
    """Remove the hidden folder; the old folder that lies in it goes back to its place if no new one got there."""
    if (workspace / OLD).exists() and not path.exists():
        (workspace / OLD).rename(path)
    shutil.rmtree(workspace, ignore_errors=True)


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """An exclusive lock on a file or folder. Raises BlockingIOError if another process holds it and `wait` is False."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


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


def frame_of(rows: Sequence[Mapping[str, object]], schema: pa.Schema) -> pl.DataFrame:
    """Rows as a table of exactly these columns and types; what a row does not name is null."""
    frame = pl.from_arrow(pa.Table.from_pylist([{name: row.get(name) for name in schema.names} for row in rows], schema=schema))
    assert isinstance(frame, pl.DataFrame)
    return frame


def read_table(path: Path, schema: pa.Schema, columns: list[str] | None = None, rows: pc.Expression | None = None) -> pl.DataFrame:
    """Read a Parquet file, or some of its columns and rows, checked against its schema.

    Raises ValueError where columns differ, a value does not fit its column's type, or the file is broken.
    """
    names = columns or schema.names
    try:
        _check_columns(pq.read_schema(path), path, schema)
        table = pq.read_table(path, columns=names, filters=rows)
    except UNREADABLE as error:
        raise ValueError(f"{path}: not a readable Parquet file of {', '.join(schema.names)} ({error})") from error
    frame = pl.from_arrow(pa.table({name: _cast(table[name], schema.field(name), path) for name in names}))
    assert isinstance(frame, pl.DataFrame)
    return frame


def _cast(column: pa.ChunkedArray, field: pa.Field, path: Path) -> pa.ChunkedArray:
    try:
        return column.cast(field.type)
    except UNREADABLE as error:
        raise ValueError(f"{path}: column {field.name!r} holds {column.type}, expected is {field.type} ({error})") from error


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
    folder: Path, *, stage: str, settings: object, inputs: Mapping[str, Path | str], extra: Mapping[str, object] | None = None
) -> None:
    """Describe an artefact: its inputs and files by SHA-256 and its parameters; no times and no ids, so a rerun gives the same bytes.

    An input is a path, or the digest of something that is no single path.
    """
    outputs = {file.relative_to(folder).as_posix(): sha256_file(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    content = {
        "stage": stage,
        "settings": TypeAdapter(type(settings)).dump_python(settings, mode="json"),
        "inputs": {name: found if isinstance(found, str) else sha256_tree(found) for name, found in inputs.items()},
        "outputs": outputs,
        **(extra or {}),
    }
    write_json(content, folder / MANIFEST)
