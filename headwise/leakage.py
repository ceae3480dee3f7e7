"""Whether a model is judged by what it was calibrated on: images of two splits that are the same, or nearly."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import imagehash
import numpy as np
from jaxtyping import UInt16, UInt64
from PIL import Image

from headwise.examples import BadExample, Example, open_image

SIDE = 16
BITS = SIDE * SIDE
MIN_DISTANCE = 41
"""Bits of 256 in which the fingerprints of images that show different things differ at least. Measured on 60 drawn scenes and 60 composed
photographs: JPEG at quality 50, half the size, 20 % more light, noise of 8 of 255 and grey change 32 at most; images that only look alike
differ in 56 at least (scenes of one grid) and 90 (photographs). A crop by 2 % on each side changes 30 to 80 and is found in part.
"""
CALIBRATION = "calibration"
SHOWN = 5
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Leak:
    """An image to calibrate with and one to judge by that show the same; bits: how many of 256 differ."""

    calibration: str
    judged: str
    bits: int


def fingerprint(image: Image.Image) -> UInt64[np.ndarray, " word"]:
    """The 256 bits of a perceptual hash (imagehash's `phash`: the signs of the low frequencies of a cosine transform, by their median)."""
    return np.packbits(imagehash.phash(image, hash_size=SIDE).hash.ravel()).view(np.uint64)


def fingerprints(folder: Path, examples: Sequence[Example]) -> dict[str, UInt64[np.ndarray, " word"]]:
    """Of each image once; one that cannot be opened has none, as nobody will be asked about it."""
    found: dict[str, UInt64[np.ndarray, " word"]] = {}
    for example in {example.image: example for example in examples if example.image}.values():
        try:
            found[str(example.image)] = fingerprint(open_image(folder, example))
        except BadExample:
            continue
    return found


def leaks(
    calibration: Mapping[str, UInt64[np.ndarray, " word"]], judged: Mapping[str, UInt64[np.ndarray, " word"]], min_distance: int
) -> list[Leak]:
    """Every pair of images whose fingerprints differ in fewer than `min_distance` bits, the nearest first."""
    if not calibration or not judged:
        return []
    names, others = list(calibration), list(judged)
    first, second = np.stack(list(calibration.values())), np.stack(list(judged.values()))
    pairs = (
        Leak(names[start + row], others[column], int(block[row, column]))
        for start, block in _distances(first, second)
        for row, column in np.argwhere(block < min_distance)
    )
    return sorted(pairs, key=lambda leak: (leak.bits, leak.calibration, leak.judged))


def split_leaks(folder: Path, examples: Sequence[Example], min_distance: int) -> list[Leak]:
    """Between the calibration split of a data set and its other splits."""
    calibration = [example for example in examples if example.split == CALIBRATION]
    others = [example for example in examples if example.split != CALIBRATION]
    return leaks(fingerprints(folder, calibration), fingerprints(folder, others), min_distance)


def check_leaks(found: Sequence[Leak], where: str) -> None:
    """Raises ValueError listing the pairs."""
    if found:
        listed = "; ".join(f"{leak.calibration} and {leak.judged} ({leak.bits} of {BITS} bits differ)" for leak in found[:SHOWN])
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ValueError(f"{len(found)} images to calibrate with are, or look like, images {where}: {listed}{more}")


def check_text_leaks(calibration: Sequence[Example], judged: Sequence[Example], where: str) -> None:
    """Raises ValueError listing the questions about text alone that are in both, by their ids in the same files."""
    known = {example.id for example in calibration if example.image is None}
    if found := [example.id for example in judged if example.image is None and example.id in known]:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise ValueError(f"{len(found)} texts to calibrate with are texts {where}: {', '.join(found[:SHOWN])}{more}")


def _distances(
    first: UInt64[np.ndarray, "calibration word"], second: UInt64[np.ndarray, "judged word"]
) -> Iterator[tuple[int, UInt16[np.ndarray, "some judged"]]]:
    """Blocks of rows of the table of distances in bits, each with its first row."""
    for start in range(0, len(first), ROWS_AT_ONCE):
        block = first[start : start + ROWS_AT_ONCE, None]
        yield start, np.bitwise_count(block ^ second).sum(-1, dtype=np.uint16)
