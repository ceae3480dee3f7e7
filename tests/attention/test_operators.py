"""What ZeroTuning is compared with, against the slow way: entry by entry from eager attention."""

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from headwise.attention import operators
from headwise.attention.layer import Attention
from headwise.attention.operators import ASK, LEAST_QUOTED, OPERATORS, QUOTED_TOKENS, SINK, quoted_span, reweighting
from headwise.attention.seam import visiting
from headwise.vlm import VLM, Batch, encode, generate_ids
from tests import zoo
from tests.attention.oracle import QUESTIONS, eager_attentions, probe
from tests.attention.test_edits import logits, random_heads
from tests.tiny import new_tiny_lm, tiny_lm, tiny_vlm

MODELS = [tiny_lm, tiny_vlm, lambda: zoo.vlm("gemma2")]


def strength(vlm: VLM, scale: float = 1.0) -> torch.Tensor:
    return scale * random_heads(vlm.num_layers, vlm.num_heads)


def changed_matrix(
    name: str, before: np.ndarray, scores: np.ndarray, cap: float | None, own: float, real: list[int], quoted: list[int]
) -> np.ndarray:
    """One head's entries [query, key] after the change. scores: before the cap. own: log gamma. quoted: the keys that are."""
    after, gamma = before.copy(), float(np.exp(own))
    if name == "second_token":
        after[:, real[1]] *= gamma
        after[real] /= after[real].sum(1, keepdims=True)
    elif name == "quotation":
        for key in quoted:
            after[:, key] *= gamma
        after[real] /= after[real].sum(1, keepdims=True)
    elif name == "key":
        moved = scores.copy()
        moved[:, real[0]] *= gamma
        capped = moved if cap is None else cap * np.tanh(moved / cap)
        weights = np.where(before > 0, np.exp(capped - capped.max(1, keepdims=True)), 0)
        after[real] = (weights / np.maximum(weights.sum(1, keepdims=True), 1e-300))[real]
    else:
        mean = {key: np.mean([before[row, key] for row in real if before[row, key] > 0]) for key in real}
        sinks = [key for key in real[1:] if mean[key] > SINK / len(real)]
        others = [key for key in real if key not in sinks]
        for row in real:
            freed = (1 - gamma) * before[row, sinks].sum()
            total = before[row, others].sum()
            if not total:  # a window that shows sinks alone
                continue
            for key in sinks:
                after[row, key] = gamma * before[row, key]
            for key in others:
                after[row, key] = before[row, key] + freed * before[row, key] / total
    return after


def quoted_by_hand(vlm: VLM, batch: Batch, example: int) -> list[int]:
    """The places of the longest run of tokens that the model repeats when asked to, of all runs."""
    mask = batch.inputs["attention_mask"][example].bool()
    prompt = batch.inputs["input_ids"][example][mask].tolist()
    asked = encode(vlm, [None], [ASK.format(prompt=vlm.tokenizer.decode(prompt, skip_special_tokens=True))], padding_side="left")
    words = [token for token in generate_ids(vlm, asked, QUOTED_TOKENS)[0].tolist() if token not in vlm.tokenizer.all_special_ids]
    runs = [
        (end - start, -start)
        for start in range(len(prompt))
        for end in range(start + 1, len(prompt) + 1)
        if any(words[at : at + end - start] == prompt[start:end] for at in range(len(words)))
    ]
    length, start = max(runs, default=(0, 0))
    length = length if length >= LEAST_QUOTED else 0
    offset = int(mask.int().argmax()) - start
    return list(range(offset, offset + length))


