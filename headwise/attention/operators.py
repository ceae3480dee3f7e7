"""Ways to steer heads that are compared with the bias on the first token; each reads whole matrices of attention, so prompts are short.

Shapes: B batch, H query head, R row, K key.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import SequenceMatcher
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import one_hot

from headwise.attention.layer import Attention
from headwise.attention.seam import visiting
from headwise.vlm import VLM, encode, generate_ids

SINK = 5.0
"""ACT: a token is a sink if it gets more than this many times the attention that each would get if all got the same."""
ASK = "{prompt}\n\nQuote the words of this text that matter most for the answer, exactly as they stand there:"
QUOTED_TOKENS, LEAST_QUOTED = 16, 3
"""How long a quotation may be, and how long the part of it must be that stands in the prompt."""
LONGEST_BEGINNING = 16
"""How many tokens of a label may stand behind a prompt."""
CAPPED = 0.99999
Probabilities = Float[Tensor, "batch head row key"]
Strength = Float[Tensor, " head"]
Keys = Bool[Tensor, "batch key"]
Ids = tuple[int, ...]
QUOTED: WeakKeyDictionary[nn.Module, dict[Ids, tuple[int, int]]] = WeakKeyDictionary()
"""What models quoted of prompts: where it begins, and how many tokens it has."""


@dataclass(frozen=True)
class Operator:
    """What is done to entries of attention. keys: the keys that it is about, from a pass's arguments.

    change: from a layer's attention, all its entries, `log gamma` of every head and those keys to the changed entries. At a strength of 0
    nothing changes, and gradients flow through it.
    """

    keys: Callable[[VLM, Mapping[str, Any]], Keys]
    change: Callable[[Attention, Probabilities, Strength, Keys], Probabilities]


def real_tokens(_: VLM, given: Mapping[str, Any]) -> Keys:
    """All but padding."""
    return given["attention_mask"].bool()


def nth_token(number: int) -> Callable[[VLM, Mapping[str, Any]], Keys]:
    """One real token, counted from 0."""

    def keys(vlm: VLM, given: Mapping[str, Any]) -> Keys:
        real = real_tokens(vlm, given)
        return (real.cumsum(1) == number + 1) & real

    return keys


def quoted_span(vlm: VLM, given: Mapping[str, Any]) -> Keys:
    """Auto-PASTA (Zhang et al. 2024, arXiv 2409.10790): what the model itself quotes as most important, as the longest run of tokens that
    its quotation shares with the prompt; nothing where that is shorter than `LEAST_QUOTED`. Each prompt is asked once: with a label's
    beginning behind it, it is the same prompt.
    """
    real, known = real_tokens(vlm, given), QUOTED.setdefault(vlm.base, {})
    prompts = [tuple(ids[own].tolist()) for ids, own in zip(given["input_ids"], real, strict=True)]
    new = list(dict.fromkeys(prompt for prompt in prompts if _span(known, prompt) is None))
    if new:
        asked = [ASK.format(prompt=text) for text in vlm.tokenizer.batch_decode([list(prompt) for prompt in new], skip_special_tokens=True)]
        quoted = generate_ids(vlm, encode(vlm, [None] * len(asked), asked, padding_side="left"), QUOTED_TOKENS).tolist()
        special = set(vlm.tokenizer.all_special_ids)
        for prompt, words in zip(new, quoted, strict=True):
            own = [token for token in words if token not in special]
            match = SequenceMatcher(None, prompt, own, autojunk=False).find_longest_match()
            known[prompt] = (match.a, match.size if match.size >= LEAST_QUOTED else 0)
    found = torch.zeros_like(given["input_ids"], dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        start, length = _span(known, prompt) or (0, 0)
        first = int(real[row].int().argmax()) + start
        found[row, first : first + length] = True
    return found


def _span(known: Mapping[Ids, tuple[int, int]], prompt: Ids) -> tuple[int, int] | None:
    """What was quoted of the prompt, or of it less a label's beginning; None where it was not asked."""
    ends = range(len(prompt), max(0, len(prompt) - LONGEST_BEGINNING) - 1, -1)
    return next((known[prompt[:end]] for end in ends if prompt[:end] in known), None)


