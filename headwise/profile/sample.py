"""The unlabelled calibration set: which questions are asked, and about which image."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
from PIL import Image

from headwise.examples import Example, open_image
from headwise.profile.settings import Profile
from headwise.vlm import VLM

MAX_QUESTION_TOKENS = 256
GREY = (127, 127, 127)


@dataclass(frozen=True)
class Question:
    """A question of the calibration set: whose question, of which kind, about which image; `blank`: about a grey one of its size."""

    example: Example
    blank: bool = False

    def open(self, folder: Path) -> Image.Image:
        """The image that is shown. Raises BadExample as `open_image` does."""
        image = open_image(folder, self.example)
        return Image.new("RGB", image.size, GREY) if self.blank else image


def draw_sample(examples: Sequence[Example], settings: Profile) -> list[Question]:
    """Questions about images, as many of every task while it has some left, drawn by the seed; all of them if there are fewer.

    With `shuffled` pairs every question gets the image of the next one drawn that shows another. Raises ValueError if no example has an
    image, or all have the same one and are to be shuffled.
    """
    generator = np.random.default_rng(settings.seed)
    by_task = defaultdict[str, list[Example]](list)
    for example in sorted(examples, key=lambda one: one.id):
        if example.image is not None:
            by_task[example.task].append(example)
    drawn = [[own[i] for i in generator.permutation(len(own))] for _, own in sorted(by_task.items())]
    chosen = [one for one in chain.from_iterable(zip_longest(*drawn)) if one is not None][: settings.examples]
    if not chosen:
        raise ValueError(f"none of {len(examples)} calibration examples has an image: RAH-LoRA compares how heads look at images")
    if settings.pairs == "shuffled":
        chosen = list(_shuffled(chosen))
    return [Question(example, blank=settings.pairs == "blank") for example in chosen]


def _shuffled(examples: Sequence[Example]) -> Iterator[Example]:
    for place, example in enumerate(examples):
        others = (*examples[place + 1 :], *examples[:place])
        other = next((one for one in others if one.image != example.image), None)
        if other is None:
            raise ValueError(f"all {len(examples)} examples show {example.image}: their images cannot be shuffled")
        yield replace(example, image=other.image, sha256=other.sha256)


def cut_question(vlm: VLM, question: str) -> str:
    """The question's first 256 tokens."""
    ids = vlm.tokenizer(question, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if len(ids) <= MAX_QUESTION_TOKENS:
        return question
    text = vlm.tokenizer.decode(ids[:MAX_QUESTION_TOKENS])
    assert isinstance(text, str)
    return text
