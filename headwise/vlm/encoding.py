"""From images, questions and answers to model inputs with their segments, and back to text."""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, ProcessorMixin

from headwise.examples import BadExample
from headwise.layout import Layout
from headwise.segments import Kind, Segments, prompt_kinds, segments
from headwise.vlm.families import VLM
from headwise.vlm.layouts import Placement

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Batch:
    """Model inputs (`input_ids`, `attention_mask`, the images' own) and the segments of their tokens.

    The end-of-turn token after an answer is where `attention_mask` is 1 and `segments.real` is False.
    """

    inputs: dict[str, Tensor]
    segments: Segments


TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""What processors tell of each token."""


@dataclass(frozen=True)
class _Encoded:
    """One example: its values per token, the kinds of its tokens, the image's own inputs and layout."""

    tokens: dict[str, list[int]]
    kinds: list[Kind]
    pixels: dict[str, Tensor]
    layout: Layout | None


def encode(
    vlm: VLM,
    images: Sequence[Image.Image | None],
    questions: Sequence[str],
    answers: Sequence[str] | None = None,
    padding_side: Side = "right",
) -> Batch:
    """Prompts as the model's chat template writes them, followed by the answers and the end-of-turn token if answers are given.

    Special tokens inside a question or an answer are read as plain text. Raises BadExample if an answer has no tokens or an example is
    longer than the model takes, ValueError if image tokens and layout disagree, a text-only model gets an image, none of the examples has
    one and the model cannot do without, or the processor lacks the chat template that its family has.
    """
    texts = [None] * len(questions) if answers is None else answers
    examples = [_encoded(vlm, *example) for example in zip(images, questions, texts, strict=True)]
    fill = {"input_ids": vlm.end_id, "attention_mask": 0} | dict.fromkeys(TOKEN_TYPES, vlm.family.answer_type)
    inputs = {name: _padded([example.tokens[name] for example in examples], fill[name], padding_side) for name in examples[0].tokens}
    names = sorted({name for example in examples for name in example.pixels})
    inputs |= {name: _joined([example.pixels[name] for example in examples if name in example.pixels]) for name in names}
    if "pixel_values" not in inputs and _parameters(vlm).get("pixel_values") is Parameter.empty:
        raise ValueError(f"a batch without an image: {vlm.base.config.model_type} cannot do without")
    kinds = _padded([example.kinds for example in examples], Kind.NONE, padding_side).to(vlm.device)
    found = segments(kinds, tuple(example.layout for example in examples))
    return Batch({name: tensor.to(vlm.device) for name, tensor in inputs.items()}, found)


def _encoded(vlm: VLM, image: Image.Image | None, question: str, answer: str | None) -> _Encoded:
    found, placement = _prompt(vlm, image, question), Placement((), ())
    ids: list[int] = found["input_ids"][0].tolist()
    if image is not None and vlm.family.layout is not None:
        assert isinstance(vlm.processor, ProcessorMixin)
        placement = vlm.family.layout(vlm.processor, vlm.base.config, (image.height, image.width), found)
    kinds = prompt_kinds([token == vlm.visual_id for token in ids], placement.is_cell)
    own = [] if answer is None else [*answer_ids(vlm, answer), vlm.end_id]
    _check_length(vlm, len(ids) + len(own), question)
    kinds += [*[Kind.ANSWER] * (len(own) - 1), Kind.NONE][: len(own)]
    read = _parameters(vlm)
    tokens = {"input_ids": ids + own, "attention_mask": [1] * len(ids + own)}
    tokens |= {n: found[n][0].tolist() + [vlm.family.answer_type] * len(own) for n in TOKEN_TYPES if n in found and n in read}
    pixels = {name: found[name] for name in found if name in read and name not in (*tokens, "labels")}
    return _Encoded(tokens, kinds, pixels, None if image is None else placement.layout)


def _parameters(vlm: VLM) -> dict[str, Any]:
    """The inputs that the model's forward takes, with their defaults."""
    return {name: parameter.default for name, parameter in signature(vlm.base.forward).parameters.items()}


def _prompt(vlm: VLM, image: Image.Image | None, question: str) -> dict[str, Tensor]:
    """All that the processor makes of one prompt."""
    if image is not None and vlm.visual_id is None:
        raise ValueError(f"an image for a text-only model ({vlm.base.config.model_type}), question {question!r}")
    if not vlm.has_template:
        return _bare_prompt(vlm, image, question)
    special = [token.content for token in vlm.tokenizer.added_tokens_decoder.values() if token.special]
    hostile = any(token in question for token in special)
    text = str(vlm.tokenizer.eos_token) * 2 if hostile else question
    parts = [*([{"type": "image", "image": image}] if image is not None else []), {"type": "text", "text": text}]
    messages: Any = [{"role": "user", "content": text if vlm.visual_id is None else parts}]
    options: Any = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    found: Any = vlm.processor.apply_chat_template(messages, **options)
    found = {name: found[name] for name in found}
    return _spliced(vlm, found, question) if hostile else found


