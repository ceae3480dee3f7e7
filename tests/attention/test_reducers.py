from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.attention.observe import Observed, forward, observe
from headwise.attention.reducers import Reading, statistics
from headwise.attention.schema import MAPS
from headwise.attention.seam import Attention, attend, visiting
from headwise.layout import View
from headwise.segments import Kind, Segments, segments
from headwise.vlm import VLM, Batch, encode
from tests.attention.families import family
from tests.attention.oracle import cached_keys, eager_attentions, head_statistics, key_variance, probe
from tests.tiny import image, tiny_lm, tiny_vlm


def assert_equals_the_oracle(found: Observed, A: np.ndarray, keys: np.ndarray, batch: Batch) -> None:
    group = A.shape[2] // keys.shape[2]
    for example, layer, head in np.ndindex(A.shape[:3]):
        expected = head_statistics(A[example, layer, head], batch.segments, example)
        expected["key_variance"] = key_variance(keys[example, layer, head // group], batch.segments, example)
        for name, value in expected.items():
            ours = found.maps[name][example][layer, head] if name in MAPS else found.scalars[name][example, layer, head]
            np.testing.assert_allclose(ours, value, atol=1e-5, err_msg=f"{name}, example {example}, layer {layer}, head {head}")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model", [tiny_vlm, tiny_lm])
def test_streamed_statistics_equal_the_oracle_on_eager_attention(model, side: str) -> None:
    vlm = model()
    batch = probe(vlm, side)
    assert_equals_the_oracle(observe(vlm, batch), eager_attentions(vlm, batch), cached_keys(vlm, batch), batch)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_heads(kv_heads: int) -> None:
    vlm = family("llama", kv_heads)
    batch = probe(vlm, "left")
    assert_equals_the_oracle(observe(vlm, batch), eager_attentions(vlm, batch), cached_keys(vlm, batch), batch)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "smollm3"])
def test_other_families(model_type: str) -> None:
    vlm = family(model_type)
    batch = probe(vlm, "right")
    A = eager_attentions(vlm, batch)
    assert_equals_the_oracle(observe(vlm, batch), A, key_window(vlm, batch), batch)


def key_window(vlm: VLM, batch: Batch) -> np.ndarray:
    """The keys as the layers compute them; a sliding cache would keep only the last ones."""
    keys: list[torch.Tensor] = []
    with visiting(vlm, lambda attention, output: keys.append(attention.key)):
        forward(vlm, batch)
    return torch.stack(keys, dim=1).double().numpy()


SHAPES = st.fixed_dictionaries(
    {
        **{name: st.integers(1, 3) for name in ("batch", "kv_heads", "group", "width")},
        **{name: st.integers(0, 5) for name in ("system", "visual", "question", "answer")},
        **{name: st.integers(0, 3) for name in ("left", "right")},
        **{"seed": st.integers(0, 2**20), "added": st.booleans(), "scaling": st.floats(0.1, 2)},
    }
)
"""Random numbers of everything; built into a layer outside the strategy, since the type checker samples with `random`."""


def random_layer(shape: dict[str, Any]) -> tuple[Attention, Segments]:
    """A random layer and kinds of tokens with padding on both sides and at least one answer token; the mask is boolean or added."""
    body = [Kind.SYSTEM] * (shape["system"] if shape["visual"] else 0) + [Kind.VISUAL] * shape["visual"]
    body += [Kind.QUESTION] * shape["question"] + [Kind.ANSWER] * (shape["answer"] + 1)
    kinds = torch.tensor([[Kind.NONE] * shape["left"] + body + [Kind.NONE] * shape["right"]] * shape["batch"])
    tokens, kv_heads = kinds.shape[1], shape["kv_heads"]
    random = torch.Generator().manual_seed(shape["seed"])
    query, key, value = (
        torch.randn(shape["batch"], heads, tokens, shape["width"], generator=random)
        for heads in (kv_heads * shape["group"], kv_heads, kv_heads)
    )
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() & (kinds != Kind.NONE)[:, None, None]
    if shape["added"]:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    layout = (View(1, shape["visual"]),) if shape["visual"] else None
    found = attend(query, key, value, mask, shape["scaling"], False)
    assert found is not None
    return Attention(0, query, key, value, mask, shape["scaling"], True, found[1]), segments(kinds, (layout,) * shape["batch"])


