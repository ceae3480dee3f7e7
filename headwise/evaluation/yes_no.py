"""Yes or no: POPE (Li et al. 2023, arXiv 2305.10355) and MME (Fu et al. 2023, arXiv 2306.13394), as their authors' programs judge."""

import re
from typing import Literal

import polars as pl

from headwise.evaluation.judgement import Judgement
from headwise.examples import Example

YesNo = Literal["yes", "no"]
DENIALS = {"No", "no", "not"}
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def pope_answer(answer: str) -> YesNo:
    """What POPE's `evaluate.py` takes an answer for: `no` if its first sentence, commas left out, has the word No, no or not; else `yes`,
    whatever it says.
    """
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return "no" if DENIALS & set(words) else "yes"


def pope_rule(answer: str, example: Example) -> Judgement:
    """Right or wrong by `pope_answer`; valid if a yes or a no is in it at all, which the official figure does not ask."""
    said_either = re.search(r"\b(yes|no|not)\b", answer, re.IGNORECASE) is not None
    return Judgement(float(pope_answer(answer) == example.answers[0]), said_either)


def pope_figures(answers: pl.DataFrame) -> dict[str, float | None]:
    """Accuracy, and of `yes` precision, recall, F1 and its share among the answers; None where they divide by nothing.

    answers: columns `answer` and `right`.
    """
    said = pl.col("answer").map_elements(pope_answer, return_dtype=pl.String) == "yes"
    right = pl.col("right") == 1
    counted = answers.select(
        hits=(said & right).sum(), false=(said & ~right).sum(), missed=(~said & ~right).sum(), right=right.sum(), all=pl.len()
    )
    hits, false, missed, all_right, number = counted.row(0)
    precision, recall = _share(hits, hits + false), _share(hits, hits + missed)
    f1 = _share(2 * hits, 2 * hits + false + missed)
    return {
        "accuracy": _share(all_right, number),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_share": _share(hits + false, number),
    }


def mme_answer(answer: str) -> Literal["yes", "no", "other"]:
    """What MME's calculation takes an answer for: full stops left out, `yes` or `no` in its first four letters; a lone y or n counts."""
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return "yes" if text == "y" else "no" if text == "n" else "other"
    return "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else "other"


def mme_rule(answer: str, example: Example) -> Judgement:
    """Right or wrong by `mme_answer`; valid unless that is `other`."""
    said = mme_answer(answer)
    return Judgement(float(said == example.answers[0]), said != "other")


def mme_figures(answers: pl.DataFrame) -> dict[str, float | None]:
    """MME's scores: of a category the percentage of right answers plus that of images both of whose questions are right (200 at most),
    and `perception` and `cognition`, the sums over their categories.

    answers: columns `image`, `task` (the category) and `right`. Raises ValueError where an image has not exactly two questions: half of
    the score is undefined then.
    """
    images = answers.group_by("task", "image").agg(number=pl.len(), right=pl.col("right").cast(pl.Float64).sum()).sort("task", "image")
    if not (odd := images.filter(pl.col("number") != 2)).is_empty():
        task, image, number, _ = odd.row(0)
        raise ValueError(f"MME, {task}: {image} has {number} questions answered, where the score pairs two of each image")
    scores = images.group_by("task").agg(score=100 * (pl.col("right").sum() / pl.col("number").sum() + (pl.col("right") == 2).mean()))
    categories: dict[str, float | None] = {str(task): float(score) for task, score in scores.sort("task").iter_rows()}
    for name, own in (("perception", PERCEPTION), ("cognition", COGNITION)):
        found = [score for task in own if (score := categories.get(task)) is not None]
        categories[name] = sum(found) if found else None
    return categories


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
