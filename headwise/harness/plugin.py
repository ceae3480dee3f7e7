"""Headwise's models in lmms-eval, with any adapter: `lmms-eval --model headwise --model_args model=FOLDER,adapter=FOLDER`.

This module is imported by lmms-eval alone, which finds it as an entry point of the group `lmms_eval.models`.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]
from PIL import Image, ImageOps

from headwise.calibration.adapter import load
from headwise.examples import BadExample, to_rgb
from headwise.likelihood import read_answers
from headwise.observation import EMBEDDED
from headwise.vlm import encode, generate, load_vlm

MAX_NEW_TOKENS = 256
"""Where a task does not say."""
Document = tuple[str, int]
"""A task and the place of a document in it."""


class Headwise(lmms):  # pyright: ignore[reportUntypedBaseClass]
    """A model and an adapter, asked as an evaluation asks: greedily, in batches of prompts of like length, at most one image each."""

    def __init__(
        self,
        model: str = EMBEDDED,
        adapter: str = "",
        dtype: Any = "auto",
        device: str = "auto",
        batch_size: int | str = 16,
        images: str = "",
        progress: Callable[[int, int], object] = lambda _done, _all: None,
        max_batch_size: object = None,
    ) -> None:
        """images: a folder to write each image to that is asked about. max_batch_size: lmms-eval's command gives one; it is not used."""
        super().__init__()
        base = load_vlm(model, dtype=dtype, device=device)
        self.vlm = load(base, Path(adapter)) if adapter else base
        self.image_names: dict[Document, str | None] = {}
        self._batch_size, self._progress = int(batch_size), progress
        self._folder = Path(images) if images else None

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Raises ValueError where a task samples its answers, or asks about several images at once."""

        def limits(place: int) -> tuple[int, tuple[str, ...]]:
            options = requests[place].args[1]
            if options.get("do_sample") and options.get("temperature") != 0:
                raise ValueError(f"{requests[place].args[4]}: samples its answers, and Headwise's are greedy")
            until = options.get("until") or ()
            return int(options.get("max_new_tokens") or MAX_NEW_TOKENS), (until,) if isinstance(until, str) else tuple(until)

        said: dict[int, str] = {}
        for (longest, until), places in self._batches(requests, limits):
            contexts, images = [requests[place].args[0] for place in places], [self._image(*requests[place].args[2:]) for place in places]
            try:
                answers = generate(self.vlm, images, contexts, longest)
            except BadExample as error:
                raise ValueError(f"{requests[places[0]].args[4]}: {error}") from error
            said |= {place: _until(answer, until) for place, answer in zip(places, answers, strict=True)}
            self._progress(len(said), len(requests))
        return [said[place] for place in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The mean nats of each continuation's tokens, its end of turn included, as lmms-eval's own models give them (the least is the
        likeliest), and whether greedy decoding would say it; wrapped, since lmms-eval 0.7.3 makes a string of a plain pair.
        """
        found: dict[int, tuple[float, bool]] = {}
        for _, places in self._batches(requests, lambda _place: None):
            arguments = [requests[place].args for place in places]
            if any(len(own) < 6 for own in arguments):
                raise ValueError("acc_mutual_info asks for likelihoods without a prompt, which Headwise does not read")
            images = [self._image(*own[2:]) for own in arguments]
            answers = [self._continuation(own).strip() for own in arguments]
            with torch.no_grad():
                nats, tokens, likeliest = read_answers(self.vlm, encode(self.vlm, images, [own[0] for own in arguments], answers))
            found |= zip(places, zip((nats / tokens).tolist(), likeliest.tolist(), strict=True), strict=True)
            self._progress(len(found), len(requests))
        return [GenerationResult(text=found[place]) for place in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raises ValueError: Headwise asks every question by itself."""
        raise ValueError(f"{requests[0].args[-2]}: a conversation of several rounds, and Headwise asks every question by itself")

    def _batches(self, requests: Sequence[Instance], key: Callable[[int], Any]) -> list[tuple[Any, list[int]]]:
        """Places of requests with equal keys, of like length."""
        places: dict[Any, list[int]] = {}
        for place in sorted(range(len(requests)), key=lambda place: len(requests[place].args[0])):
            places.setdefault(key(place), []).append(place)
        size = self._batch_size
        return [(of, own[start : start + size]) for of, own in places.items() for start in range(0, len(own), size)]

    def _document(self, task: str, split: str, number: int) -> dict[str, Any]:
        return self.task_dict[task][split][number]

    def _continuation(self, arguments: Sequence[Any]) -> str:
        _, target, _, number, task, split = arguments
        text = target(self._document(task, split, number)) if callable(target) else target
        return str(text[0] if isinstance(text, list) else text)

    def _image(self, doc_to_visual: Callable[[Any], Any], number: int, task: str, split: str) -> Image.Image | None:
        """The document's image in RGB, upright; None where it has none."""
        visuals = doc_to_visual(self._document(task, split, number)) if callable(doc_to_visual) else None
        visuals = visuals if isinstance(visuals, list) else [] if visuals is None else [visuals]
        if len(visuals) > 1 or not all(isinstance(visual, Image.Image) for visual in visuals):
            kinds = ", ".join(type(visual).__name__ for visual in visuals[:3])
            raise ValueError(f"{task}: document {number} shows {len(visuals)} things ({kinds}), and Headwise asks about one image")
        if not visuals:
            self.image_names[task, number] = None
            return None
        image = to_rgb(ImageOps.exif_transpose(visuals[0]))
        name = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest() + ".png"
        self.image_names[task, number] = name
        if self._folder and not (self._folder / name).exists():
            image.save(self._folder / name, compress_level=1)
        return image


def manifest() -> ModelManifest:
    """What lmms-eval has to know of the class."""
    return ModelManifest(model_id="headwise", simple_class_path=f"{__name__}.{Headwise.__name__}")


def _until(answer: str, stops: Sequence[str]) -> str:
    """The answer up to the first of these strings."""
    for stop in stops:
        answer = answer.partition(stop)[0] if stop else answer
    return answer.strip()
