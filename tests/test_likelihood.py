"""Nats against a slow loop over positions, and their independence of batching and padding."""

from dataclasses import replace

import pytest
import torch

from headwise.likelihood import answer_logits, answer_targets, read_answers, read_continued
from headwise.prefix import read_on, read_prefix
from headwise.vlm import VLM, Batch, encode, generate
from tests import tiny

QUESTIONS = ["What colour is it?", "How many squares are in the picture?", "Describe the image."]
ANSWERS = ["red", "three", "A blue triangle above a green star."]


def batch(vlm: VLM, indices=range(3), padding_side="right") -> Batch:
    images = [tiny.image(i) if vlm.visual_id is not None else None for i in indices]
    return encode(vlm, images, [QUESTIONS[i] for i in indices], [ANSWERS[i] for i in indices], padding_side)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_targets_are_the_answer_and_the_end_of_turn(padding_side):
    encoded = batch(tiny.tiny_vlm(), padding_side=padding_side)
    found = answer_targets(encoded)
    for row, answer in enumerate(ANSWERS):
        ids = tiny.tokenizer()(answer, add_special_tokens=False)["input_ids"]
        assert encoded.inputs["input_ids"][row][found[row]].tolist() == [*ids, tiny.tokenizer().eos_token_id]


@pytest.mark.parametrize("vlm", [tiny.tiny_vlm(), tiny.tiny_lm()], ids=["image and text", "text"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_nats_by_a_loop_over_single_examples(vlm, padding_side):
    with torch.no_grad():
        nats, tokens, _ = read_answers(vlm, batch(vlm, padding_side=padding_side))
        for index in range(3):
            alone = batch(vlm, [index])
            logits = vlm.model(**alone.inputs).logits[0].double()
            ids = alone.inputs["input_ids"][0]
            start = len(ids) - len(tiny.tokenizer()(ANSWERS[index], add_special_tokens=False)["input_ids"]) - 1
            slow = -sum(torch.log_softmax(logits[t - 1], 0)[ids[t]].item() for t in range(start, len(ids)))
            assert nats[index].item() == pytest.approx(slow, abs=1e-4)
            assert tokens[index].item() == len(ids) - start


def test_questions_about_an_image_share_it_and_get_the_same_nats():
    vlm, images, of = tiny.tiny_vlm(), [tiny.image(0), tiny.image(1)], [0, 1, 1]
    encoded = encode(vlm, [images[k] for k in of], QUESTIONS, ANSWERS)
    seen: list[int] = []
    counting = vlm.base.model.vision_tower.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    with torch.no_grad():
        apart, prefix = read_answers(vlm, encoded), read_prefix(vlm, images)
        shared = read_continued(read_on(vlm, prefix, of, encoded))
    counting.remove()
    assert seen == [3, 2]
    assert torch.allclose(shared[0], apart[0], atol=1e-4) and torch.equal(shared[1], apart[1]) and torch.equal(shared[2], apart[2])


def test_where_the_question_comes_before_the_image_nothing_is_shared():
    first = tiny.TEMPLATE.replace("message['content'] %}{% if part", "message['content'] | reverse %}{% if part")
    vlm = tiny.new_tiny_vlm()
    vlm.processor.chat_template = first
    encoded = encode(vlm, [tiny.image(0)] * 3, QUESTIONS, ANSWERS)
    assert not encoded.segments.visual[0, :9].all()
    with torch.no_grad():
        assert not read_prefix(vlm, [tiny.image(0)]).fits(encoded)


def test_nats_have_gradients_and_the_logits_are_the_targets_only():
    vlm = tiny.new_tiny_vlm()
    encoded = batch(vlm)
    nats, tokens, _ = read_answers(vlm, encoded)
    nats.sum().backward()
    assert vlm.decoder.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert answer_logits(vlm, encoded).shape == (tokens.sum().item(), len(tiny.tokenizer()))


def test_nats_in_bfloat16_are_near_those_in_fp32():
    vlm = tiny.new_tiny_vlm()
    low = replace(vlm, model=tiny.new_tiny_vlm().model.bfloat16())
    with torch.no_grad():
        assert torch.allclose(read_answers(low, batch(low))[0], read_answers(vlm, batch(vlm))[0], rtol=0.05)


def test_a_reference_whose_tokens_are_all_likeliest_is_what_greedy_decoding_gives():
    vlm, image, question = tiny.new_tiny_vlm(), tiny.image(0), "What colour is the large circle?"
    with torch.no_grad():
        assert not read_answers(vlm, encode(vlm, [image], [question], ["red"]))[2].any()
    optimizer = torch.optim.Adam(vlm.decoder.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        read_answers(vlm, encode(vlm, [image], [question], ["red"]))[0].sum().backward()
        optimizer.step()
    with torch.no_grad():
        likeliest = read_answers(vlm, encode(vlm, [image] * 2, [question] * 2, ["red", "red star"]))[2]
    assert likeliest.tolist() == [True, False]
    assert generate(vlm, [image], [question], 6) == ["red"]
