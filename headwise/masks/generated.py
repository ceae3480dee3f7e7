"""Generated masks: Florence-2 says where the objects are that a question and its answer name, SAM 2 draws their outlines."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headwise.examples import CAPTION, Example
from headwise.masks.annotation import Bad, Pictured, Row
from headwise.masks.florence2 import Answer, Box, Florence2, Grounded, cleaned
from headwise.masks.quality import Bounds, box_iou, duplicates, rejection
from headwise.masks.sam2 import Segmented, Segmenter, segment
from headwise.masks.settings import MaskQuality, Masks
from headwise.masks.table import NO_OBJECT

SOURCE = "florence2+sam2"
NO = {"no", "none", "nothing", "nobody", "no one", "0", "zero"}
"""Answers that say that what the question names is not there."""
DENIED = f"{NO_OBJECT}: the question is whether it is there, and the answer says no"
ARTICLES = {"a", "an", "the"}
SPACELESS = re.compile("[\u3040-\u30ff\u3400-\u9fff]")
EXISTENCE = re.compile(r"\b(is|are|was|were) there\b|\bany\b|\bhow many\b", re.IGNORECASE)
"""Questions whose "no" says that there is nothing to look for; the "no" of "Is the ball red?" does not."""


@dataclass(frozen=True)
class GeneratedMasks:
    """The objects of the images' examples, as Florence-2 and SAM 2 see them.

    An example's phrase is looked for, or its caption, or the question with its answer; a caption of the model's own where there is no word.
    What the phrase, the answer, else the question names is key, and of a caption everything. With `detection` Florence-2 names whatever is
    there, and the words only say which of it is key.
    """

    florence2: Florence2
    segmenter: Segmenter
    settings: Masks

    def __call__(self, window: Sequence[Pictured], bad: Bad) -> list[Row]:
        """The rows of these examples; none of them is bad, since what is not found is a result."""
        texts = self._texts(window)
        answers = self._answers(window, texts)
        boxes = [dict[Box, None]() for _ in window]  # each box once, in a fixed order
        for (place, _), answer in answers.items():
            boxes[place] |= {box: None for found in answer.objects if (box := _inside(found.box))}
        masks = segment(self.segmenter, window, [list(own) for own in boxes], self.settings.segmentation.batch_size)
        rows: list[Row] = []
        for place, pictured in enumerate(window):
            for example in pictured.examples:
                text = texts[place][example.id]
                answer = Answer(reason=DENIED) if text is None else answers[place, text]
                rows += self._rows(example, pictured, answer, masks[place])
        return rows

    def _rows(self, example: Example, pictured: Pictured, answer: Answer, masks: Mapping[Box, Segmented]) -> list[Row]:
        """A row per object, and one without an object where the answer has none that is key."""
        rows = [_object_row(found, pictured, masks, self.settings.quality) for found in answer.objects]
        _drop_duplicates(rows, pictured, self.settings.quality.max_overlap)
        key = key_objects(example, [found.phrase for found in answer.objects], chosen=self.settings.grounding.task != "detection")
        named = [pictured.row(example, object=n, key=own, **row) for n, (own, row) in enumerate(zip(key, rows, strict=True))]
        unmeant = f"nothing found: nothing that is meant among {', '.join(sorted({f.phrase for f in answer.objects}))}"
        reason = answer.reason or (None if any(key) else unmeant)
        return named if reason is None else [*named, pictured.row(example, key=False, source=SOURCE, reason=reason)]

    def _texts(self, window: Sequence[Pictured]) -> list[dict[str, str | None]]:
        """What to look for, per image and example; None where nothing is meant. With `detection` it is the same for all."""
        if self.settings.grounding.task == "detection":
            return [{example.id: None if _denied(example) else "" for example in pictured.examples} for pictured in window]
        texts = [{example.id: asked_text(example) for example in pictured.examples} for pictured in window]
        wordless = [place for place, own in enumerate(texts) if "" in own.values()]
        captions = dict(zip(wordless, self.florence2.describe([window[place].image for place in wordless]), strict=True))
        return [{i: captions[place] if text == "" else text for i, text in own.items()} for place, own in enumerate(texts)]

    def _answers(self, window: Sequence[Pictured], texts: Sequence[Mapping[str, str | None]]) -> dict[tuple[int, str], Answer]:
        """The objects of each image's texts: a text that several examples share is read once."""
        asked = sorted({(place, text) for place, own in enumerate(texts) for text in own.values() if text is not None})
        answers = self.florence2.ground([window[place].image for place, _ in asked], [text for _, text in asked])
        return dict(zip(asked, answers, strict=True))


