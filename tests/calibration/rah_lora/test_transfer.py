"""What heads take over, against the straightforward way to compute it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.calibration.rah_lora.moments import Moments
from headwise.calibration.rah_lora.projections import Projections
from headwise.calibration.rah_lora.settings import RahLora
from headwise.calibration.rah_lora.transfer import Anchor, aligned, effective_rank, low_rank, similarities, transfers
from headwise.vlm import encode
from tests import tiny, zoo
from tests.tiny import image

HEAD_WIDTH = tiny.WIDTH // tiny.NUM_HEADS
FULL = RahLora(rank=0)


def anchor(layer: int, head: int) -> Anchor:
    return Anchor((layer, head), 1.0, 1.0, 1.0, 1.0)


def slow_weight(vlm, layer: int, head: int, name: str) -> np.ndarray:
    """Entry by entry: rows of the head or of its group, columns of the output projection."""
    module = vlm.decoder.layers[layer].self_attn.get_submodule(name)
    weight = module.weight.detach().numpy()
    place = head * tiny.NUM_KV_HEADS // tiny.NUM_HEADS if name in ("k_proj", "v_proj") and vlm.num_kv_heads == tiny.NUM_KV_HEADS else head
    lines = range(place * HEAD_WIDTH, (place + 1) * HEAD_WIDTH)
    return np.array([[weight[i, j] for j in lines] for i in range(len(weight))] if name == "o_proj" else [weight[i] for i in lines])


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    a, b = one.ravel().tolist(), other.ravel().tolist()
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_the_similarity_is_its_formula_and_the_most_alike_come_first() -> None:
    vlm = tiny.tiny_vlm()
    cosines = np.random.default_rng(0).random((24, 24))
    others = [(1, 0), (1, 4), (2, 5), (0, 3)]
    found = similarities(Projections(vlm), (1, 3), others, cosines, RahLora(rho=0.6, w_v=0.7))
    expected = {}
    for layer, head in others:
        value, output = (cosine(slow_weight(vlm, 1, 3, n), slow_weight(vlm, layer, head, n)) for n in ("v_proj", "o_proj"))
        expected[layer, head] = 0.6 * cosines[9, layer * 6 + head] + 0.4 * (0.7 * value + 0.3 * output)
    assert {one.head: one.similarity for one in found} == pytest.approx(expected, abs=1e-5)
    assert [one.similarity for one in found] == sorted((one.similarity for one in found), reverse=True)
    same = similarities(Projections(vlm), (1, 3), [(1, 2)], cosines, RahLora(rho=0.0, w_v=1.0))[0]
    assert same.similarity == same.values == pytest.approx(1.0)  # heads of a group share their values


@given(st.integers(1, 12), st.sampled_from([0.0, 0.1, 0.2, 0.34, 0.49]), st.integers(0, 50))
def test_the_mean_is_trimmed_entry_by_entry(number: int, tau: float, seed: int) -> None:
    from headwise.calibration.rah_lora.transfer import _mean

    weights = np.random.default_rng(seed).normal(size=(number, 3, 2)).astype(np.float32)
    dropped = math.floor(tau * number)
    expected = [[float(np.mean(sorted(weights[:, i, j].tolist())[dropped : number - dropped])) for j in range(2)] for i in range(3)]
    found = _mean([torch.from_numpy(one) for one in weights], RahLora(tau=tau))
    assert found.numpy() == pytest.approx(np.array(expected), abs=1e-5)


def test_an_output_projection_is_written_in_the_targets_basis() -> None:
    generator = torch.Generator().manual_seed(0)
    value, mixing = torch.randn(4, 20, generator=generator), torch.randn(4, 4, generator=generator)
    output = torch.randn(20, 4, generator=generator)
    # values that span the same space: what the head writes of its own values is exactly what the anchor writes of its
    own = mixing @ value
    inputs = torch.randn(50, 20, generator=generator) * torch.linspace(3, 0.1, 20)
    every, some = torch.eye(20), inputs.T @ inputs
    for read in (every, some):
        assert torch.allclose(aligned(output, value, own, read) @ own, output @ value, atol=1e-3)
    assert torch.equal(aligned(output, value, value.clone(), some), output)
    # else the nearest, on the inputs that are read: what lstsq finds, and no small change of it comes nearer
    other = torch.randn(4, 20, generator=generator)
    assert torch.allclose(aligned(output, value, other, every), torch.linalg.lstsq(other.T, (output @ value).T).solution.T, atol=1e-4)
    best = aligned(output, value, other, some)
    assert torch.allclose(best, torch.linalg.lstsq(inputs @ other.T, inputs @ (output @ value).T).solution.T, atol=1e-3)

    def off(found: torch.Tensor) -> float:
        return float(((found @ other - output @ value) @ inputs.T).norm())

    assert off(best) < off(aligned(output, value, other, every))
    for seed in range(5):
        assert off(best + 1e-2 * torch.randn(20, 4, generator=torch.Generator().manual_seed(seed))) > off(best)


@pytest.mark.parametrize("name", ["smol", "qwen2"])
def test_the_moments_are_those_of_what_the_values_read(name: str) -> None:
    """Of every real token, whatever the padding; with a 1 for the bias of qwen2's values."""
    vlm = tiny.tiny_lm() if name == "smol" else zoo.vlm(name)
    batches = [encode(vlm, [None, None], ["what is it?", "a longer question, is it not?"], ["a", "b"]), encode(vlm, [None], ["one"])]
    moments, expected = Moments(Projections(vlm), [1, 2] if name == "smol" else [0, 1]), {1: 0.0}
    for batch in batches:
        with torch.no_grad(), moments.reading(batch):
            stream = vlm.model(**batch.inputs, output_hidden_states=True, use_cache=False).hidden_states[1]
        for row, mask in zip(vlm.decoder.layers[1].input_layernorm(stream), batch.inputs["attention_mask"], strict=True):
            for token in row[mask.bool()]:
                one = torch.cat([token, torch.ones(1)]) if name == "qwen2" else token
                expected[1] = expected[1] + torch.outer(one, one).detach()
    torch.testing.assert_close(moments.of(1), expected[1], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        vlm.model(**batches[0].inputs)
    torch.testing.assert_close(moments.of(1), expected[1], rtol=1e-4, atol=1e-4)  # outside the block nothing is read


def read_moments(vlm) -> Moments:
    """Of one batch of questions, all layers."""
    moments = Moments(Projections(vlm), range(vlm.num_layers))
    batch = encode(vlm, [image(0), image(1)], ["what is on the left of it?", "why?"])
    with torch.no_grad(), moments.reading(batch):
        vlm.model(**batch.inputs)
    return moments


def change(vlm, transfer, layer: int, name: str) -> np.ndarray:
    factors = transfer.update[f"{vlm.family.decoder}.layers.{layer}.self_attn.{name}"]
    return (factors.up @ factors.down).numpy()


def test_without_groups_values_and_outputs_are_the_anchors_mean() -> None:
    vlm = tiny.new_tiny_vlm(num_kv_heads=tiny.NUM_HEADS)
    moments = Moments(Projections(vlm), [])  # where no head shares its values, nothing has to be read
    (found,) = transfers(Projections(vlm), {(1, 2): [anchor(1, 0), anchor(2, 5)]}, moments, FULL)
    assert found.heads == ((1, 2),) and found.layer == 1
    for name in ("v_proj", "o_proj"):
        mean = (slow_weight(vlm, 1, 0, name) + slow_weight(vlm, 2, 5, name)) / 2 - slow_weight(vlm, 1, 2, name)
        whole, lines = np.zeros((tiny.WIDTH, tiny.WIDTH)), slice(2 * HEAD_WIDTH, 3 * HEAD_WIDTH)
        whole[(slice(None), lines) if name == "o_proj" else lines] = mean
        assert change(vlm, found, 1, name) == pytest.approx(whole, abs=1e-5)
    assert len(found.update) == 2
    more = transfers(Projections(vlm), {(1, 2): [anchor(1, 0)]}, moments, replace(FULL, queries_and_keys=True))[0]
    assert {path.rpartition(".")[2] for path in more.update} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    (damped,) = transfers(Projections(vlm), {(1, 2): [anchor(1, 0)]}, moments, replace(FULL, learned="nothing"))
    assert damped.damping[1, 2] == pytest.approx(1.0) and 0.6 < found.damping[1, 2] < 0.9
    for name in ("v_proj", "o_proj"):
        own = change(vlm, damped, 1, name)[(slice(None), lines) if name == "o_proj" else lines]
        assert own == pytest.approx(-slow_weight(vlm, 1, 2, name), abs=1e-5)


def test_in_a_group_the_values_stay_unless_all_of_it_is_targets() -> None:
    vlm = tiny.tiny_vlm()
    projections, anchors, moments = Projections(vlm), [anchor(1, 4), anchor(2, 1)], read_moments(vlm)
    single = transfers(projections, {(1, 0): anchors}, moments, FULL)
    assert [one.heads for one in single] == [((1, 0),)] and len(single[0].update) == 1
    weights = transfers(projections, {(1, 0): anchors}, moments, replace(FULL, grouped="aligned_weights"))
    own = torch.from_numpy(slow_weight(vlm, 1, 0, "v_proj"))
    for found, read in ((single, moments.of(1)), (weights, torch.eye(tiny.WIDTH))):
        parts = [[torch.from_numpy(slow_weight(vlm, *a.head, name)) for name in ("o_proj", "v_proj")] for a in anchors]
        learned = [aligned(output, value, own, read) for output, value in parts]
        mean = (learned[0] + learned[1]).numpy() / 2 - slow_weight(vlm, 1, 0, "o_proj")
        assert change(vlm, found[0], 1, "o_proj")[:, :HEAD_WIDTH] == pytest.approx(mean, abs=float(1e-3 * abs(mean).max()))
    plain = transfers(projections, {(1, 0): anchors}, moments, replace(FULL, grouped="output_only"))[0]
    mean = (slow_weight(vlm, 1, 4, "o_proj") + slow_weight(vlm, 2, 1, "o_proj")) / 2 - slow_weight(vlm, 1, 0, "o_proj")
    assert change(vlm, plain, 1, "o_proj")[:, :HEAD_WIDTH] == pytest.approx(mean, abs=1e-5)
    assert not change(vlm, plain, 1, "o_proj")[:, HEAD_WIDTH:].any()

    whole = transfers(projections, {(1, 0): anchors, (1, 1): [anchor(1, 5)], (1, 2): anchors}, moments, FULL)
    assert [one.heads for one in whole] == [((1, 0), (1, 1)), ((1, 2),)]
    # the anchors 1.4 and 1.5 share their values, which count once
    mean = (slow_weight(vlm, 1, 4, "v_proj") + slow_weight(vlm, 2, 1, "v_proj")) / 2 - slow_weight(vlm, 1, 0, "v_proj")
    assert change(vlm, whole[0], 1, "v_proj")[:HEAD_WIDTH] == pytest.approx(mean, abs=1e-5)
    assert not change(vlm, whole[0], 1, "v_proj")[HEAD_WIDTH:].any()
    assert set(whole[0].singular_values) == {(1, 0), (1, 1)}


def test_a_whole_group_that_learns_from_one_becomes_it() -> None:
    vlm = tiny.tiny_vlm()
    (found,) = transfers(Projections(vlm), {(1, 0): [anchor(2, 4)], (1, 1): [anchor(2, 5)]}, Moments(Projections(vlm), []), FULL)
    for target, model in (((1, 0), (2, 4)), ((1, 1), (2, 5))):
        changed = {}
        for name in ("v_proj", "o_proj"):
            lines = slice(*(HEAD_WIDTH * (target[1] // 2 if name == "v_proj" else target[1]) + step for step in (0, HEAD_WIDTH)))
            change_ = change(vlm, found, 1, name)
            changed[name] = slow_weight(vlm, *target, name) + (change_[:, lines] if name == "o_proj" else change_[lines])
        expected = slow_weight(vlm, *model, "o_proj") @ slow_weight(vlm, *model, "v_proj")
        assert changed["o_proj"] @ changed["v_proj"] == pytest.approx(expected, abs=1e-5)


def test_values_with_a_bias_are_aligned_with_it() -> None:
    vlm = zoo.vlm("qwen2")
    projections = Projections(vlm)
    values = projections.values((1, 0))
    states = torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    made = vlm.decoder.layers[1].self_attn.v_proj(states)[:, : len(values)]
    assert torch.allclose(torch.cat([states, torch.ones(5, 1)], dim=1) @ values.T, made, atol=1e-5)


@given(st.integers(1, 6), st.integers(0, 20))
def test_a_rank_keeps_the_largest_singular_values(rank: int, seed: int) -> None:
    matrix = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed))
    factors, values = low_rank(matrix, rank)
    assert factors.up.shape == (9, min(rank, 5)) and factors.down.shape == (min(rank, 5), 5)
    left = np.linalg.svd(matrix.numpy(), compute_uv=False)
    assert values == pytest.approx(left, abs=1e-5)
    error = float((factors.up @ factors.down - matrix).norm())
    assert error == pytest.approx(math.sqrt(sum(value**2 for value in left[rank:])), abs=1e-4)
    whole, _ = low_rank(matrix, 0)
    assert torch.allclose(whole.up @ whole.down, matrix, atol=1e-5)


def test_the_effective_rank_counts_equal_values() -> None:
    assert effective_rank(np.array([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(np.array([5.0])) == pytest.approx(1) and effective_rank(np.zeros(3)) == 0


def test_weights_that_are_quantised_are_refused_with_the_reason() -> None:
    vlm = tiny.new_tiny_vlm()
    weight = vlm.decoder.layers[1].self_attn.v_proj.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"1\.self_attn\.v_proj: weights of torch\.float8_e4m3fn cannot be averaged; if the model is quan"):
        Projections(vlm).weight((1, 0), "v_proj")
    linear = vlm.decoder.layers[0].self_attn
    linear.o_proj = torch.nn.Sequential(linear.o_proj)
    with pytest.raises(ValueError, match=r"0\.self_attn\.o_proj: Sequential is no linear map whose weights RAH-LoRA could average; if the"):
        Projections(vlm).weight((0, 0), "o_proj")
