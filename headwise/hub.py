"""Where weights lie on this machine: a folder of the user's, or a snapshot from the Hugging Face Hub; nothing here loads them."""

from collections.abc import Sequence
from pathlib import Path

TRANSFORMERS_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
"""What transformers reads of a model: safetensors alone, no pickles."""


def weights_folder(model: str, files: Sequence[str]) -> Path:
    """The folder of that name, from the root, or the snapshot of the model on the Hub, of which `files` are downloaded where they are not
    here yet. Raises ValueError if it is neither, or the files are not in it.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if model.count("/") != 1 or model.startswith((".", "/", "~")):
            raise ValueError(f"model {model!r}: neither a folder, nor an id on the Hugging Face Hub")
        folder = _snapshot(model, files)
    if not any(path for pattern in files for path in folder.glob(pattern)):
        raise ValueError(f"model {model!r}: none of {', '.join(files)} in {folder}")
    return folder.resolve()


def _snapshot(model: str, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(files)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"model {model!r}: not a folder, and not to be had from the Hugging Face Hub ({reason})") from error
