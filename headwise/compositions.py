"""A composed image: what it shows, exact to the pixel, and what can be asked about it."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from zlib import crc32

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageFilter

SIZE = 320
"""Width and height of every composed image in pixels: the embedded model's own resolution."""

SPLIT_SHARES = {"pretrain": 0.7, "calibration": 0.1, "evaluation": 0.1, "forgetting": 0.1}
"""Shares of all possible compositions, told apart by what stands where (`split_of`): no split shows what another one shows."""
MAX_DRAWS = 10_000
"""Compositions drawn in search of one that falls to a split; where there are names enough, every tenth does."""


@dataclass(frozen=True)
class Thing:
    """One object in the image: the phrase that names it, the pixels that show it, and all that can be said of it where that is more."""

    phrase: str
    mask: Bool[np.ndarray, "height width"]
    description: str = ""


@dataclass(frozen=True)
class Question:
    """A question with its one answer; `phrase` names the thing that the answer is about (None: the whole image)."""

    task: str
    question: str
    answer: str
    phrase: str | None = None


@dataclass(frozen=True)
class Composition:
    """An image, its things and its questions; the first question asks for the caption."""

    image: Image.Image
    things: tuple[Thing, ...]
    questions: tuple[Question, ...]


def split_of(key: str, shares: Mapping[str, float] = SPLIT_SHARES) -> str:
    """The split that a key falls to, by its checksum (CRC-32, scaled to [0, 1)) alone."""
    return list(shares)[bisect_right(list(accumulate(shares.values()))[:-1], crc32(key.encode()) / 2**32)]


def enumerate_phrases(phrases: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def article(noun: str) -> str:
    """`an owl`, `a dog`; a plural or a mass noun is given as `some ...` only if it already says so."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def relight(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Drift of the camera: a darker or brighter exposure, a colour cast, a soft focus and sensor noise. Moves no pixel, so masks hold."""
    pixels = np.asarray(image, dtype=np.float32) / 255
    exposure = rng.choice([rng.uniform(0.45, 0.7), rng.uniform(1.4, 2.0)])
    cast = rng.uniform(0.75, 1.0, size=3)
    blurred = Image.fromarray((np.clip(pixels**exposure * cast, 0, 1) * 255).astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2))
    )
    noisy = np.asarray(blurred, dtype=np.float32) + rng.normal(0, rng.uniform(4, 14), size=pixels.shape)
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
