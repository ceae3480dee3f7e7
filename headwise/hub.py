"""Where weights and data sets lie on this machine: a folder of the user's, or a snapshot from the Hugging Face Hub."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from headwise.files import sha256_file

TRANSFORMERS_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""What transformers reads of a model: safetensors alone, no pickles."""


def weights_folder(model: str, files: Sequence[str], revision: str = "") -> Path:
    """The folder of that name, from the root, or the snapshot of the model on the Hub (the commit `revision`, else the latest), of which
    `files` are downloaded where they are not here yet. Raises ValueError if it is neither, or none of the files is in it.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.count("/") != 1 or model.startswith((".", "/", "~")):
            raise ValueError(f"model {model!r}: neither a folder, nor an id on the Hugging Face Hub")
        folder = _snapshot(model, files, revision, "model")
    if not _matching(folder, files):
        raise ValueError(f"model {model!r}: none of {', '.join(files)} in {folder}")
    return folder.resolve()


def dataset_folder(name: str) -> Path:
    """The folder of that name, from the root, or the latest snapshot of the data set on the Hub, downloaded where it is not here yet.

    Raises ValueError if it is neither.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise ValueError(f"dataset {name!r}: neither a folder, nor an id on the Hugging Face Hub")
        folder = _snapshot(name, None, "", "dataset")
    return folder.resolve()


def commit(model: str, folder: Path) -> str:
    """The commit that a snapshot from the Hub is of; empty for a folder of the user's."""
    return "" if Path(model).expanduser().is_dir() else folder.name


def weights_digest(folder: Path, files: Sequence[str]) -> str:
    """SHA-256 of the names and contents of these files, in hex: what else lies in the folder does not count."""
    lines = [f"{sha256_file(file)}  {file.name}\n" for file in _matching(folder, files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _matching(folder: Path, files: Sequence[str]) -> list[Path]:
    return sorted({path for pattern in files for path in folder.glob(pattern) if path.is_file()})


def _snapshot(name: str, files: Sequence[str] | None, revision: str, kind: str) -> Path:
    """kind: `model` or `dataset`. files: patterns; None: all."""
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = None if files is None else list(files)
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns, repo_type=kind))
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{kind} {name!r}: not a folder, and not to be had from the Hugging Face Hub ({reason})") from error
