"""LoRA on tiny real models: what is trained, what is not, and that it learns."""

import math
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from headwise.calibration.adapter import parameter_count, weights_digest, write_adapter
from headwise.calibration.lora import LOSSES, fit_lora, learning_rate_factor, target_modules
from headwise.calibration.settings import Lora
from headwise.likelihood import answer_logits
from headwise.vlm import Family
from tests import tiny
from tests.dataset import write_dataset

SETTINGS = Lora(rank=4, alpha=8, learning_rate=0.02, steps=12, batch_size=6, warmup_ratio=0.1)
LAYERS = (1, 3)


def ignore(done: int, total: int) -> None:
    """A progress that nobody watches."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "images"
    return folder, write_dataset(folder, calibration=2)


@pytest.fixture(scope="module")
def fit(data):
    return fit_lora(tiny.tiny_vlm(), *data, LAYERS, SETTINGS, ignore)


def test_only_the_projections_of_the_chosen_layers_are_in_the_adapter(fit):
    expected = {
        f"base_model.model.model.language_model.layers.{layer}.self_attn.{name}_proj.lora_{half}.weight"
        for layer in LAYERS
        for name in "qkv"
        for half in "AB"
    }
    assert set(fit.weights) == expected
    assert all(tensor.dtype == torch.float32 for tensor in fit.weights.values())


def test_the_parameters_are_those_of_the_closed_form(fit, tmp_path):
    width, kv_width = tiny.WIDTH, tiny.WIDTH // tiny.NUM_HEADS * tiny.NUM_KV_HEADS
    expected = len(LAYERS) * SETTINGS.rank * ((width + width) + 2 * (width + kv_width))
    write_adapter(fit.config, fit.weights, "tiny", tmp_path)
    assert fit.num_parameters == expected == sum(t.numel() for t in fit.weights.values()) == parameter_count(tmp_path)


def test_the_base_is_handed_back_bit_identical_and_plain(data):
    vlm = tiny.new_tiny_vlm()
    vlm.model.get_input_embeddings().weight.requires_grad_(False)
    digests = weights_digest(vlm.base), weights_digest(vlm.model.model.vision_tower)
    flags = [parameter.requires_grad for parameter in vlm.base.parameters()]
    names = [name for name, _ in vlm.base.named_modules()]
    modes = [module.training for module in vlm.base.modules()]
    fit_lora(vlm, *data, LAYERS, replace(SETTINGS, steps=2), ignore)
    assert digests == (weights_digest(vlm.base), weights_digest(vlm.model.model.vision_tower))
    assert flags == [parameter.requires_grad for parameter in vlm.base.parameters()]
    assert names == [name for name, _ in vlm.base.named_modules()] and not isinstance(vlm.model, PeftModel)
    assert modes == [module.training for module in vlm.base.modules()]


def test_the_digest_sees_one_flipped_bit_and_running_statistics():
    vlm = tiny.new_tiny_vlm()
    before = weights_digest(vlm.base)
    assert before == weights_digest(tiny.new_tiny_vlm().base)
    with torch.no_grad():
        next(b for name, b in vlm.base.named_buffers() if name.endswith("running_mean"))[0] += 1e-7
    assert weights_digest(vlm.base) != before


def test_the_loss_falls_when_it_overfits(data):
    heard: list[tuple[int, int]] = []
    settings = replace(SETTINGS, steps=60, learning_rate=0.03)
    found = fit_lora(tiny.tiny_vlm(), *data, (0, 1, 2, 3), settings, lambda done, total: heard.append((done, total))).losses
    assert found.columns == LOSSES.names and found["step"].to_list() == list(range(60)) and heard == [(step + 1, 60) for step in range(60)]
    assert found["loss"][-5:].mean() < 0.5 * found["loss"][0]


def test_the_first_loss_is_the_base_models(data):
    first = fit_lora(tiny.tiny_vlm(), *data, LAYERS, replace(SETTINGS, steps=1), ignore)
    other = fit_lora(tiny.tiny_vlm(), *data, (0,), replace(SETTINGS, steps=1), ignore)
    assert first.losses["loss"].to_list() == other.losses["loss"].to_list()


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(fit, data, tmp_path):
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    again = fit_lora(tiny.tiny_vlm(), *data, LAYERS, SETTINGS, ignore)
    assert torch.equal(state, torch.random.get_rng_state())
    other = fit_lora(tiny.tiny_vlm(), *data, LAYERS, replace(SETTINGS, seed=1), ignore)
    for name, found in (("fit", fit), ("again", again), ("other", other)):
        (tmp_path / name).mkdir()
        write_adapter(found.config, found.weights, "tiny", tmp_path / name)
    read = {name: (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("fit", "again", "other")}
    assert read["fit"] == read["again"] != read["other"]
    assert fit.losses.equals(again.losses) and not fit.losses.equals(other.losses)


def test_training_changes_the_logits(fit):
    with torch.no_grad():
        assert not torch.allclose(answer_logits(tiny.tiny_vlm(), fit.probe), fit.logits, atol=1e-2)


def test_a_bfloat16_base_trains_an_fp32_adapter(data):
    vlm = tiny.new_tiny_vlm()
    vlm.base.bfloat16()
    found = fit_lora(vlm, *data, LAYERS, SETTINGS, ignore)
    assert {tensor.dtype for tensor in found.weights.values()} == {torch.float32} and vlm.dtype == torch.bfloat16
    assert found.losses["loss"][-1] < found.losses["loss"][0]


def test_a_text_only_model_is_trained_too(data):
    folder, examples = data
    texts = [replace(example, image=None, sha256=None) for example in examples]
    found = fit_lora(tiny.tiny_lm(), folder, texts, LAYERS, replace(SETTINGS, steps=2), ignore)
    assert all(name.startswith("base_model.model.model.layers.") for name in found.weights)


def test_bad_examples_are_left_out_and_counted(data):
    folder, examples = data
    found = fit_lora(
        tiny.tiny_vlm(),
        folder,
        [*examples, replace(examples[0], id="bad", image="none.png")],
        LAYERS,
        replace(SETTINGS, max_bad_share=0.2),
        ignore,
    )
    assert list(found.bad) == ["bad"] and found.num_examples == len(examples)


def test_too_many_bad_examples_stop_the_training(data):
    folder, examples = data
    broken = [replace(example, answers=()) for example in examples]
    with pytest.raises(ValueError, match="6 of 6 examples are bad"):
        fit_lora(tiny.tiny_vlm(), folder, broken, LAYERS, SETTINGS, ignore)


@pytest.mark.parametrize("layers", [(), (0, 0), (4,), (-1,)])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(ValueError, match="expected different layers from 0 to 3"):
        target_modules(tiny.tiny_vlm(), layers)


def test_projections_that_are_not_there_are_refused():
    elsewhere = replace(tiny.tiny_vlm(), family=Family(decoder="model.vision_tower"))
    with pytest.raises(ValueError, match="0 linear maps match, expected 3 in each of 1 layers"):
        target_modules(elsewhere, (0,))


def test_a_loss_that_is_no_number_stops_the_training(data):
    vlm = tiny.new_tiny_vlm()
    with torch.no_grad():
        vlm.decoder.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="the loss is nan"):
        fit_lora(vlm, *data, LAYERS, SETTINGS, ignore)


def test_the_learning_rate_warms_up_and_falls_as_a_cosine():
    settings = Lora(steps=100, warmup_ratio=0.1)
    factors = [learning_rate_factor(step, settings) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert (
        factors[10] == 1.0 and factors[55] == pytest.approx(0.5) and factors[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    )
    assert learning_rate_factor(0, Lora(steps=1, warmup_ratio=0.0)) == 1.0