def test_a_model_that_quotes_the_prompt_marks_what_it_quotes(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = new_tiny_lm()
    asked = ["What is it!!!! A film?", "Nothing to see", "!! and !!!"]
    batch = encode(vlm, [None] * 3, asked, padding_side="left")
    (mark,) = vlm.tokenizer("!", add_special_tokens=False)["input_ids"]
    with torch.no_grad():  # a model that always says the mark
        vlm.base.get_output_embeddings().weight.zero_()
        vlm.decoder.norm.register_forward_hook(lambda _module, _given, output: output.abs())
        vlm.base.get_output_embeddings().weight[mark] = 1.0
    found = [row.nonzero()[:, 0].tolist() for row in quoted_span(vlm, batch.inputs)]
    assert found == [quoted_by_hand(vlm, batch, example) for example in range(3)] and [len(row) for row in found] == [4, 0, 3]
    with monkeypatch.context() as patch:  # each prompt is asked once, and with a label's beginning behind it it is the same
        patch.setattr(operators, "generate_ids", None)
        again = {name: pad(own, (0, 2), value=1) for name, own in batch.inputs.items() if name in ("input_ids", "attention_mask")}
        assert [row.nonzero()[:, 0].tolist() for row in quoted_span(vlm, again)] == found
    ids = batch.inputs["input_ids"]
    assert {int(ids[row, place]) for row, places in enumerate(found) for place in places} == {mark}


@pytest.mark.parametrize("name", sorted(OPERATORS))
@pytest.mark.parametrize("model", MODELS)
def test_the_first_layers_entries_are_changed_so(model, name: str) -> None:
    vlm = model()
    batch = probe(vlm, "left")
    before, own = eager_attentions(vlm, batch)[:, 0], strength(vlm, 4.0 if name == "key" else 1.0)  # random heads' scores are small
    seen: list[Attention] = []
    outputs: list[torch.Tensor] = []

    def see(attention: Attention, output: torch.Tensor) -> None:
        seen.append(attention)
        outputs.append(output)

    with torch.no_grad(), reweighting(vlm, OPERATORS[name], own), visiting(vlm, see):
        vlm.model(**batch.inputs)
    place = max(at for at, one in enumerate(seen) if one.layer == 0)  # before it the model may have been asked for its quotation
    attention, output, changed = seen[place], outputs[place], 0.0
    spans = [quoted_by_hand(vlm, batch, example) for example in range(3)]
    group = vlm.num_heads // vlm.num_kv_heads
    for example, head in np.ndindex(3, vlm.num_heads):
        real = batch.inputs["attention_mask"][example].nonzero()[:, 0].tolist()
        query, key, value = attention.query[example, head], attention.key[example, head // group], attention.value[example, head // group]
        scores = (query @ key.T * attention.scaling).double().numpy()
        after = changed_matrix(name, before[example, head], scores, attention.softcap, float(own[0, head]), real, spans[example])
        changed = max(changed, float(np.abs(after - before[example, head])[real].max()))
        np.testing.assert_allclose(
            output[example, real, head].numpy(), (after @ value.double().numpy())[real], atol=1e-5, err_msg=str(head)
        )
    unseen = ["sinks", "quotation"]  # random heads have hardly a sink, and random models quote hardly a word
    if float(attention.key[..., batch.segments.first[0], :].abs().max()) == 0:
        unseen.append("key")  # this model's first token is its padding, whose embedding is 0, and so is a multiple of its key
    assert changed > 0.01 or name in unseen


def test_sinks_are_lowered_where_there_are_some() -> None:
    """Ten tokens, the fourth of which gets half of everybody's attention."""
    entries = torch.full((1, 1, 10, 10), 1.0).tril()
    entries[..., 3] *= 20
    entries /= entries.sum(-1, keepdim=True)
    real, any_layer = torch.ones(1, 10, dtype=torch.bool), list[Attention]()
    vlm = tiny_lm()
    with visiting(vlm, lambda attention, _: any_layer.append(attention)):
        logits(vlm, probe(vlm, "left"))
    after = OPERATORS["sinks"].change(any_layer[0], entries, torch.tensor([0.4]).log(), real)
    torch.testing.assert_close(after[..., 3:, 3], 0.4 * entries[..., 3:, 3])
    torch.testing.assert_close(after.sum(-1), torch.ones(1, 1, 10))
    ratio = after[0, 0, 5, [0, 1, 2, 4, 5]] / entries[0, 0, 5, [0, 1, 2, 4, 5]]
    assert float(ratio.max() - ratio.min()) < 1e-5 and float(ratio[0]) > 1
    assert torch.equal(after[..., :3, :], entries[..., :3, :])


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_a_strength_of_0_changes_nothing_and_afterwards_the_model_is_as_it_was(name: str) -> None:
    vlm = tiny_vlm()
    batch: Batch = encode(vlm, [None] * 3, QUESTIONS, padding_side="left")
    with torch.no_grad():
        plain = logits(vlm, batch)
        with reweighting(vlm, OPERATORS[name], 0 * strength(vlm)):
            torch.testing.assert_close(logits(vlm, batch), plain, atol=1e-4, rtol=1e-4)
        assert torch.equal(logits(vlm, batch), plain) and not vlm.base._forward_pre_hooks


def test_over_a_cache_there_is_a_sentence_instead() -> None:
    vlm = tiny_lm()
    with (
        pytest.raises(ValueError, match=r"there is a cache: run the model with use_cache=False"),
        reweighting(vlm, OPERATORS["sinks"], strength(vlm)),
    ):
        generate_ids(vlm, probe(vlm, "left"), 2)
