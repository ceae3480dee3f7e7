from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.attention import entries, layer
from headwise.attention.kernels import attend
from headwise.attention.layer import Attention, FirstBias, Places
from headwise.attention.observe import ANSWER_ROWS, KNOWN, STORED, Observed, observe
from headwise.attention.reducers import Reading, Sums, statistics
from headwise.layout import View
from headwise.segments import Kind, Segments, segments
from headwise.vlm import Batch, encode
from tests.attention.oracle import cached_keys, eager_attentions, head_statistics, key_variance, probe
from tests.tiny import image, tiny_lm, tiny_vlm
from tests.zoo import language_model


def assert_equals_the_oracle(found: Observed, A: np.ndarray, keys: np.ndarray, batch: Batch) -> None:
    group = A.shape[2] // keys.shape[2]
    for example in range(len(A)):
        expected = head_statistics(A[example], batch.segments, example)
        expected["key_variance"] = key_variance(keys[example].repeat(group, axis=1), batch.segments, example)
        for name, value in expected.items():
            ours = found.maps[name][example] if name in found.maps else found.scalars[name][example]
            np.testing.assert_allclose(ours, value, atol=1e-5, err_msg=f"{name}, example {example}")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model", [tiny_vlm, tiny_lm])
def test_streamed_statistics_equal_the_oracle_on_eager_attention(model, side: str) -> None:
    vlm = model()
    batch = probe(vlm, side)
    assert_equals_the_oracle(observe(vlm, batch, KNOWN), eager_attentions(vlm, batch), cached_keys(vlm, batch), batch)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_heads(kv_heads: int) -> None:
    vlm = language_model("llama", num_key_value_heads=kv_heads)
    batch = probe(vlm, "left")
    assert_equals_the_oracle(observe(vlm, batch, KNOWN), eager_attentions(vlm, batch), cached_keys(vlm, batch), batch)


SHAPES = st.fixed_dictionaries(
    {
        **{name: st.integers(1, 3) for name in ("batch", "kv_heads", "group", "width")},
        **{name: st.integers(0, 5) for name in ("system", "visual", "question", "answer")},
        **{name: st.integers(0, 3) for name in ("left", "right")},
        **{"seed": st.integers(0, 2**20), "scaling": st.floats(0.1, 2)},
        "mask": st.sampled_from(["causal", "prefix", "window"]),
        "softcap": st.sampled_from([None, 2.0]),
        "biased": st.booleans(),
    }
)
"""Random numbers of everything; built into a layer outside the strategy, since the type checker samples with `random`."""


def random_layer(shape: dict[str, Any]) -> tuple[Attention, Segments]:
    """A random layer and kinds of tokens with padding on both sides and at least one answer token."""
    body = [Kind.SYSTEM] * (shape["system"] if shape["visual"] else 0) + [Kind.VISUAL] * shape["visual"]
    body += [Kind.QUESTION] * shape["question"] + [Kind.ANSWER] * (shape["answer"] + 1)
    kinds = torch.tensor([[Kind.NONE] * shape["left"] + body + [Kind.NONE] * shape["right"]] * shape["batch"])
    tokens, kv_heads = kinds.shape[1], shape["kv_heads"]
    random = torch.Generator().manual_seed(shape["seed"])
    query, key, value = (
        torch.randn(shape["batch"], heads, tokens, shape["width"], generator=random)
        for heads in (kv_heads * shape["group"], kv_heads, kv_heads)
    )
    layout = (View(1, shape["visual"]),) if shape["visual"] else None
    found = segments(kinds, (layout,) * shape["batch"])
    first = Places(found.first[:, None], torch.ones_like(found.first[:, None], dtype=torch.bool))
    bias = FirstBias(torch.randn(query.shape[:2], generator=random), first, is_zero=False) if shape["biased"] else None
    mask = None if shape["mask"] == "causal" and not shape["left"] + shape["right"] else random_mask(kinds, shape["mask"])
    attention = Attention(0, query, key, value, mask, shape["scaling"], mask is None, shape["softcap"], bias)
    if bias is None and attention.softcap is None:
        fused = attend(query, key, value, mask, shape["scaling"], mask is None)
        assert fused is not None
        attention = replace(attention, known_lse=fused[1])
    return attention, found


