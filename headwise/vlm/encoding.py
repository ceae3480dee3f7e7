"""From images, questions and answers to model inputs with their segments, and back to text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig

from headwise.examples import BadExample
from headwise.layout import Layout, View
from headwise.segments import Kind, Segments, prompt_kinds, segments
from headwise.vlm.families import VLM

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Batch:
    """Model inputs (`input_ids`, `attention_mask`, the images' own) and the segments of their tokens.

    The end-of-turn token after an answer is where `attention_mask` is 1 and `segments.real` is False.
    """

    inputs: dict[str, Tensor]
    segments: Segments


def encode(
    vlm: VLM,
    images: Sequence[Image.Image | None],
    questions: Sequence[str],
    answers: Sequence[str] | None = None,
    padding_side: Side = "right",
) -> Batch:
    """Prompts as the model's chat template writes them, followed by the answers and the end-of-turn token if answers are given.

    Special tokens inside a question or an answer are read as plain text. Raises BadExample if an answer has no tokens or an example is
    longer than the model takes, ValueError if visual tokens and grid disagree or a text-only model gets an image.
    """
    rows, kinds, layouts, pixels = [], [], [], []
    for index, (image, question) in enumerate(zip(images, questions, strict=True)):
        ids, extra = _prompt(vlm, image, question)
        kind = prompt_kinds([token == vlm.visual_id for token in ids])
        if answers is not None:
            answer = _answer(vlm, answers[index])
            ids, kind = [*ids, *answer, vlm.end_id], [*kind, *[Kind.ANSWER] * len(answer), Kind.NONE]
        _check_length(vlm, len(ids), question)
        rows.append(ids)
        kinds.append(kind)
        layouts.append(_layout(vlm, extra))
        pixels.append(extra)
    ones = [[1] * len(row) for row in rows]
    inputs = {"input_ids": _padded(rows, vlm.end_id, padding_side), "attention_mask": _padded(ones, 0, padding_side)}
    inputs |= {name: torch.cat([extra[name] for extra in pixels if name in extra]) for name in sorted({n for e in pixels for n in e})}
    found = segments(_padded(kinds, Kind.NONE, padding_side).to(vlm.device), tuple(layouts))
    return Batch({name: tensor.to(vlm.device) for name, tensor in inputs.items()}, found)


def _prompt(vlm: VLM, image: Image.Image | None, question: str) -> tuple[list[int], dict[str, Tensor]]:
    """Token ids of one prompt, and the image's own inputs."""
    if image is not None and vlm.visual_id is None:
        raise ValueError(f"an image for a text-only model ({vlm.base.config.model_type}), question {question!r}")
    if vlm.visual_id is None and not vlm.tokenizer.chat_template:
        return list(vlm.tokenizer(question, split_special_tokens=True)["input_ids"]), {}
    parts = [*([{"type": "image", "image": image}] if image is not None else []), {"type": "text", "text": question}]
    messages: Any = [{"role": "user", "content": question if vlm.visual_id is None else parts}]
    found: Any = vlm.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", sanitize_control_tokens=True
    )
    return found["input_ids"][0].tolist(), {name: found[name] for name in found if name not in ("input_ids", "attention_mask")}


def _answer(vlm: VLM, answer: str) -> list[int]:
    ids = vlm.tokenizer(answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if not ids:
        raise BadExample(f"the answer {answer!r} has no tokens")
    return list(ids)


def _check_length(vlm: VLM, length: int, question: str) -> None:
    longest = vlm.text_config.max_position_embeddings
    if length > longest:
        raise BadExample(f"{length} tokens, the model takes {longest}: {question[:60]!r}")


def _layout(vlm: VLM, extra: dict[str, Tensor]) -> Layout | None:
    if "pixel_values" not in extra:
        return None
    stride: int = getattr(vlm.processor, "patch_size")  # noqa: B009 - a field of the processors that know it
    height, width = extra["pixel_values"].shape[-2:]
    return (View(height // stride, width // stride),)


def _padded(rows: Sequence[Sequence[int]], value: int, side: Side) -> Tensor:
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([[*pad, *row] if side == "left" else [*row, *pad] for row, pad in zip(rows, fill, strict=True)])


def generate(vlm: VLM, images: Sequence[Image.Image | None], questions: Sequence[str], max_new_tokens: int) -> list[str]:
    """The model's answers: greedy, with a key-value cache, without special tokens and surrounding spaces."""
    inputs = encode(vlm, images, questions, padding_side="left").inputs
    ends = vlm.base.generation_config.eos_token_id
    stop = {vlm.end_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    greedy = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=list(stop), pad_token_id=vlm.end_id)
    run: Any = vlm.model.generate
    with torch.no_grad():
        out = run(**inputs, generation_config=greedy)
    return [text.strip() for text in vlm.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]
