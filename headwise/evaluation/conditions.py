"""What two evaluations must share before their difference means anything."""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

from headwise.files import MANIFEST, read_json

LIBRARIES = ("torch", "torchvision", "transformers", "tokenizers", "pillow", "peft", "timm")
"""The libraries whose next version may answer differently."""


def library_versions() -> dict[str, str]:
    """The installed version of each library that decides what a model answers."""
    return {name: version(name) for name in LIBRARIES}


def conditions(folder: Path) -> dict[str, object]:
    """The conditions in an evaluation's manifest: the digest of the data's index or of a benchmark's files, how much of it was asked, the
    digest of the questions with their images, by which protocol, the model's revision, its number type, whether its chat template wrote the
    prompts, the settings, the versions of the libraries. What the manifest does not say is None.
    """
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    inputs = manifest.get("inputs")
    digests = {name: inputs.get(name) if isinstance(inputs, Mapping) else None for name in ("index", "files")}
    return digests | {
        name: manifest.get(name)
        for name in ("source", "asked", "protocol", "shards", "model", "dtype", "chat_template", "settings", "versions")
    }


def check_conditions(folders: Iterable[Path]) -> None:
    """Raises ValueError naming the first condition that differs between the first evaluation and another one, with both values."""
    first, *others = folders
    expected = conditions(first)
    for folder in others:
        found = conditions(folder)
        for name, value in expected.items():
            if found[name] != value:
                raise ValueError(
                    f"the evaluations {first.name!r} and {folder.name!r} do not compare: {name} is {value!r} in one and {found[name]!r} in "
                    "the other; evaluate both with the same model and libraries (`make install` brings back those of requirements.lock)"
                )