def random_mask(kinds: torch.Tensor, kind: str) -> torch.Tensor:
    """Padding is closed; a prefix-LM's prompt attends both ways; a window of 4 tokens."""
    tokens = kinds.shape[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(len(kinds), 1, -1, -1)
    if kind == "prefix":
        prompt = (kinds != Kind.NONE) & (kinds != Kind.ANSWER)
        mask = mask | (prompt[:, None, :, None] & prompt[:, None, None, :])
    if kind == "window":
        mask = mask & torch.ones(tokens, tokens, dtype=torch.bool).triu(-3)
    return mask & (kinds != Kind.NONE)[:, None, None]


def whole(attention: Attention) -> np.ndarray:
    """softmax(cap(q k^T * scaling) + bias + mask) in float64, with every key repeated: [batch, head, query, key]."""
    group = attention.query.shape[1] // attention.key.shape[1]
    key = attention.key.double().repeat_interleave(group, dim=1)
    scores = attention.query.double() @ key.transpose(2, 3) * attention.scaling
    if attention.softcap is not None:
        scores = torch.tanh(scores / attention.softcap) * attention.softcap
    if attention.first_bias is not None:
        for example, first in enumerate(attention.first_bias.first.index[:, 0].tolist()):
            scores[example, :, :, first] += attention.first_bias.bias[example, :, None]
    mask = torch.ones_like(scores[:1, :1], dtype=torch.bool).tril() if attention.mask is None else attention.mask
    return scores.masked_fill(~mask, -1e300).softmax(-1).numpy()


def summed(attention: Attention, reading: Reading) -> Sums:
    sums = Sums.of(attention, reading, attention.key.shape[2])
    sums.add_prompt(attention, reading)
    sums.add_answer(attention, reading, reading.answer)
    return sums


@settings(max_examples=100)
@given(SHAPES, st.integers(1, 1000))
def test_any_shape_padding_mask_grouping_cap_bias_and_block_size(shape: dict[str, Any], block: int) -> None:
    attention, kinds = random_layer(shape)
    check(attention, kinds, KNOWN, block)


@settings(max_examples=100)
@given(SHAPES)
def test_the_compiled_sums_on_any_shape_padding_mask_and_grouping(shape: dict[str, Any]) -> None:
    attention, kinds = random_layer(shape | {"softcap": None, "biased": False})
    with patch.multiple(layer, FUSED_KEYS=0, FUSED_ENTRIES=0):
        check(attention, kinds, STORED)


def check(attention: Attention, kinds: Segments, wanted: tuple[str, ...], block: int = 1 << 20) -> None:
    """Every wanted statistic against the oracle on the whole matrix in float64."""
    with patch.dict(entries.BLOCK_BYTES, cpu=block), patch.object(entries, "BLOCK_COLUMNS", 1 + block % 5):
        reading = Reading.of(kinds, frozenset(wanted))
        found = statistics(summed(attention, reading), attention, reading)
    A, group = whole(attention), attention.query.shape[1] // attention.key.shape[1]
    assert set(found) == set(wanted)
    for example in range(len(A)):
        expected = head_statistics(A[example], kinds, example)
        expected["key_variance"] = key_variance(attention.key.double().numpy()[example].repeat(group, axis=0), kinds, example)
        assert set(expected) == set(KNOWN)
        for name in wanted:
            value = expected[name]
            np.testing.assert_allclose(found[name][example].numpy(), value, atol=1e-5, err_msg=name)


@given(SHAPES)
def test_rows_that_come_one_by_one_give_the_same(shape: dict[str, Any]) -> None:
    attention, kinds = random_layer(shape)
    reading = Reading.of(kinds, frozenset(KNOWN))
    together, stepwise = summed(attention, reading), Sums.of(attention, reading, attention.key.shape[2])
    stepwise.add_prompt(attention, reading)
    for at in range(reading.answer.index.shape[1]):
        stepwise.add_answer(attention, reading, Places(reading.answer.index[:, at : at + 1], reading.answer.real[:, at : at + 1]))
    for name, value in vars(stepwise).items():
        torch.testing.assert_close(value, getattr(together, name), atol=1e-5, rtol=1e-5)


@given(SHAPES)
def test_only_what_is_wanted_is_given_and_it_is_the_same(shape: dict[str, Any]) -> None:
    attention, kinds = random_layer(shape)
    every, some = (Reading.of(kinds, frozenset(names)) for names in (KNOWN, ANSWER_ROWS))
    found = statistics(summed(attention, some), attention, some)
    assert set(found) == set(ANSWER_ROWS)
    everything = statistics(summed(attention, every), attention, every)
    assert all(torch.equal(value, everything[name]) for name, value in found.items())


def test_masses_sum_to_one() -> None:
    found = observe(tiny_vlm(), probe(tiny_vlm(), "right")).scalars
    np.testing.assert_allclose(found["visual_mass"] + found["text_mass"] + found["system_mass"], 1, atol=1e-5)


def test_a_prompt_of_many_blocks_equals_the_oracle() -> None:
    vlm = tiny_vlm()
    batch = encode(vlm, [image(0)], ["Is it red? " * 12], ["There are three squares and a circle." * 2])
    assert_equals_the_oracle(observe(vlm, batch, KNOWN), eager_attentions(vlm, batch), cached_keys(vlm, batch), batch)


@pytest.mark.parametrize("fewest", [0, 1 << 60])
def test_an_answer_that_looks_only_at_the_image_has_no_entropy_elsewhere(fewest: int) -> None:
    """The share of the other keys is 0 / 0 there, and the visual keys' would be infinite; all must stay finite."""
    kinds = segments(torch.tensor([[1, 2, 2, 3, 4, 4, 4, 4, 4, 4]]), ((View(1, 2),),))
    key = torch.zeros(1, 1, 10, 1)
    key[:, :, 1:3] = 500.0
    query = torch.ones(1, 1, 10, 1)
    attention = Attention(0, query, key, key, None, 1.0, True)
    reading = Reading.of(kinds, frozenset(STORED))
    with patch.multiple(layer, FUSED_KEYS=fewest, FUSED_ENTRIES=fewest):
        found = statistics(summed(attention, reading), attention, reading)
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
    assert float(found["visual_mass"]) == pytest.approx(1, abs=1e-4)
    assert float(found["nonvisual_entropy"]) == 0


def test_unknown_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="no statistic 'mass'; there are map, "):
        observe(tiny_vlm(), probe(tiny_vlm(), "left"), ["map", "mass"])


def test_a_key_that_is_filled_up_counts_nothing_whatever_its_score() -> None:
    """Filled-up places point at the first token: padding, whose key may be of any size."""
    kinds = segments(torch.tensor([[0, 2, 2, 3, 4], [1, 2, 3, 4, 4]]), ((View(1, 2),), (View(1, 1),)))
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 1, 5, 4, generator=random) for _ in range(2))
    key[1, :, 0] = 1e4 * query[1, :, 2]
    query[1, :, 0] = key[1, :, 0]
    mask = random_mask(torch.tensor([[0, 2, 2, 3, 4], [0, 2, 3, 4, 4]]), "causal")
    attention = Attention(0, query, key, key, mask, 1.0, False)
    reading = Reading.of(kinds, frozenset(STORED))
    found = statistics(summed(attention, reading), attention, reading)
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
