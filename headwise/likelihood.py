"""How likely a model finds the reference answers: teacher-forced nats over the answer's tokens and the end of turn."""

from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

from headwise.examples import BadExample, Example, open_image
from headwise.vlm import VLM, Batch


def open_referenced(folder: Path, example: Example) -> Image.Image | None:
    """The example's image (None for text alone). Raises BadExample if it cannot be opened or there is no reference answer to read."""
    if not example.answers:
        raise BadExample("no reference answer")
    return open_image(folder, example) if example.image is not None else None


def answer_targets(batch: Batch) -> Bool[Tensor, "batch token"]:
    """The tokens that a model has to predict: the answer and the end-of-turn token after it, never the prompt or padding."""
    read = batch.segments.system | batch.segments.visual | batch.segments.question
    return batch.inputs["attention_mask"].bool() & ~read


def answer_logits(vlm: VLM, batch: Batch) -> Float[Tensor, "target vocabulary"]:
    """The logits, in the model's own type, from which each target token is predicted; in reading order, example by example.

    The rows are picked by index and not by a slice: a slice is not contiguous, and torch then multiplies it by one copy of the frozen
    output matrix per example (`should_fold` in ATen's matmul): on a CPU, half the time of a batch with a vocabulary of 49k.
    """
    targets = answer_targets(batch)[:, 1:]
    rows = targets.any(dim=0).nonzero().squeeze(1)
    logits = vlm.model(**batch.inputs, logits_to_keep=rows, use_cache=False).logits
    return logits[targets[:, rows]]


def shared_answer_logits(vlm: VLM, batch: Batch) -> Float[Tensor, "target vocabulary"]:
    """`answer_logits` of questions about one image, padded on the right: all up to the image's last token is read once, and its keys and
    values serve every question. Where a chat template puts the question before the image, or in families whose image tokens read the
    question, there is nothing to share.
    """
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    shared = int((batch.segments.system | batch.segments.visual)[0].nonzero().max()) + 1
    if not vlm.family.shares_image or not bool((ids[:, :shared] == ids[0, :shared]).all()):
        return answer_logits(vlm, batch)
    inputs = {name: tensor[: len(tensor) // len(ids)] for name, tensor in batch.inputs.items()}
    inputs |= {"input_ids": ids[:1, :shared], "attention_mask": mask[:1, :shared]}
    cache = vlm.model(**inputs, logits_to_keep=1, use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(ids))
    targets = answer_targets(batch)[:, shared + 1 :]
    rows = targets.any(dim=0).nonzero().squeeze(1)
    logits = vlm.model(input_ids=ids[:, shared:], attention_mask=mask, past_key_values=cache, logits_to_keep=rows, use_cache=True).logits
    return logits[targets[:, rows]]


def read_answers(
    vlm: VLM, batch: Batch, *, one_image: bool = False
) -> tuple[Float[Tensor, "batch"], Int[Tensor, "batch"], Bool[Tensor, "batch"]]:
    """Per example: `-sum log p(token | everything before it)` over its targets, in fp32, their number, and whether each is the likeliest.

    Where each is, greedy decoding gives this very answer. Gradients flow through the nats. `one_image`: all rows show the same image,
    which is then read once.
    """
    targets = answer_targets(batch)
    logits = (shared_answer_logits if one_image else answer_logits)(vlm, batch).float()
    labels = batch.inputs["input_ids"][targets]
    nats, missed = cross_entropy(logits, labels, reduction="none"), (logits.argmax(-1) != labels).int()
    example = targets.nonzero()[:, 0]

    def per_example(values: Tensor) -> Tensor:
        return torch.zeros(len(targets), dtype=values.dtype, device=values.device).index_add(0, example, values)

    return per_example(nats), targets.sum(dim=1), per_example(missed) == 0
