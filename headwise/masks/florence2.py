"""Florence-2: the objects that a text names as boxes in an image, many images at once (Xiao et al. 2023, arXiv 2311.06242)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import Florence2ForConditionalGeneration, Florence2Processor

from headwise.checkpoints import quiet, require_safetensors, torch_device, torch_dtype
from headwise.masks.settings import Grounding

TASKS = {"phrases": "<CAPTION_TO_PHRASE_GROUNDING>", "vocabulary": "<OPEN_VOCABULARY_DETECTION>", "detection": "<OD>"}
CAPTION = "<CAPTION>"
END, PAD = "</s>", "<pad>"
BINS = 1000
"""Florence-2 writes places in thousandths of the image's sides."""
INSTRUCTION = 32
"""Tokens that are more than enough for what the processor adds to a text: "Locate the phrases in the caption:" and the ends."""

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 as fractions of the image's width and height; beyond 1 where the model wrote what is no place."""


@dataclass(frozen=True)
class Grounded:
    """A phrase as the model wrote it, and its box."""

    phrase: str
    box: Box


@dataclass(frozen=True)
class Answer:
    """The objects of one answer, in its order, and the reason why there is none, or why there may be more."""

    objects: tuple[Grounded, ...] = ()
    reason: str | None = None


def parse(text: str) -> list[Grounded]:
    """The boxes that Florence-2 wrote: after each phrase four places per box, or polygons in `<poly>`, around which a box is drawn.

    A place stands for the centre of its bin. What is no whole box, such as the end of an answer that was cut, is left out. The processor's
    own parser finds the same boxes, but rounds them to whole pixels, drops all letters that are not ASCII, and leaves out banned phrases.
    """
    found: list[Grounded] = []
    phrase, places, polygon = "", list[float](), False

    def end() -> None:
        if not polygon:
            boxes = (places[start : start + 4] for start in range(0, len(places) - 3, 4))
            found.extend(Grounded(phrase, (x0, y0, x1, y1)) for x0, y0, x1, y1 in boxes)
        places.clear()

    for tag, words in re.findall(r"<([^<>]*)>|([^<>]+)", text):
        if place := re.fullmatch(r"loc_(\d+)", tag):
            places.append((int(place[1]) + 0.5) / BINS)
        elif tag == "poly":
            end()
            polygon = True
        elif tag == "sep" and polygon:
            del places[len(places) // 2 * 2 :]
        elif tag == "/poly" and polygon:
            if xs := places[: len(places) // 2 * 2 : 2]:
                ys = places[1::2]
                found.append(Grounded(phrase, (min(xs), min(ys), max(xs), max(ys))))
            places.clear()
            polygon = False
        elif words.strip():
            end()
            phrase, polygon = words.strip(), False
    end()
    return found


def cleaned(text: str | None) -> str:
    """The text without what Florence-2 takes for its own marks, and with single spaces."""
    return " ".join(re.sub(r"[<>]", " ", text or "").split())


@dataclass(frozen=True)
class Florence2:
    """A Florence-2 with its processor, and how it is asked."""

    model: Any
    processor: Any
    settings: Grounding

    def describe(self, images: Sequence[Image.Image]) -> list[str]:
        """The model's own caption of each image."""
        return [cleaned(re.sub("<[^<>]*>", " ", text)) for text in self.write(images, [CAPTION] * len(images))]

    def ground(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[Answer]:
        """What of each text lies where in its image; with `detection` whatever is there, and the texts are not read."""
        task = TASKS[self.settings.task]
        if self.settings.task == "detection":
            return [self._answer(text) for text in self.write(images, [task] * len(images))]
        answers = [self._refusal(text) for text in texts]
        asked = [place for place, answer in enumerate(answers) if answer is None]
        written = self.write([images[place] for place in asked], [task + cleaned(texts[place]) for place in asked])
        found = dict(zip(asked, map(self._answer, written), strict=True))
        return [answer or found[place] for place, answer in enumerate(answers)]

    def write(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        """What the model writes to each prompt, its marks included, in batches of prompts of like length."""
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        written = [""] * len(prompts)
        for start in range(0, len(order), self.settings.batch_size):
            batch = order[start : start + self.settings.batch_size]
            for place, text in zip(batch, self._write_batch([images[i] for i in batch], [prompts[i] for i in batch]), strict=True):
                written[place] = text
        return written

    def _write_batch(self, images: list[Image.Image], prompts: list[str]) -> list[str]:
        inputs = self.processor(images=images, text=prompts, return_tensors="pt", padding=True)
        inputs = inputs.to(self.model.device, dtype=self.model.dtype)  # the integers stay as they are
        limits = {"num_beams": self.settings.num_beams, "max_new_tokens": self.settings.max_new_tokens}
        with torch.inference_mode():
            ids = self.model.generate(**inputs, **limits, do_sample=False)
        return self.processor.tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _answer(self, text: str) -> Answer:
        """The objects that were written, without phrases that the processor bans from groundings ("the image", "it")."""
        banned = self.processor.post_processor.banned_grounding_tokens if self.settings.task == "phrases" else ()
        objects = tuple(found for found in parse(text) if found.phrase not in banned)
        if not text.removesuffix(PAD * text.count(PAD)).endswith(END):
            return Answer(objects, f"cut off: Florence-2's answer is longer than max_new_tokens = {self.settings.max_new_tokens}")
        return Answer(objects, None if objects else f"nothing found: Florence-2 wrote no box ({' '.join(text.split())[:60]})")

    def _refusal(self, text: str) -> Answer | None:
        """An answer without objects to a text that the model cannot read."""
        if not (asked := cleaned(text)):
            return Answer(reason="nothing to look for: the text is empty")
        limit = self.model.config.text_config.max_position_embeddings - self.processor.num_image_tokens - INSTRUCTION
        if (tokens := len(self.processor.tokenizer(asked, verbose=False)["input_ids"])) > limit:
            return Answer(reason=f"text too long: {tokens} tokens, Florence-2 reads {limit} ({asked[:40]}...)")
        return None


def load_florence2(folder: Path, settings: Grounding) -> Florence2:
    """Load transformers' own Florence-2 from a folder; code that comes with a model is never run.

    Raises ValueError if a file is missing or broken, or the weights lack tensors, which transformers would make up.
    """
    device = torch_device()
    loader: Any = Florence2ForConditionalGeneration
    require_safetensors(folder)
    try:
        with quiet():
            model, loaded = loader.from_pretrained(folder, dtype=torch_dtype(settings.dtype, device), output_loading_info=True)
        processor = Florence2Processor.from_pretrained(folder)
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{settings.model}: not a whole Florence-2 of transformers in {folder} ({_first_line(error)})") from error
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"{settings.model}: the weights lack {len(missing)} tensors of Florence-2, the first is {missing[0]}")
    return Florence2(model.to(device).eval(), processor, settings)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
