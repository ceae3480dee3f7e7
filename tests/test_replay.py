"""Replays from a layer on are the whole model with the change, in every family."""

from functools import partial

import pytest
import torch

from headwise.calibration.rah_lora.updates import Factors, scaled, stacked, updated
from headwise.likelihood import answer_logits
from headwise.replay import replay_answers
from headwise.vlm import VLM, encode
from tests import zoo
from tests.tiny import NUM_LAYERS, image


def batch_of(vlm: VLM):
    images = [None, None] if vlm.visual_id is None else [image(1), image(2)]
    return encode(vlm, images, ["What colour is the circle?", "How many?"], ["red", "There are three squares"])


def random_update(vlm: VLM, start: int, seed: int = 0) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator)
    found = {}
    for layer in range(start, NUM_LAYERS):
        for name in ("o_proj", "v_proj"):
            path = f"{vlm.family.decoder}.layers.{layer}.self_attn.{name}"
            out, in_ = vlm.base.get_submodule(path).weight.shape
            found[path] = Factors(0.1 * normal(out, 2), 0.1 * normal(2, in_))
    return found


@pytest.mark.parametrize("name", [*zoo.VISUAL_FAMILIES, *zoo.TEXT_FAMILIES])
def test_a_replay_from_any_layer_is_the_whole_changed_model(name: str) -> None:
    vlm = zoo.vlm(name)
    batch = batch_of(vlm)
    replay = replay_answers(vlm, batch, range(NUM_LAYERS))
    with torch.no_grad():
        own = answer_logits(vlm, batch)
    assert torch.allclose(replay.logits, own, atol=1e-5)
    for start in range(NUM_LAYERS):
        update = random_update(vlm, start)
        with torch.no_grad(), updated(vlm.base, update):
            expected = answer_logits(vlm, batch)
            assert torch.allclose(replay.again(start), expected, atol=1e-5)
        assert (expected - own).abs().max() > 1e-2
    with torch.no_grad():
        assert torch.equal(answer_logits(vlm, batch), own)  # nothing is left on the model


def test_a_replay_runs_no_layer_below_and_no_vision_tower() -> None:
    vlm = zoo.vlm("fast_vlm")
    replay, ran = replay_answers(vlm, batch_of(vlm), [2]), []
    modules = [*[layer.self_attn for layer in vlm.decoder.layers], vlm.base.model.vision_tower]
    handles = [module.register_forward_pre_hook(lambda own, _: ran.append(modules.index(own))) for module in modules]
    replay.again(2)
    for handle in handles:
        handle.remove()
    assert ran == [2, 3]


def test_a_model_that_does_more_after_its_decoder_is_refused() -> None:
    vlm = zoo.fresh("fast_vlm")
    head = vlm.base.get_output_embeddings()
    vlm.base.register_forward_hook(lambda _module, _given, output: output.__setitem__("logits", output.logits * 2))
    assert head is not None
    with pytest.raises(ValueError, match="fast_vlm: its logits are not those of its decoder's stream, they are off by"):
        replay_answers(vlm, batch_of(vlm), [1])


def test_updates_add_up_and_scale() -> None:
    vlm = zoo.vlm("fast_vlm")
    one, other = random_update(vlm, 1, seed=1), random_update(vlm, 2, seed=2)
    both = stacked([scaled(one, 0.5), other])
    for path, factors in both.items():
        expected = 0.5 * one[path].up @ one[path].down + (other[path].up @ other[path].down if path in other else 0)
        assert torch.allclose(factors.up @ factors.down, expected, atol=1e-6)
        assert factors.up.shape[1] == (4 if path in other else 2)
    assert stacked([]) == {}
