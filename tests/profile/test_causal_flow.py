"""The causal flow of every head against finite differences, and against loops over its definition."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from headwise.attention.edits import Edits, editing
from headwise.profile.causal_flow import absolute_flow, gate_gradients, signed_flow
from headwise.vlm import VLM, encode
from tests import tiny

STEP = 1e-5


def losses(vlm: VLM, batch, gates: torch.Tensor) -> torch.Tensor:
    """The loss of every example, word for word: over the question's tokens, by the probabilities of the ungated model's likeliest two."""
    with torch.no_grad():
        own = vlm.model(**batch.inputs).logits.topk(2, dim=-1).indices
        with editing(vlm, Edits(gates=gates), batch.segments):
            logits = vlm.model(**batch.inputs).logits
    found = []
    for example, question in enumerate(batch.segments.question):
        terms = []
        for position in question.nonzero()[:, 0].tolist():
            p = torch.softmax(logits[example, position], dim=-1)
            first, second = own[example, position].tolist()
            terms.append(-torch.log(p[first] / p[second]))
        found.append(torch.stack(terms).mean())
    return torch.stack(found)


def norm(self: LlamaRMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    """The norm in the stream's own type; transformers computes it in fp32, too coarse for differences of 1e-5."""
    return self.weight * hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize("num_kv_heads", [3, 6])
def test_the_gates_gradients_are_finite_differences(num_kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    vlm = tiny.new_tiny_vlm(num_kv_heads=num_kv_heads)
    vlm = replace(vlm, model=vlm.base.double())
    batch = encode(vlm, [tiny.image(1), tiny.image(2)], ["How many stars?", "What colour is the large circle here?"])
    found = gate_gradients(vlm, batch)
    assert found.dtype == torch.float64 and not vlm.base.get_input_embeddings().weight.grad
    for layer in range(vlm.num_layers):
        for head in range(vlm.num_heads):
            ends = []
            for sign in (1, -1):
                gates = torch.ones(vlm.num_layers, vlm.num_heads, dtype=torch.float64)
                gates[layer, head] += sign * STEP
                ends.append(losses(vlm, batch, gates))
            expected = (ends[0] - ends[1]) / (2 * STEP)
            assert torch.allclose(found[:, layer, head], expected, atol=1e-6), (layer, head)
    assert found.abs().max() > 1e-3


def test_a_batch_gives_what_its_examples_give_alone_whether_answers_follow_or_not() -> None:
    vlm = tiny.tiny_vlm()
    images, questions = [tiny.image(1), tiny.image(2)], ["How many stars?", "What colour is the large circle here?"]
    together = gate_gradients(vlm, encode(vlm, images, questions, ["three", "red"]))
    alone = [gate_gradients(vlm, encode(vlm, [image], [question])) for image, question in zip(images, questions, strict=True)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_the_flows_are_their_formulas() -> None:
    gradients = np.random.default_rng(0).normal(size=(5, 2, 3))
    for layer, head in np.ndindex(2, 3):
        own = [float(example[layer, head]) for example in gradients]
        squares = sum(g * g for g in own) / 5
        assert signed_flow(gradients, 0.25)[layer, head] == pytest.approx(sum(own) / 5 + 0.25 * squares)
        assert absolute_flow(gradients, 0.25)[layer, head] == pytest.approx(sum(map(abs, own)) / 5 + 0.25 * squares)