def asked_text(example: Example) -> str | None:
    """Where the example's objects are named: its phrase, its caption, or the question with its answer; empty where it has no word, None
    where the answer denies the object.
    """
    if phrase := cleaned(example.phrase):
        return phrase
    if _denied(example):
        return None
    answer = cleaned(example.answers[0] if example.answers else "")
    return answer if example.task == CAPTION else f"{cleaned(example.question)} {answer}".strip()


def _denied(example: Example) -> bool:
    answer = example.answers[0] if example.answers else ""
    asked = not example.phrase and example.task != CAPTION and EXISTENCE.search(example.question)
    return bool(asked) and " ".join(words(answer)) in NO


def key_objects(example: Example, phrases: Sequence[str], *, chosen: bool) -> list[bool]:
    """Which of the objects found, by their phrases, the answer is about.

    chosen: only what the example's phrase names was looked for. Of "the man left of the bus" the man is meant, who is named first.
    """
    if example.phrase and chosen:
        return [words(phrase) == words(phrases[0]) for phrase in phrases]
    if example.task == CAPTION and not example.phrase:
        return [True] * len(phrases)
    named = [example.phrase] if example.phrase else [text for text in (*example.answers[:1], example.question) if words(text)]
    for text in named:
        if any(key := [names(text, phrase) for phrase in phrases]):
            return key
    return [not named] * len(phrases)


def names(text: str, phrase: str) -> bool:
    """Whether the words of one stand in the other: "black cat" and "a cat"."""
    short, long = sorted((words(text), words(phrase)), key=len)
    return bool(short) and any(long[start : start + len(short)] == short for start in range(len(long) - len(short) + 1))


def words(text: str) -> list[str]:
    """The text's words in small letters, without articles; a character each where the script has no spaces (Chinese, Japanese)."""
    plain = unicodedata.normalize("NFC", text.casefold())
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in plain)  # letters, their marks, numbers
    return [word for word in SPACELESS.sub(r" \g<0> ", kept).split() if word not in ARTICLES]


def _inside(box: Box) -> Box | None:
    """The part of the box in the image; None where there is none, or it has no area."""
    x0, y0, x1, y1 = (min(max(side, 0.0), 1.0) for side in box)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def _object_row(found: Grounded, pictured: Pictured, masks: Mapping[Box, Segmented], quality: MaskQuality) -> Row:
    if (box := _inside(found.box)) is None:
        return {"phrase": found.phrase, "box": _pixels(found.box, pictured), "source": SOURCE, "reason": "the box has no area in the image"}
    asked, mask = _pixels(box, pictured), masks[box]
    reason = rejection(quality, mask.area, predicted_iou=mask.predicted_iou, stability=mask.stability, box_iou=box_iou(mask.bounds, asked))
    figures = {"predicted_iou": mask.predicted_iou, "stability": mask.stability, "area": mask.area}
    return {"phrase": found.phrase, "box": asked, "rle": mask.rle, **figures, "source": SOURCE, "reason": reason}


def _pixels(box: Box, pictured: Pictured) -> Bounds:
    x0, y0, x1, y1 = box
    return x0 * pictured.width, y0 * pictured.height, x1 * pictured.width, y1 * pictured.height


def _drop_duplicates(rows: Sequence[Row], pictured: Pictured, max_overlap: float) -> None:
    """Note it as the reason where a mask repeats a better one of the same phrase."""
    phrases: defaultdict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        if row["reason"] is None:
            phrases[" ".join(words(str(row["phrase"])))].append(place)
    for places in phrases.values():
        masks, scores = [str(rows[place]["rle"]) for place in places], [float(str(rows[place]["predicted_iou"])) for place in places]
        for which, (better, overlap) in duplicates(masks, pictured.height, pictured.width, scores, max_overlap).items():
            reason = f"repeats object {places[better]}: their IoU is {overlap:.3g}, more than max_overlap = {max_overlap:g}"
            rows[places[which]]["reason"] = reason
