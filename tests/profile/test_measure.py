"""The profile of the heads: on which questions, and the same as observing the model's own answers."""

from collections import Counter
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from headwise.attention.observe import observe_generated
from headwise.examples import Example
from headwise.profile.causal_flow import absolute_flow, gate_gradients
from headwise.profile.measure import profile_heads
from headwise.profile.saliency import layer_z_scores
from headwise.profile.sample import GREY, MAX_QUESTION_TOKENS, cut_question, draw_sample
from headwise.profile.settings import Profile
from headwise.profile.table import read_profile, write_profile
from headwise.vlm import encode
from tests import tiny
from tests.dataset import write_dataset

SETTINGS = Profile(examples=5, probes=2, max_new_tokens=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "images"
    return folder, write_dataset(folder, calibration=4)


def profiled(place, settings=SETTINGS, vlm=None):
    folder, examples = place
    progress = []
    found = profile_heads(
        vlm or tiny.tiny_vlm(), folder, draw_sample(examples, settings), settings, 2, lambda done, total: progress.append((done, total))
    )
    return found, progress


def test_the_profile_is_what_observing_the_own_answers_gives(place, tmp_path):
    folder, examples = place
    vlm, questions = tiny.tiny_vlm(), draw_sample(examples, SETTINGS)
    found, progress = profiled(place)
    write_profile(found, tmp_path)
    profile = read_profile(tmp_path)
    halves, gradients, maps = [], [], []
    for question in questions:
        image, text = question.open(folder), question.example.question
        (answer,), seen = observe_generated(vlm, encode(vlm, [image], [text], padding_side="left"), SETTINGS.max_new_tokens)
        halves.append((seen.scalars["text_to_image"][0] + seen.scalars["image_to_text"][0]) / 2)
        maps.append(seen.maps["text_image_map"][0].reshape(24, -1))
        gradients.append(gate_gradients(vlm, encode(vlm, [image], [text])).numpy()[0])
        assert (question.example.id, answer) in zip(found.sample["example_id"], found.sample["answer"], strict=True)
    assert profile.isal == pytest.approx(layer_z_scores(np.mean(halves, axis=0)), abs=1e-3)
    assert profile.caf == pytest.approx(absolute_flow(np.array(gradients[:2]), 0.25), rel=1e-3)
    mean = np.mean(maps, axis=0)
    unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    assert profile.cosines == pytest.approx(unit @ unit.T, abs=1e-4)
    assert progress[-1] == (7, 7) and found.forward_equivalents["causal_flow"] == pytest.approx(3 * 2 / 5)
    assert 1 < found.forward_equivalents["answers_and_attention"] < 1.5
    assert [pair[0].example.id for pair in profile.sample] == [question.example.id for question in questions]


def test_questions_are_drawn_by_the_seed_and_as_many_of_every_task(place):
    _, examples = place
    drawn = draw_sample(examples, Profile(examples=9))
    assert Counter(one.example.task for one in drawn) == {"caption": 3, "colour": 3, "count": 3}
    assert drawn == draw_sample(list(reversed(examples)), Profile(examples=9)) != draw_sample(examples, Profile(examples=9, seed=1))
    assert len(draw_sample(examples, Profile(examples=100))) == len(examples) == 12
    assert {e.example.id for e in draw_sample(examples, Profile(examples=6))} < {e.example.id for e in drawn}


def test_shuffled_pairs_show_another_image_and_blank_ones_a_grey_one_of_its_size(place):
    folder, examples = place
    own = {one.id: one.image for one in examples}
    shuffled = draw_sample(examples, Profile(examples=12, pairs="shuffled"))
    assert all(one.example.image != own[one.example.id] for one in shuffled) and len({one.example.image for one in shuffled}) == 4
    assert all(one.open(folder) for one in shuffled)  # the digest of the other image goes with it
    blank = draw_sample(examples, Profile(examples=1, pairs="blank"))[0].open(folder)
    assert blank.size == (120, 90) and blank.getcolors() == [(120 * 90, GREY)]
    with pytest.raises(ValueError, match=r"all 3 examples show images/calibration-0.png: their images cannot be shuffled"):
        draw_sample([one for one in examples if one.image == examples[0].image], Profile(pairs="shuffled"))


def test_controls_change_what_is_seen(place):
    own = profiled(place)[0].heads.filter(pl.col("statistic") == "saliency")["value"].to_numpy()
    blank = profiled(place, replace(SETTINGS, pairs="blank"))[0].heads.filter(pl.col("statistic") == "saliency")["value"].to_numpy()
    assert np.abs(own - blank).max() > 1e-4


def test_a_set_of_one_question_is_profiled(place):
    found, _ = profiled(place, replace(SETTINGS, examples=1))
    assert len(found.sample) == 1 and set(found.heads["n"]) == {1} and found.heads["value"].is_finite().all()


def test_long_questions_are_cut(place):
    vlm = tiny.tiny_vlm()
    short, long = "What colour is it?", "How many squares are in the picture? " * 60
    assert cut_question(vlm, short) == short
    cut = cut_question(vlm, long)
    assert long.startswith(cut) and len(vlm.tokenizer(cut, add_special_tokens=False)["input_ids"]) <= MAX_QUESTION_TOKENS < 400


def test_attention_that_is_no_number_is_refused_by_its_head(place):
    vlm = tiny.new_tiny_vlm()
    with torch.no_grad():
        vlm.decoder.layers[1].self_attn.q_proj.weight[:8] = float("nan")
    with pytest.raises(ValueError, match=r"text_to_image of layer 1, head 0 is not a number: does the model overflow in torch.float32"):
        profiled(place, vlm=vlm)


def test_without_images_there_is_nothing_to_profile(place):
    folder, examples = place
    texts = [replace(one, image=None, sha256=None) for one in examples]
    with pytest.raises(ValueError, match="none of 12 calibration examples has an image"):
        draw_sample(texts, SETTINGS)
    with pytest.raises(ValueError, match="the model reads text alone"):
        profile_heads(tiny.tiny_lm(), folder, draw_sample(examples, SETTINGS), SETTINGS, 2, lambda done, total: None)


def test_a_bad_image_is_left_out_with_its_reason(place):
    folder, examples = place
    broken = [replace(one, sha256="0") if one.image == examples[0].image else one for one in examples]
    assert isinstance(broken[0], Example)
    found, _ = profiled((folder, broken), replace(SETTINGS, examples=12))
    assert len(found.bad) == 3 and all("the bytes differ" in reason for reason in found.bad.values()) and len(found.sample) == 9