def scaled(_: Attention, entries: Probabilities, strength: Strength, keys: Keys) -> Probabilities:
    """These keys' entries times gamma, and rows that sum to 1 again."""
    return _weighted(entries, torch.where(keys[:, None, None], strength[None, :, None, None].exp(), 1.0))


def scaled_key(attention: Attention, entries: Probabilities, strength: Strength, keys: Keys) -> Probabilities:
    """One token's key times gamma, which multiplies its scores, before they are capped, where the bias adds to them."""
    place = keys.int().argmax(1)
    rows = torch.arange(len(entries), device=entries.device)
    score = entries[rows, :, :, place].clamp_min(1e-30).log() + attention.lse(attention.every_row())
    gamma, cap = strength.exp()[None, :, None], attention.softcap
    if cap is None:
        factor = (gamma - 1) * score
    else:
        raw = torch.atanh((score / cap).clamp(-CAPPED, CAPPED))
        factor = cap * (torch.tanh(gamma * raw) - torch.tanh(raw))
    largest = factor.clamp_min(0)  # a large score times a large gamma is beyond fp32
    return _weighted(entries, torch.where(keys[:, None, None], (factor - largest).exp()[..., None], (-largest).exp()[..., None]))


def lowered_sinks(_: Attention, entries: Probabilities, strength: Strength, keys: Keys) -> Probabilities:
    """ACT (Yu et al. 2024, arXiv 2406.15765): attention to sinks after the first token times beta, the rest of it to all other tokens in
    proportion. A sink gets, on average over the rows that may see it, more than `SINK / N` of N tokens.
    """
    seen = keys[:, None, :, None] & (entries > 0).any(1, keepdim=True)  # rows of real tokens, and the keys that they may see
    average = (entries * seen).sum(2) / seen.sum(2).clamp_min(1)
    first = one_hot(keys.int().argmax(1), keys.shape[1]).bool()
    sinks = (average > SINK / keys.sum(1)[:, None, None]) & (keys & ~first)[:, None]
    of_sinks, of_others = ((entries * which[:, :, None]).sum(-1, keepdim=True) for which in (sinks, ~sinks))
    beta = torch.where(of_others > 0, strength.exp()[None, :, None, None], 1.0)  # where a window shows sinks alone, nothing changes
    return entries * torch.where(sinks[:, :, None], beta, 1 + (1 - beta) * of_sinks / of_others.clamp_min(1e-30))


OPERATORS: Mapping[str, Operator] = {
    "second_token": Operator(nth_token(1), scaled),
    "key": Operator(nth_token(0), scaled_key),
    "sinks": Operator(real_tokens, lowered_sinks),
    "quotation": Operator(quoted_span, scaled),
}


@contextmanager
def reweighting(vlm: VLM, operator: Operator, strength: Float[Tensor, "layer head"]) -> Iterator[None]:
    """The model with its attention changed inside the block, in passes over whole prompts.

    Raises ValueError in a pass over a cache: there the rows that these changes read are gone.
    """
    keys, parameters = list[Keys](), signature(vlm.base.forward)
    asking = False

    def find(_module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        nonlocal asking
        if not asking:
            given = parameters.bind_partial(*arguments, **options).arguments
            given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
            asking = True  # the operator may ask the model itself, as it is
            try:
                keys[:] = [operator.keys(vlm, given)]
            finally:
                asking = False

    def visit(attention: Attention, _output: Tensor) -> Tensor | None:
        if asking:
            return None
        if attention.query.shape[2] != attention.key.shape[2]:
            raise ValueError(
                "this steering reads whole matrices of attention, and there is a cache: run the model with use_cache=False, an evaluation "
                "with closed = labels"
            )
        (own,) = keys
        entries = attention.probabilities(attention.every_row())
        changed = operator.change(attention, entries, strength[attention.layer], own)
        value = attention.value.to(changed.dtype).repeat_interleave(entries.shape[1] // attention.value.shape[1], dim=1)
        return (changed @ value).transpose(1, 2).to(attention.value.dtype)

    handle = vlm.base.register_forward_pre_hook(find, with_kwargs=True)
    try:
        with visiting(vlm, visit):
            yield
    finally:
        handle.remove()


def _weighted(entries: Probabilities, weight: Float[Tensor, "batch head #row key"]) -> Probabilities:
    """Every entry times its weight, over the new sum of its row."""
    found = entries * weight
    return found / found.sum(-1, keepdim=True).clamp_min(1e-30)
