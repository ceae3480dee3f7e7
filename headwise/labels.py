"""Questions with a closed set of answers: how likely a model finds each label, whatever else it would say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated

import torch
from jaxtyping import Bool, Float
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from headwise.examples import CAPTION, Example
from headwise.vlm import TOKEN_TYPES, VLM, Batch, answer_ids, encode

MOST_LABELS = 26
"""Questions with more answers than this are no choice between labels: a description, a number, a name."""
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Labels:
    """The labels of a task and the tokens that a model writes each with."""

    words: tuple[str, ...]
    tokens: tuple[Tokens, ...]

    @property
    def contexts(self) -> tuple[Tokens, ...]:
        """What may stand before a token of a label: () and every beginning of a label of several tokens."""
        return tuple(sorted({tokens[:length] for tokens in self.tokens for length in range(len(tokens))}))


@dataclass(frozen=True)
class LabelScores:
    """What a model makes of prompts whose answer is one of some labels.

    log_probs: `log p(label | prompt)`, the product over its tokens, in fp32, not normalised over the labels. valid: whether greedy decoding
    begins with a label. entropy: of the distribution of the next token, in nats.
    """

    log_probs: Float[Tensor, "batch label"]
    valid: Bool[Tensor, " batch"]
    entropy: Float[Tensor, " batch"]


def label_sets(examples: Sequence[Example]) -> Mapping[str, tuple[str, ...]]:
    """By task its examples' first answers, sorted; without captions, and tasks with fewer than 2 or more than `MOST_LABELS` of them.

    Raises ValueError if an example has no answer.
    """
    found: dict[str, set[str]] = {}
    for example in examples:
        if example.task != CAPTION:
            if not example.answers:
                raise ValueError(f"example {example.id!r} of task {example.task!r} has no answer to tell its labels by")
            found.setdefault(example.task, set()).add(example.answers[0])
    return {task: tuple(sorted(words)) for task, words in found.items() if 2 <= len(words) <= MOST_LABELS}


def tokenised(vlm: VLM, words: Sequence[str]) -> Labels:
    """The labels as the model writes them behind a prompt.

    Raises ValueError if there are fewer than two, one has no tokens, or one begins another, which could then never be told apart.
    """
    tokens = [tuple(answer_ids(vlm, word)) for word in words]
    if len(words) < 2:
        raise ValueError(f"labels {list(words)}: two are needed to choose between")
    for (shorter, word), (longer, other) in pairwise(sorted(zip(tokens, words, strict=True))):
        if longer[: len(shorter)] == shorter:
            raise ValueError(f"the label {word!r} begins the label {other!r}: name one of them otherwise")
    return Labels(tuple(words), tuple(tokens))


def score_labels(vlm: VLM, images: Sequence[Image.Image | None], questions: Sequence[str], labels: Labels) -> LabelScores:
    """One pass over the prompts, and one more for every beginning of a label of several tokens. Gradients flow through all but `valid`."""
    prompts = encode(vlm, images, questions, padding_side="left")
    return read_labels({context: next_logits(vlm, continued(vlm, prompts, context)) for context in labels.contexts}, labels)


def read_labels(logits: Mapping[Tokens, Float[Tensor, "batch vocabulary"]], labels: Labels) -> LabelScores:
    """From the logits, in fp32, of the token behind the prompts and each of the labels' contexts."""
    log_probs = {context: own.log_softmax(-1) for context, own in logits.items()}
    likeliest = {context: own.argmax(-1) for context, own in logits.items()}
    of_labels, are_greedy = list[Tensor](), list[Tensor]()
    for tokens in labels.tokens:
        places = [(tokens[:at], token) for at, token in enumerate(tokens)]
        of_labels.append(torch.stack([log_probs[context][:, token] for context, token in places]).sum(0))
        are_greedy.append(torch.stack([likeliest[context] == token for context, token in places]).all(0))
    first = log_probs[()]
    return LabelScores(torch.stack(of_labels, 1), torch.stack(are_greedy).any(0), -(first.exp() * first).sum(-1))


def continued(vlm: VLM, prompts: Batch, context: Tokens) -> dict[str, Tensor]:
    """The model's inputs for prompts, padded on the left, with the same tokens behind each."""
    inputs, steps = dict(prompts.inputs), len(context)
    if context:
        ids = inputs["input_ids"]
        inputs["input_ids"] = torch.cat([ids, torch.tensor(context, device=ids.device).expand(len(ids), -1)], dim=1)
        inputs["attention_mask"] = pad(inputs["attention_mask"], (0, steps), value=1)
        inputs |= {name: pad(inputs[name], (0, steps), value=vlm.family.answer_type) for name in TOKEN_TYPES if name in inputs}
    return inputs


def next_logits(vlm: VLM, inputs: Mapping[str, Tensor]) -> Float[Tensor, "batch vocabulary"]:
    """The logits, in fp32, from which the token behind each row is predicted."""
    return vlm.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()


@dataclass(frozen=True)
class Readout:
    """What is done to the labels' log-likelihoods before the likeliest is taken: the controls that a calibration has to beat.

    bias: added to each label's, by task. temperature: what they are divided by; it changes no answer, only how sure the model is of it.
    """

    bias: Mapping[str, Mapping[str, Annotated[float, Field(allow_inf_nan=False)]]] = field(default_factory=dict)
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    def applied(self, log_probs: Float[Tensor, "batch label"], task: str, labels: Labels) -> Float[Tensor, "batch label"]:
        """Log-probabilities that sum to 1 over the labels."""
        own = self.bias.get(task, {})
        bias = torch.tensor([own.get(word, 0.0) for word in labels.words], device=log_probs.device, dtype=log_probs.dtype)
        return ((log_probs + bias) / self.temperature).log_softmax(-1)
