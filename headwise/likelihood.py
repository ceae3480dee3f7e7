"""How likely a model finds the reference answers: teacher-forced nats over the answer's tokens and the end of turn."""

from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

from headwise.examples import BadExample, Example, open_image
from headwise.prefix import Continued, prompt_tokens
from headwise.vlm import VLM, Batch


def open_referenced(folder: Path, example: Example) -> Image.Image | None:
    """The example's image (None for text alone). Raises BadExample if it cannot be opened or there is no reference answer to read."""
    if not example.answers:
        raise BadExample("no reference answer")
    return open_image(folder, example) if example.image is not None else None


def answer_targets(batch: Batch) -> Bool[Tensor, "batch token"]:
    """The tokens that a model has to predict: the answer and the end-of-turn token after it, never the prompt or padding."""
    return batch.inputs["attention_mask"].bool() & ~prompt_tokens(batch)


def answer_logits(vlm: VLM, batch: Batch) -> Float[Tensor, "target vocabulary"]:
    """The logits, in the model's own type, from which each target token is predicted; in reading order, example by example.

    The rows are picked by index and not by a slice: a slice is not contiguous, and torch then multiplies it by one copy of the frozen
    output matrix per example (`should_fold` in ATen's matmul): on a CPU, half the time of a batch with a vocabulary of 49k.
    """
    targets = answer_targets(batch)[:, 1:]
    rows = targets.any(dim=0).nonzero().squeeze(1)
    logits = vlm.model(**batch.inputs, logits_to_keep=rows, use_cache=False).logits
    return logits[targets[:, rows]]


def read_answers(vlm: VLM, batch: Batch) -> tuple[Float[Tensor, "batch"], Int[Tensor, "batch"], Bool[Tensor, "batch"]]:
    """Per example: `-sum log p(token | everything before it)` over its targets, in fp32, their number, and whether each is the likeliest.

    Where each is, greedy decoding gives this very answer. Gradients flow through the nats.
    """
    return _summed(batch, answer_logits(vlm, batch))


def read_continued(continued: Continued) -> tuple[Float[Tensor, "batch"], Int[Tensor, "batch"], Bool[Tensor, "batch"]]:
    """As `read_answers`, of prompts with answers that were read on from a prefix."""
    predicting = answer_targets(continued.batch).roll(-1, dims=1)[:, continued.start :]
    return _summed(continued.batch, continued.logits[predicting[:, continued.rows]])


def _summed(
    batch: Batch, logits: Float[Tensor, "target vocabulary"]
) -> tuple[Float[Tensor, "batch"], Int[Tensor, "batch"], Bool[Tensor, "batch"]]:
    targets, logits = answer_targets(batch), logits.float()
    labels = batch.inputs["input_ids"][targets]
    nats, missed = cross_entropy(logits, labels, reduction="none"), (logits.argmax(-1) != labels).int()
    example = targets.nonzero()[:, 0]

    def per_example(values: Tensor) -> Tensor:
        return torch.zeros(len(targets), dtype=values.dtype, device=values.device).index_add(0, example, values)

    return per_example(nats), targets.sum(dim=1), per_example(missed) == 0
