"""What a model said to what, kept: a question that the same model was asked before in the same way is not asked again."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path

from headwise.examples import BadExample, Example, read_image


@dataclass(frozen=True)
class Reading:
    """How the model finds a reference answer: the nats of its tokens, their number, and whether each was the likeliest."""

    nats: float
    tokens: int
    likeliest: bool


@dataclass(frozen=True)
class Response:
    """A reading of the first reference, an answer, or both."""

    reading: Reading | None = None
    answer: str | None = None


class Responses:
    """A store of responses; without a path of its file nothing is kept."""

    def __init__(self, path: Path | None, context: Mapping[str, object]) -> None:
        """context: all that decides an answer beside the question, its image and its reference: model, adapter, decoding, libraries."""
        self.path = path
        self._context = json.dumps(context, sort_keys=True)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._open()) as database, database:
                database.execute("PRAGMA journal_mode=WAL")
                database.execute("CREATE TABLE IF NOT EXISTS reading (key BLOB PRIMARY KEY, nats REAL, tokens INTEGER, likeliest INTEGER)")
                database.execute("CREATE TABLE IF NOT EXISTS answer (key BLOB PRIMARY KEY, text TEXT)")

    def find(self, folder: Path, examples: Iterable[Example]) -> dict[str, Response]:
        """What is kept for these examples, by their ids; an image that cannot be read has nothing."""
        if self.path is None:
            return {}
        found: dict[str, Response] = {}
        digests: dict[str, str] = {}
        with closing(self._open()) as database:
            for example in examples:
                try:
                    read_key, answer_key = self._keys(folder, example, digests)
                except BadExample:
                    continue  # for whoever opens it to say
                read = database.execute("SELECT nats, tokens, likeliest FROM reading WHERE key = ?", [read_key]).fetchone()
                said = database.execute("SELECT text FROM answer WHERE key = ?", [answer_key]).fetchone()
                if read or said:
                    reading = Reading(read[0], read[1], bool(read[2])) if read else None
                    found[example.id] = Response(reading, said[0] if said else None)
        return found

    def keep(self, folder: Path, examples: Iterable[Example], responses: Mapping[str, Response]) -> None:
        """Keep what the model said to these examples, of those that are among the responses."""
        if self.path is None:
            return
        digests: dict[str, str] = {}
        with closing(self._open()) as database, database:
            for example in examples:
                if (response := responses.get(example.id)) is None:
                    continue
                read_key, answer_key = self._keys(folder, example, digests)
                if response.reading:
                    database.execute("INSERT OR REPLACE INTO reading VALUES (?, ?, ?, ?)", [read_key, *astuple(response.reading)])
                if response.answer is not None:
                    database.execute("INSERT OR REPLACE INTO answer VALUES (?, ?)", [answer_key, response.answer])

    def _open(self) -> sqlite3.Connection:
        assert self.path is not None
        return sqlite3.connect(self.path, timeout=60)

    def _keys(self, folder: Path, example: Example, digests: dict[str, str]) -> tuple[bytes, bytes]:
        """Of the reading, which depends on the reference, and of the answer."""
        if example.image is not None and example.image not in digests:
            digests[example.image] = example.sha256 or hashlib.sha256(read_image(folder, example.image)).hexdigest()
        asked = [self._context, digests[example.image] if example.image else "", example.question]
        read_key, answer_key = (hashlib.sha256(json.dumps(parts).encode()).digest() for parts in ([*asked, *example.answers[:1]], asked))
        return read_key, answer_key
