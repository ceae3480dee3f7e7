"""Profile the heads on an unlabelled calibration set: how they look, and what the model's certainty owes them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import polars as pl
from jaxtyping import Float

from headwise.attention.observe import observe_generated
from headwise.examples import BadExample
from headwise.layout import Layout
from headwise.profile.causal_flow import absolute_flow, gate_gradients, signed_flow
from headwise.profile.saliency import layer_z_scores, map_cosines, saliency
from headwise.profile.sample import Question, cut_question
from headwise.profile.schema import SAMPLE
from headwise.profile.settings import Profile
from headwise.profile.table import Profiled
from headwise.scores.schema import HEADS
from headwise.vlm import VLM, Batch, encode

HALVES, MAP = ("text_to_image", "image_to_text"), "text_image_map"
BACKWARD = 2
"""A backward pass costs two forward passes."""
T = TypeVar("T")


@dataclass(frozen=True)
class _Seen:
    """One question with the model's own answer, and how its heads looked."""

    question: Question
    answer: str
    halves: Float[np.ndarray, "half layer head"]
    map: Float[np.ndarray, "layer head _"]
    layout: Layout | None
    tokens: tuple[int, int]


def profile_heads(
    vlm: VLM, folder: Path, questions: Sequence[Question], settings: Profile, batch_size: int, progress: Callable[[int, int], object]
) -> Profiled:
    """Let the model answer each question, read its heads meanwhile, and take the first ones' gradients by the heads' gates.

    `progress` hears how many of how many questions are done. Raises ValueError on a text-only model, if no question is usable, or naming
    the first head whose attention is not a number.
    """
    if vlm.visual_id is None:
        raise ValueError("the model reads text alone: RAH-LoRA compares how heads look at images")
    asked = [replace(one, example=replace(one.example, question=cut_question(vlm, one.example.question))) for one in questions]
    bad, seen, gradients = dict[str, str](), list[_Seen](), list[np.ndarray]()
    total = len(asked) + min(settings.probes, len(asked))
    for batch in _chunks(asked, batch_size):
        seen += _looked(vlm, folder, batch, settings, bad)
        progress(len(seen) + len(bad), total)
    if not seen:
        raise ValueError(f"none of {len(asked)} questions can be used; the first: {next(iter(bad.items()))}")
    probes = [one.question for one in seen[: settings.probes]]
    for probe in probes:  # alone, since a backward pass holds all that lies between the layers
        gradients.append(gate_gradients(vlm, _encoded(vlm, folder, [probe], "right")).float().cpu().numpy())
        progress(len(asked) + sum(map(len, gradients)), total)
    heads = _table(vlm, seen, np.concatenate(gradients), settings.curvature)
    cosines = map_cosines([one.map for one in seen], [one.layout for one in seen])
    rows = [_sample_row(one) for one in seen]
    costs = {"answers_and_attention": sum(sum(one.tokens) for one in seen) / sum(one.tokens[0] for one in seen)}
    costs["causal_flow"] = (1 + BACKWARD) * len(probes) / len(seen)
    return Profiled(heads, pl.DataFrame(rows, schema=SAMPLE.names, orient="row"), cosines, bad, costs)


def _chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _encoded(vlm: VLM, folder: Path, questions: Sequence[Question], side: str) -> Batch:
    assert side in ("left", "right")
    images, texts = [one.open(folder) for one in questions], [one.example.question for one in questions]
    return encode(vlm, images, texts, padding_side=side)


def _looked(vlm: VLM, folder: Path, questions: Sequence[Question], settings: Profile, bad: dict[str, str]) -> list[_Seen]:
    """The questions answered and read; the bad ones are noted with their reasons. Raises ValueError on attention that is not a number."""
    try:
        batch = _encoded(vlm, folder, questions, "left")
    except BadExample as error:
        if len(questions) > 1:
            return [found for one in questions for found in _looked(vlm, folder, [one], settings, bad)]
        bad[questions[0].example.id] = str(error)
        return []
    answers, observed = observe_generated(vlm, batch, settings.max_new_tokens, (*HALVES, MAP))
    prompts = batch.inputs["attention_mask"].sum(1).tolist()
    halves = np.stack([observed.scalars[name] for name in HALVES], axis=1)
    found = list[_Seen]()
    if not np.isfinite(halves).all():
        _, half, layer, head = np.argwhere(~np.isfinite(halves))[0]
        raise ValueError(f"{HALVES[half]} of layer {layer}, head {head} is not a number: does the model overflow in {vlm.dtype}?")
    for place, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        if not answer:
            bad[question.example.id] = "no answer: the model ends its turn at once"
            continue
        spent = (prompts[place], len(vlm.tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1)
        found.append(_Seen(question, answer, halves[place], observed.maps[MAP][place], observed.layouts[place], spent))
    return found


def _table(vlm: VLM, seen: Sequence[_Seen], gradients: Float[np.ndarray, "example layer head"], curvature: float) -> pl.DataFrame:
    """The rows of heads.parquet. Raises ValueError naming the first head with a value that is not a number."""
    halves = np.stack([one.halves for one in seen]).astype(np.float64).mean(axis=0)
    text_to_image, image_to_text = halves[0], halves[1]
    mean = saliency(text_to_image, image_to_text)
    precise = gradients.astype(np.float64)
    values = {
        "text_to_image": text_to_image,
        "image_to_text": image_to_text,
        "saliency": mean,
        "isal": layer_z_scores(mean),
        "caf_signed": signed_flow(precise, curvature),
        "caf": absolute_flow(precise, curvature),
    }
    layers, heads = (index.reshape(-1) for index in np.indices(mean.shape))
    for name, value in values.items():
        if not np.isfinite(value).all():
            layer, head = np.argwhere(~np.isfinite(value))[0]
            raise ValueError(f"{name} of layer {layer}, head {head} is {value[layer, head]}: does the model overflow in {vlm.dtype}?")
    counts = {name: len(gradients) if name.startswith("caf") else len(seen) for name in values}
    frames = [
        pl.DataFrame({"layer": layers, "head": heads, "value": value.reshape(-1)}).with_columns(
            statistic=pl.lit(name), n=pl.lit(counts[name]), low=pl.lit(None, pl.Float64), high=pl.lit(None, pl.Float64)
        )
        for name, value in values.items()
    ]
    return pl.concat(frames).select(HEADS.names).sort("statistic", "layer", "head")


def _sample_row(one: _Seen) -> tuple[str | bool | None, ...]:
    example = one.question.example
    return (example.id, example.image, example.sha256, example.task, example.question, one.answer, one.question.blank)
