"""Every statistic of every family against the one computed from the model's own eager attention."""

import copy

import numpy as np
import pytest
import torch

from headwise.attention.observe import KNOWN, forward, observe, observe_generated
from headwise.attention.seam import visiting
from headwise.vlm import VLM, Batch, decode_new, encode, generate_ids, stop_ids
from tests import zoo
from tests.attention.oracle import eager_attentions, followed_by, head_statistics, key_variance
from tests.tiny import image, new_tiny_vlm

FAMILIES = [*zoo.VISUAL_FAMILIES, *zoo.TEXT_FAMILIES]
QUESTIONS = ["What colour is it?", "How many green squares are in the picture?", "Where?", "Is there a circle on the left?", "Why?"]
ANSWERS = ["red", "There are three squares, all of them green.", "on the left", "No.", "Because it is large"]
SIZES = [(120, 90), (40, 200), (96, 96), (200, 60), (33, 47)]


def probe(vlm: VLM, number: int, side: str) -> Batch:
    """Examples of unlike length and images of unlike shape; the fifth without an image where the family can."""
    images = [image(i, SIZES[i]) if vlm.visual_id is not None else None for i in range(number)]
    if number == 5 and vlm.visual_id is not None and vlm.base.config.model_type != "instructblip":
        images[4] = None
    return encode(vlm, images, QUESTIONS[:number], ANSWERS[:number], padding_side=side)


def keys_of(vlm: VLM, batch: Batch) -> np.ndarray:
    """The keys as the layers compute them, for every query head; a sliding cache would keep only the last ones."""
    keys: list[torch.Tensor] = []
    with visiting(vlm, lambda attention, output: keys.append(attention.key)):
        forward(vlm, batch)
    stacked = torch.stack(keys, dim=1).double().numpy()
    return stacked.repeat(vlm.num_heads // stacked.shape[2], axis=2)


def largest_differences(vlm: VLM, batch: Batch) -> dict[str, float]:
    """Per statistic, relative to its largest value where that is above 1 (entropies, variances)."""
    found, A, keys = observe(vlm, batch, KNOWN), eager_attentions(vlm, batch), keys_of(vlm, batch)
    worst = dict.fromkeys(KNOWN, 0.0)
    for example in range(len(A)):
        expected = head_statistics(A[example], batch.segments, example)
        expected["key_variance"] = key_variance(keys[example], batch.segments, example)
        for name, value in expected.items():
            ours = found.maps[name][example] if name in found.maps else found.scalars[name][example]
            assert ours.shape == value.shape
            worst[name] = max(worst[name], float(np.abs(ours - value).max(initial=0) / np.abs(value).max(initial=1)))
    return worst


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_statistic_equals_that_of_eager_attention(name: str, number: int, side: str) -> None:
    vlm = zoo.vlm(name)
    worst = largest_differences(vlm, probe(vlm, number, side))
    assert max(worst.values()) < 1e-5, worst


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("name", FAMILIES)
def test_in_bfloat16(name: str, number: int, side: str) -> None:
    vlm = zoo.vlm(name)
    vlm = VLM(copy.deepcopy(vlm.base).to(torch.bfloat16), vlm.processor, vlm.family)
    worst = largest_differences(vlm, probe(vlm, number, side))
    del worst["map_binarised"]  # a step: a token at the mean falls on either side of it
    assert max(worst.values()) < 2e-2, worst


def check_generated(vlm: VLM) -> list[int]:
    """What is observed while the model answers is what its answers give teacher-forced; how long they are."""
    images = [image(i, SIZES[i]) if vlm.visual_id is not None else None for i in range(3)]
    prompts = encode(vlm, images, QUESTIONS[:3], padding_side="left")
    new = generate_ids(vlm, prompts, 6)
    answers, found = observe_generated(vlm, prompts, 6, KNOWN)
    assert answers == decode_new(vlm, new)
    answered = (~torch.isin(new, torch.tensor(sorted(stop_ids(vlm))))).int().cummin(dim=1).values.bool()
    expected = observe(vlm, followed_by(vlm, prompts, new, answered), KNOWN)
    for statistic, value in found.scalars.items():
        np.testing.assert_allclose(value, expected.scalars[statistic], atol=1e-5, err_msg=statistic)
    for statistic, maps in found.maps.items():
        for ours, theirs in zip(maps, expected.maps[statistic], strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=statistic)
    return answered.sum(1).tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_generated_answer_gives_what_it_gives_teacher_forced(name: str) -> None:
    check_generated(zoo.vlm(name))


def test_generated_answers_that_end_at_unlike_steps() -> None:
    vlm = new_tiny_vlm()
    prompts = encode(vlm, [image(i, SIZES[i]) for i in range(3)], QUESTIONS[:3], padding_side="left")
    vlm.base.generation_config.eos_token_id = int(generate_ids(vlm, prompts, 6)[0, 2])
    assert len(set(check_generated(vlm))) > 1
