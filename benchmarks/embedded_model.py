"""What the embedded model can do on held-out compositions, by question type, and that it needs the image to do it.

Greedy answers, exact match, on plain scenes and photographs of the evaluation split: new compositions, backgrounds that pretraining never
saw. Beside it: always the commonest answer of the type, a blank image, and the image of another question. Prints one JSON line last.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image
from rich.progress import track

from headwise.compositions import SIZE, Composition
from headwise.cutouts import compose_photograph, installed_photographs
from headwise.evaluation.vqa import normalise
from headwise.scenes import compose_scene
from headwise.vlm import VLM, generate, load_vlm

BATCH = 16


@dataclass(frozen=True)
class Asked:
    kind: str
    task: str
    question: str
    answer: str
    image: Image.Image


def held_out(kind: str, number: int, seed: int = 77) -> Iterator[Composition]:
    photographs = installed_photographs() if kind == "photos" else None
    for i in range(number):
        rng = np.random.default_rng([seed, i])
        yield compose_scene(rng) if photographs is None else compose_photograph(photographs, "evaluation", rng)


def closed_questions(number: int) -> list[Asked]:
    return [
        Asked(kind, q.task, q.question, q.answer, composition.image)
        for kind in ("scenes", "photos")
        for composition in held_out(kind, number)
        for q in composition.questions[1:5]
    ]


def right(vlm: VLM, asked: list[Asked], images: list[Image.Image], description: str) -> list[bool]:
    found: dict[int, bool] = {}
    order = sorted(range(len(asked)), key=lambda i: len(asked[i].question))
    for start in track(range(0, len(order), BATCH), description):
        rows = order[start : start + BATCH]
        answers = generate(vlm, [images[i] for i in rows], [asked[i].question for i in rows], max_new_tokens=10)
        found |= {i: normalise(a) == normalise(asked[i].answer) for i, a in zip(rows, answers, strict=True)}
    return [found[i] for i in range(len(asked))]


def measure(vlm: VLM, number: int) -> list[dict[str, object]]:
    """One row per kind and question type: accuracies with the image, without it, and of the commonest answer."""
    asked = closed_questions(number)
    shuffled = [asked[i].image for i in np.random.default_rng(0).permutation(len(asked))]
    blank = [Image.new("RGB", (SIZE, SIZE), (128, 128, 128))] * len(asked)
    results = {
        "accuracy": right(vlm, asked, [a.image for a in asked], "the image"),
        "blank": right(vlm, asked, blank, "a blank image"),
        "shuffled": right(vlm, asked, shuffled, "another image"),
    }
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, a in enumerate(asked):
        groups[a.kind, a.task].append(i)
        groups[a.kind, "all"].append(i)
        if a.task in ("left", "right"):
            groups[a.kind, "left or right"].append(i)
    return [
        {
            "kind": kind,
            "task": task,
            "n": len(members),
            **{name: round(float(np.mean([result[i] for i in members])), 4) for name, result in results.items()},
            "commonest": round(_commonest([asked[i] for i in members]), 4),
        }
        for (kind, task), members in sorted(groups.items())
    ]


def _commonest(asked: list[Asked]) -> float:
    """Accuracy of the commonest answer of each question type."""
    by_task: dict[str, Counter[str]] = defaultdict(Counter)
    for a in asked:
        by_task[a.task][a.answer] += 1
    return sum(answers.most_common(1)[0][1] for answers in by_task.values()) / len(asked)


if __name__ == "__main__":
    rows = measure(load_vlm(sys.argv[2] if len(sys.argv) > 2 else "headwise-smol"), int(sys.argv[1]) if len(sys.argv) > 1 else 250)
    for row in rows:
        print("  ".join(f"{name}={value}" for name, value in row.items()))
    print(json.dumps({"rows": rows}))
