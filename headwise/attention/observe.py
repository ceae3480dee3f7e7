"""Observe a batch: the statistics of every head, read while the model runs."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import pad

from headwise.attention.layer import Attention, Places
from headwise.attention.reducers import Reading, Sums, statistics
from headwise.attention.schema import MAPS, SCALARS
from headwise.attention.seam import visiting
from headwise.layout import Layout
from headwise.segments import Segments
from headwise.vlm import VLM, Batch, decode_new, generate_ids, stop_ids

ANSWER_ROWS = ("map", "visual_mass", "text_mass", "system_mass", "initial_mass", "max_visual", "nonvisual_entropy")
"""The statistics that read the answer's rows alone: about half the cost."""
STORED = (*MAPS, *SCALARS)
"""The statistics of the attention table."""
KNOWN = (*STORED, "map_binarised")


@dataclass(frozen=True)
class Observed:
    """The statistics of one batch. maps: per name and example, attention to each visual token (none without an image)."""

    maps: dict[str, tuple[Float[np.ndarray, "layer head _"], ...]]
    scalars: dict[str, Float[np.ndarray, "batch layer head"]]
    layouts: tuple[Layout | None, ...]


def observe(vlm: VLM, batch: Batch, wanted: Collection[str] = STORED) -> Observed:
    """The statistics of `reducers` for every example, layer and head of the batch, in fp32.

    One forward pass with the model's own output; attention is held in blocks of rows only. wanted: names out of `KNOWN`. Raises
    ValueError if an example has no answer, on which most statistics rest, or a name is unknown.
    """
    if not bool(batch.segments.answer.any(1).all()):
        raise ValueError("the batch has an example without an answer: encode it with `answers`")
    with observing(vlm, batch.segments, wanted) as layers:
        forward(vlm, batch)
    return _observed(layers, batch.segments)


@contextmanager
def observing(vlm: VLM, segments: Segments, wanted: Collection[str] = STORED) -> Iterator[list[dict[str, Tensor]]]:
    """For a pass of your own over a batch with answers: the list gets each layer's statistics as the layer has run."""
    reading = Reading.of(segments, known(wanted))
    layers = list[dict[str, Tensor]]()

    def visit(attention: Attention, output: Tensor) -> None:
        sums = Sums.of(attention, reading, attention.key.shape[2])
        sums.add_prompt(attention, reading)
        sums.add_answer(attention, reading, reading.answer)
        layers.append(statistics(sums, attention, reading))

    with visiting(vlm, visit):
        yield layers


def observe_generated(vlm: VLM, batch: Batch, max_new_tokens: int, wanted: Collection[str] = STORED) -> tuple[list[str], Observed]:
    """The model's own greedy answers to prompts that are padded on the left, and the statistics of their rows, one a step over the cache.

    The same as `observe` gives of these answers; the end-of-turn token is in no segment. Raises ValueError if a name is unknown, an
    example has an answer already, or a prompt is padded on the right.
    """
    if bool(batch.segments.answer.any()):
        raise ValueError("the batch has answers: encode it without, they are to be generated")
    reading, tokens = Reading.of(batch.segments, known(wanted)), batch.segments.visual.shape[1]
    sums, last, fed = dict[int, Sums](), dict[int, Attention](), list[Places]()
    stops = torch.tensor(sorted(stop_ids(vlm)), device=vlm.device)

    def visit(attention: Attention, output: Tensor) -> None:
        layer = attention.layer
        last[layer] = attention
        if layer not in sums:
            sums[layer] = Sums.of(attention, reading, tokens + max_new_tokens)
            sums[layer].add_prompt(attention, reading)
        else:
            sums[layer].add_answer(attention, reading, fed[-1])

    def note(embedding: nn.Module, arguments: tuple[Tensor]) -> None:
        """Which examples are still answering at this step: the token that is fed is no end."""
        (ids,) = arguments
        if sums:
            going = ~torch.isin(ids, stops)
            fed.append(Places(torch.zeros_like(ids), going & fed[-1].real if fed else going))

    hook = vlm.base.get_input_embeddings().register_forward_pre_hook(note)
    try:
        with visiting(vlm, visit):
            new = generate_ids(vlm, batch, max_new_tokens + 1)  # one more: the last token's row comes when it is fed
    finally:
        hook.remove()
    answered = torch.cat([new[:, :0].bool(), *(step.real for step in fed)], dim=1)
    found = Reading.of(with_answers(batch.segments, answered), reading.wanted)
    size = found.segments.visual.shape[1]
    layers = [statistics(sums[layer].cut(size), _first_keys(last[layer], size), found) for layer in sorted(sums)]
    return decode_new(vlm, new[:, :max_new_tokens]), _observed(layers, found.segments)


def with_answers(prompts: Segments, answered: Bool[Tensor, "batch step"]) -> Segments:
    """The prompts' segments followed by the answers'."""
    steps, tokens = answered.shape[1], prompts.visual.shape[1]
    others = {name: pad(getattr(prompts, name), (0, steps)) for name in ("system", "visual", "question")}
    return replace(prompts, **others, answer=torch.cat([answered.new_zeros(len(answered), tokens), answered], dim=1))


def _first_keys(attention: Attention, size: int) -> Attention:
    return replace(attention, key=attention.key[:, :, :size])


def known(wanted: Collection[str]) -> frozenset[str]:
    """The names. Raises ValueError if one is unknown."""
    if unknown := sorted(set(wanted) - set(KNOWN)):
        raise ValueError(f"no statistic {unknown[0]!r}; there are {', '.join(KNOWN)}")
    return frozenset(wanted)


def _observed(layers: list[dict[str, Tensor]], segments: Segments) -> Observed:
    found = {name: torch.stack([layer[name] for layer in layers], dim=1).cpu().numpy() for name in layers[0]}
    sizes = segments.visual.sum(1).tolist()
    maps = {n: tuple(m[:, :, :size] for m, size in zip(v, sizes, strict=True)) for n, v in found.items() if v.ndim == 4}
    return Observed(maps, {name: values for name, values in found.items() if name not in maps}, segments.layouts)


def forward(vlm: VLM, batch: Batch, logits_to_keep: int = 1, **options: object) -> Any:
    """One pass without gradients or cache; the logits of the last `logits_to_keep` positions (0 = all)."""
    run: Any = vlm.model
    with torch.no_grad():
        output = run(**batch.inputs, use_cache=False, logits_to_keep=logits_to_keep, **options)
    return getattr(output, "language_model_outputs", output)  # InstructBLIP keeps the language model's own one level down
