import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from headwise.attention.edits import Edits, drop_heads, editing
from headwise.attention.layer import Attention, Places
from headwise.attention.observe import observe, observe_generated
from headwise.attention.seam import visiting
from headwise.vlm import VLM, Batch, decode_new, encode, generate, generate_ids, stop_ids
from tests import zoo
from tests.attention.oracle import QUESTIONS, followed_by, head_statistics, probe
from tests.tiny import NUM_HEADS, NUM_LAYERS, image, new_tiny_lm, new_tiny_vlm, tiny_lm, tiny_vlm

MODELS = [tiny_vlm, tiny_lm, lambda: zoo.vlm("gemma2"), lambda: zoo.language_model("mistral", num_key_value_heads=2)]


def random_heads(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(vlm: VLM, batch: Batch) -> Tensor:
    return vlm.model(**batch.inputs, use_cache=False).logits[batch.segments.real]


def slow_weights(attention: Attention, bias: Tensor, first: Tensor) -> Tensor:
    """Every probability, the bias added to the whole matrix of scores: [batch, head, query, key]."""
    group = attention.query.shape[1] // attention.key.shape[1]
    scores = attention.query @ attention.key.repeat_interleave(group, dim=1).transpose(2, 3) * attention.scaling
    if attention.softcap is not None:
        scores = torch.tanh(scores / attention.softcap) * attention.softcap
    is_first = torch.nn.functional.one_hot(first, scores.shape[3])
    scores = scores + bias[:, :, None, None] * is_first[:, None, None]
    mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril() if attention.mask is None else attention.mask
    return scores.masked_fill(~mask, -1e30).softmax(-1)


def slow_edits(vlm: VLM, batch: Batch, gates: Tensor, bias: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits with every layer's output computed from the whole matrix, and the matrices."""
    seen = []

    def visit(attention: Attention, output: Tensor) -> Tensor:
        weights = slow_weights(attention, bias[:, attention.layer], batch.segments.first)
        seen.append(weights)
        values = attention.value.repeat_interleave(weights.shape[1] // attention.value.shape[1], dim=1)
        return ((weights @ values) * gates[:, attention.layer, :, None, None]).transpose(1, 2)

    with visiting(vlm, visit):
        return logits(vlm, batch), seen


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model", MODELS)
def test_gates_and_bias_equal_the_whole_matrix(model, side: str) -> None:
    vlm = model()
    batch = probe(vlm, side)
    gates, bias = (random_heads(3, vlm.num_layers, vlm.num_heads, seed=seed) for seed in (1, 2))
    with torch.no_grad():
        expected, matrices = slow_edits(vlm, batch, gates, bias)
        with editing(vlm, Edits(gates, bias), batch.segments):
            torch.testing.assert_close(logits(vlm, batch), expected, atol=1e-4, rtol=1e-4)
            found = observe(vlm, batch)
    for layer, weights in enumerate(matrices):
        for example in range(3):
            expected = head_statistics(weights[example].double().numpy(), batch.segments, example)
            for name in set(found.scalars) & set(expected):
                np.testing.assert_allclose(found.scalars[name][example, layer], expected[name], atol=1e-5, err_msg=name)


def test_a_bias_of_log_gamma_is_zerotunings_formula() -> None:
    """a0' = gamma a0 / ((gamma - 1) a0 + 1), the others divided by the same (arXiv 2505.11739)."""
    vlm, gamma = tiny_lm(), 3.0
    batch = probe(vlm, "left")
    first = Places(batch.segments.first[:, None], torch.ones(3, 1, dtype=torch.bool))
    plain, biased = [], []
    with torch.no_grad(), visiting(vlm, lambda attention, output: plain.append(attention)):
        logits(vlm, batch)
    edits = Edits(first_bias=torch.full((NUM_LAYERS, NUM_HEADS), gamma).log())
    with torch.no_grad(), editing(vlm, edits, batch.segments), visiting(vlm, lambda attention, output: biased.append(attention)):
        logits(vlm, batch)
    every = plain[0].every_row()
    before, after = (layers[0].probabilities(every)[batch.segments.real.nonzero()[:, 0], :, batch.segments.real.nonzero()[:, 1]]
                     for layers in (plain, biased))  # fmt: skip
    a0 = plain[0].probabilities(every, first)[..., 0][batch.segments.real.nonzero()[:, 0], :, batch.segments.real.nonzero()[:, 1]]
    where = batch.segments.first[batch.segments.real.nonzero()[:, 0]]
    expected = before / ((gamma - 1) * a0 + 1)[..., None]
    expected[torch.arange(len(where)), :, where] *= gamma
    torch.testing.assert_close(after, expected, atol=1e-6, rtol=1e-4)


def test_edits_that_change_nothing_change_nothing() -> None:
    vlm = tiny_vlm()
    batch = probe(vlm, "left")
    ones, zeros = torch.ones(NUM_LAYERS, NUM_HEADS), torch.zeros(NUM_LAYERS, NUM_HEADS)
    with torch.no_grad():
        plain = logits(vlm, batch)
        for edits in (Edits(), Edits(gates=ones), Edits(first_bias=zeros)):
            with editing(vlm, edits, batch.segments):
                assert torch.equal(logits(vlm, batch), plain)


def test_dropping_a_head_is_cutting_its_columns_from_o_proj() -> None:
    vlm, cut = tiny_vlm(), new_tiny_vlm()
    batch = probe(vlm, "right")
    width = vlm.decoder.layers[2].self_attn.head_dim
    with torch.no_grad():
        cut.decoder.layers[2].self_attn.o_proj.weight[:, 4 * width : 5 * width] = 0
        with editing(vlm, drop_heads(vlm, [(2, 4)]), batch.segments):
            torch.testing.assert_close(logits(vlm, batch), logits(cut, batch))
            assert generate(vlm, [image(0)], QUESTIONS[:1], 8) == generate(cut, [image(0)], QUESTIONS[:1], 8)
    with pytest.raises(ValueError, match="no head 6 in layer 0: the model has 4 layers of 6 heads, from 0"):
        drop_heads(vlm, [(0, 6)])


def loss(vlm: VLM, batch: Batch, edits: Edits) -> Tensor:
    with editing(vlm, edits, batch.segments):
        return of_logits(logits(vlm, batch))


def of_logits(found: Tensor) -> Tensor:
    return found.double().log_softmax(-1)[:, 7].mean()


@pytest.mark.parametrize("at", [0.0, 0.5])
@pytest.mark.parametrize("part", ["gates", "first_bias"])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_every_head_at_once(model, part: str, at: float) -> None:
    vlm = model()
    batch = probe(vlm, "left")
    start = torch.full((3, vlm.num_layers, vlm.num_heads), at + (part == "gates"))
    values = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(vlm, batch, Edits(**{part: values})), values)
    others = {"gates": torch.ones_like(start), "bias": torch.zeros_like(start), part.removeprefix("first_"): values}
    (expected,) = torch.autograd.grad(of_logits(slow_edits(vlm, batch, **others)[0]), values)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    for place in [(0, 0, 0), (1, 1, 3), (2, vlm.num_layers - 1, 5)]:  # coarse: the models' norms are in fp32
        sides = []
        for step in (-2e-3, 2e-3):
            moved = start.clone()
            moved[place] += step
            with torch.no_grad():
                sides.append(float(loss(vlm, batch, Edits(**{part: moved}))))
        assert float(gradient[place]) == pytest.approx((sides[1] - sides[0]) / 4e-3, rel=0.02, abs=0.02), place


def test_what_is_observed_carries_gradients() -> None:
    """Through the probabilities to queries and keys, as through a whole softmax."""
    vlm = tiny_vlm()
    batch = probe(vlm, "left")
    seen: list[Attention] = []
    with visiting(vlm, lambda attention, output: seen.append(attention)):
        logits(vlm, batch)
    rows = Places.of(batch.segments.answer)
    for attention in seen:
        query, key = (tensor.detach().requires_grad_() for tensor in (attention.query, attention.key))
        ours = replace(attention, query=query, key=key)
        weight = random_heads(*ours.probabilities(rows).shape)
        found = torch.autograd.grad((ours.probabilities(rows) * weight).sum(), (query, key))
        slow = slow_weights(ours, torch.zeros(query.shape[:2]), batch.segments.first)
        taken = torch.stack([own[:, places] for own, places in zip(slow, rows.index, strict=True)]) * rows.real[:, None, :, None]
        expected = torch.autograd.grad((taken * weight).sum(), (query, key))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_edits_reach_generation_and_what_is_observed_of_it() -> None:
    vlm = tiny_vlm()
    prompts = encode(vlm, [image(0), image(1), None], QUESTIONS, padding_side="left")
    edits = Edits(gates=1 + 0.5 * random_heads(NUM_LAYERS, NUM_HEADS), first_bias=random_heads(NUM_LAYERS, NUM_HEADS))
    plain, _ = observe_generated(vlm, prompts, 6)
    with editing(vlm, edits, prompts.segments):
        answers, found = observe_generated(vlm, prompts, 6)
        assert answers == stepwise(vlm, prompts, 6)
        new = generate_ids(vlm, prompts, 6)
        answered = (~torch.isin(new, torch.tensor(sorted(stop_ids(vlm))))).int().cummin(dim=1).values.bool()
        expected = observe(vlm, followed_by(vlm, prompts, new, answered))
    assert answers != plain
    for name, value in found.scalars.items():
        np.testing.assert_allclose(value, expected.scalars[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_where_layers_run_again(reentrant: bool) -> None:
    """Gradient checkpointing; backward in a thread of its own, as autograd does on a GPU."""
    vlm = new_tiny_lm()
    batch = probe(vlm, "left")
    gates, bias = (0.1 * random_heads(NUM_LAYERS, NUM_HEADS, seed=seed) for seed in (1, 2))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            vlm.base.activation_checkpointing_enable({"use_reentrant": reentrant})
            vlm.base.enable_input_require_grads()
            vlm.base.train()
        parts = [part.clone().requires_grad_() for part in (1 + gates, bias)]
        with editing(vlm, Edits(*parts), batch.segments):
            value = of_logits(logits(vlm, batch))
            backward = threading.Thread(target=value.backward)
            backward.start()
            backward.join()
        found.append([part.grad for part in parts])
    for once, again in zip(*found, strict=True):
        assert again is not None
        torch.testing.assert_close(again, once, rtol=1e-4, atol=1e-6)


def stepwise(vlm: VLM, prompts: Batch, steps: int) -> list[str]:
    """Greedy decoding without a cache: the whole prompt is read again for every token."""
    ids, mask = prompts.inputs["input_ids"], prompts.inputs["attention_mask"]
    new = torch.zeros(len(ids), 0, dtype=torch.int64)
    going = torch.ones(len(ids), 1, dtype=torch.bool)
    for _ in range(steps):
        inputs = prompts.inputs | {"input_ids": torch.cat([ids, new], 1), "attention_mask": pad(mask, (0, new.shape[1]), value=1)}
        with torch.no_grad():
            token = vlm.model(**inputs, use_cache=False).logits[:, -1:].argmax(-1)
        token = torch.where(going, token, vlm.end_id)
        going &= ~torch.isin(token, torch.tensor(sorted(stop_ids(vlm))))
        new = torch.cat([new, token], dim=1)
    return decode_new(vlm, new)


def test_edits_of_another_shape_and_two_biases_are_refused() -> None:
    vlm = tiny_lm()
    batch = probe(vlm, "left")
    with (
        pytest.raises(ValueError, match=r"gates of shape \(2, 2\): \(4, 6\) or \(3, 4, 6\) is needed"),
        editing(vlm, Edits(gates=torch.ones(2, 2)), batch.segments),
    ):
        pass
    bias = Edits(first_bias=torch.zeros(NUM_LAYERS, NUM_HEADS))
    with editing(vlm, bias, batch.segments), pytest.raises(ValueError, match="biased already"), editing(vlm, bias, batch.segments):
        pass


@pytest.mark.parametrize("at", [0.0, 0.3])
def test_the_observed_attention_of_a_frozen_model_follows_the_bias(at: float) -> None:
    """In the first layer neither queries nor keys have gradients: all of it goes through the bias and the log-sum-exp."""
    vlm = tiny_lm()
    frozen = in_double(vlm)
    for parameter in frozen.base.parameters():
        parameter.requires_grad_(False)
    batch = probe(frozen, "left")
    weight = random_heads(3, NUM_HEADS, *[batch.segments.real.shape[1]] * 2).double()

    def read(values: Tensor) -> Tensor:
        seen: list[Attention] = []
        with editing(frozen, Edits(first_bias=values), batch.segments), visiting(frozen, lambda attention, output: seen.append(attention)):
            logits(frozen, batch)
        found = seen[0].probabilities(seen[0].every_row()) * batch.segments.real[:, None, :, None]
        return (found * weight).sum()

    values = torch.full((NUM_LAYERS, NUM_HEADS), at, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(read(values), values)
    for head in range(NUM_HEADS):
        step = torch.zeros_like(values)
        step[0, head] = 1e-4
        with torch.no_grad():
            expected = float(read(values + step) - read(values - step)) / 2e-4
        assert float(gradient[0, head]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def in_double(vlm: VLM) -> VLM:
    base = type(vlm.base)(vlm.base.config).eval()
    base.load_state_dict(vlm.base.state_dict())
    return VLM(base.double(), vlm.processor, vlm.family)
