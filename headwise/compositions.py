"""A composed image: what it shows, exact to the pixel, and what can be asked about it."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageFilter

SIZE = 320
"""Width and height of every composed image in pixels: the embedded model's own resolution."""


@dataclass(frozen=True)
class Thing:
    """One object in the image: the phrase that names it, the pixels that show it, and its texture where it was drawn with one."""

    phrase: str
    mask: Bool[np.ndarray, "height width"]
    texture: str = ""

    @property
    def description(self) -> str:
        """All that can be seen of it from near."""
        return f"{self.texture} {self.phrase}".lstrip()


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