def _spliced(vlm: VLM, found: dict[str, Tensor], question: str) -> dict[str, Tensor]:
    """A prompt with the question's tokens in the place of two ends of text, which stand for a question that has special tokens in it.

    Processors either read these as such or, told not to (`sanitize_control_tokens`), fail with several families.
    """
    ids, end = found["input_ids"][0].tolist(), vlm.tokenizer.eos_token_id
    start = next(index for index, pair in enumerate(pairwise(ids)) if pair == (end, end))
    own = torch.tensor([vlm.tokenizer(question, add_special_tokens=False, split_special_tokens=True)["input_ids"]])
    values = {"input_ids": own} | {name: torch.zeros_like(own) for name in TOKEN_TYPES if name in found}
    return found | {name: torch.cat([found[name][:, :start], value, found[name][:, start + 2 :]], dim=1) for name, value in values.items()}


def _bare_prompt(vlm: VLM, image: Image.Image | None, question: str) -> dict[str, Tensor]:
    """The prompt where there is no chat template: image tokens, a beginning of text, the question; for text alone as its tokenizer does.

    Put together from the processor's parts as the processor does, which would read special tokens in the question as such.
    """
    processor: Any = vlm.processor
    ids = list(vlm.tokenizer(question + vlm.family.prompt_end, split_special_tokens=True)["input_ids"])
    if vlm.visual_id is None:
        return {"input_ids": torch.tensor([ids])}
    if vlm.family.num_image_tokens is None:
        raise ValueError(f"the processor of this {vlm.base.config.model_type} has no chat template, so how it writes prompts is unknown")
    if ids[:1] != [vlm.tokenizer.bos_token_id]:
        ids = [vlm.tokenizer.bos_token_id, *ids]
    found: dict[str, Tensor] = {}
    if image is not None:
        ids = [vlm.visual_id] * getattr(processor, vlm.family.num_image_tokens) + ids
        found |= processor.image_processor(image, return_tensors="pt")
        if hasattr(processor, "qformer_tokenizer"):
            query = processor.qformer_tokenizer(question, split_special_tokens=True, return_tensors="pt")
            found |= {f"qformer_{name}": query[name] for name in ("input_ids", "attention_mask")}
    return {"input_ids": torch.tensor([ids]), "token_type_ids": torch.zeros(1, len(ids), dtype=torch.int64), **found}


def answer_ids(vlm: VLM, answer: str) -> list[int]:
    """The tokens of an answer: as an assistant writes it, or behind a space where a bare text goes on. Raises BadExample if it has none."""
    goes_on = vlm.visual_id is None and not vlm.has_template and answer and not answer[0].isspace()
    ids = vlm.tokenizer(f" {answer}" if goes_on else answer, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if not ids:
        raise BadExample(f"the answer {answer!r} has no tokens")
    return list(ids)


def _check_length(vlm: VLM, length: int, question: str) -> None:
    longest = getattr(vlm.text_config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise BadExample(f"{length} tokens, the model takes {longest}: {question[:60]!r}")


def _padded(rows: Sequence[Sequence[int]], value: int, side: Side) -> Tensor:
    longest = max(map(len, rows))
    fill = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([[*pad, *row] if side == "left" else [*row, *pad] for row, pad in zip(rows, fill, strict=True)])


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other; where the second axes differ (tiles, tokens of a Q-Former), filled up with zeros at its end."""
    if tensors[0].dim() < 2:
        return torch.cat(list(tensors))
    longest = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, longest - tensor.shape[1])) for tensor in tensors])


def generate(vlm: VLM, images: Sequence[Image.Image | None], questions: Sequence[str], max_new_tokens: int) -> list[str]:
    """The model's answers: greedy, with a key-value cache, without special tokens and surrounding spaces."""
    return decode_new(vlm, generate_ids(vlm, encode(vlm, images, questions, padding_side="left"), max_new_tokens))


def generate_ids(vlm: VLM, batch: Batch, max_new_tokens: int) -> Int[Tensor, "batch new"]:
    """The tokens that the model adds to prompts padded on the left, greedily; filled up after the end of turn.

    The cache keeps every key, also where a sliding window would let go of it, so that a key's place is its token's. Raises ValueError if
    a prompt is padded on the right.
    """
    if not bool(batch.inputs["attention_mask"][:, -1].all()):
        raise ValueError("prompts padded on the right, where the answers are to follow: encode with padding_side='left'")
    ends: Any = {"eos_token_id": sorted(stop_ids(vlm)), "pad_token_id": vlm.end_id}
    plain: Any = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0}
    forms: Any = {"use_cache": True, "return_dict_in_generate": False}
    greedy = GenerationConfig(max_new_tokens=max_new_tokens, **plain, **ends, **forms)  # what is not named here is as the model has it
    run: Any = vlm.model.generate
    with torch.no_grad():
        out = run(**batch.inputs, generation_config=greedy, past_key_values=DynamicCache())
    return out[:, batch.inputs["input_ids"].shape[1] :]


def stop_ids(vlm: VLM) -> set[int]:
    """The tokens that end an answer."""
    ends = vlm.base.generation_config.eos_token_id
    return {vlm.end_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def decode_new(vlm: VLM, new: Int[Tensor, "batch new"]) -> list[str]:
    """The answers' texts, without special tokens and surrounding spaces."""
    return [text.strip() for text in vlm.tokenizer.batch_decode(new, skip_special_tokens=True)]