def whole(attention: Attention) -> np.ndarray:
    """softmax(q k^T * scaling + mask) in float64, one pair of tokens at a time in spirit: [batch, head, query, key]."""
    assert attention.mask is not None
    group = attention.query.shape[1] // attention.key.shape[1]
    key = attention.key.double().repeat_interleave(group, dim=1)
    scores = attention.query.double() @ key.transpose(2, 3) * attention.scaling
    closed = ~attention.mask if attention.mask.dtype == torch.bool else attention.mask < 0
    return scores.masked_fill(closed, -1e300).softmax(-1).numpy()


@settings(max_examples=50)
@given(SHAPES, st.integers(1, 7))
def test_any_shape_padding_grouping_and_block_size(shape: dict[str, Any], block: int) -> None:
    attention, kinds = random_layer(shape)
    found = statistics(attention, Reading.of(kinds))
    A, group = whole(attention), attention.query.shape[1] // attention.key.shape[1]
    for example, head in np.ndindex(A.shape[:2]):
        expected = head_statistics(A[example, head], kinds, example)
        expected["key_variance"] = key_variance(attention.key.double().numpy()[example, head // group], kinds, example)
        for name, value in expected.items():
            ours = found[name][example, head]
            np.testing.assert_allclose(ours.numpy(), value, atol=2e-5, err_msg=name)


@given(SHAPES, st.integers(1, 7))
def test_rows_are_distributions_that_come_in_order(shape: dict[str, Any], block: int) -> None:
    attention, _ = random_layer(shape)
    blocks = list(attention.rows(block))
    assert [rows.start for rows in blocks] == list(range(0, attention.query.shape[2], block))
    together = torch.cat([rows.probabilities for rows in blocks], dim=2)
    torch.testing.assert_close(together.sum(-1), torch.ones(together.shape[:3]))
    np.testing.assert_allclose(together[:, :, :1].numpy(), next(iter(attention.rows(1))).probabilities.numpy(), atol=1e-6)


def test_masses_sum_to_one() -> None:
    found = observe(tiny_vlm(), probe(tiny_vlm(), "right")).scalars
    np.testing.assert_allclose(found["visual_mass"] + found["text_mass"] + found["system_mass"], 1, atol=1e-5)


def test_a_prompt_of_many_blocks_equals_the_oracle() -> None:
    vlm = tiny_vlm()
    batch = encode(vlm, [image(0)], ["Is it red? " * 12], ["There are three squares and a circle." * 2])
    assert_equals_the_oracle(observe(vlm, batch), eager_attentions(vlm, batch), cached_keys(vlm, batch), batch)


def test_an_answer_that_looks_only_at_the_image_has_no_entropy_elsewhere() -> None:
    """The share of the other keys is 0 / 0 there; it must stay finite."""
    kinds = segments(torch.tensor([[1, 2, 2, 3, 4]]), ((View(1, 2),),))
    key = torch.zeros(1, 1, 5, 1)
    key[:, :, 1:3] = 500.0
    query = torch.ones(1, 1, 5, 1)
    found = attend(query, key, key, None, 1.0, True)
    assert found is not None
    attention = Attention(0, query, key, key, None, 1.0, True, found[1])
    found = statistics(attention, Reading.of(kinds))
    assert all(bool(tensor.isfinite().all()) for tensor in found.values())
    assert float(found["visual_mass"]) == pytest.approx(1)
    assert float(found["nonvisual_entropy"]) == 0
