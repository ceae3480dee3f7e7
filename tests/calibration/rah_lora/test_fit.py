"""RAH-LoRA as a whole: the trust region measured anew, the adapter against edited weights, and what it says of every head."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from peft import PeftModel

from headwise.calibration.adapter import prove_adapter, weights_digest, write_adapter
from headwise.calibration.rah_lora.fit import ABOVE_DELTA, NO_ANCHOR, calibration_batches, fit_rah_lora
from headwise.calibration.rah_lora.settings import RahLora
from headwise.examples import read_examples
from headwise.likelihood import answer_logits, answer_targets
from headwise.profile.measure import profile_heads
from headwise.profile.sample import draw_sample
from headwise.profile.settings import Profile
from headwise.profile.table import HeadProfile, read_profile, write_profile
from headwise.vlm import VLM
from tests import tiny
from tests.dataset import write_dataset

SETTINGS = RahLora(p_isal=40.0, p_caf=20.0, layers=(0.0, 1.0), beta=0.1, rank=3, max_alpha=0.5, delta=1.0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "images"
    write_dataset(folder, calibration=3)
    return folder


def profile_of(vlm: VLM, images, folder, examples: int = 6) -> HeadProfile:
    settings = Profile(examples=examples, probes=3, max_new_tokens=4)
    questions = draw_sample(read_examples(images), settings)
    write_profile(profile_heads(vlm, images, questions, settings, 4, lambda done, total: None), folder)
    return read_profile(folder)


@pytest.fixture(scope="module", params=[tiny.NUM_KV_HEADS, tiny.NUM_HEADS], ids=["grouped", "ungrouped"])
def place(request, images, tmp_path_factory):
    vlm = tiny.new_tiny_vlm(num_kv_heads=request.param)
    return vlm, profile_of(vlm, images, tmp_path_factory.mktemp("profile"))


def fitted(place, images, settings: RahLora):
    vlm, profile = place
    return fit_rah_lora(vlm, images, profile, settings, 4, lambda done, total: None)


def divergence(vlm: VLM, changed: VLM, images, profile: HeadProfile) -> float:
    """Example by example and position by position, from the definition."""
    means = []
    with torch.no_grad():
        for batch in calibration_batches(vlm, images, profile.sample, 1):
            p, q = (torch.softmax(model.model(**batch.inputs).logits[0].double(), dim=-1) for model in (vlm, changed))
            places = [position - 1 for position in answer_targets(batch)[0].nonzero()[:, 0].tolist()]
            means.append(sum(float((p[i] * (p[i] / q[i]).log()).sum()) for i in places) / len(places))
    return sum(means) / len(means)


@pytest.mark.parametrize("mode", ["joint", "greedy"])
def test_the_adapter_is_the_edited_weights_and_as_far_as_it_says(place, images, tmp_path, mode):
    (vlm, profile), settings = place, replace(SETTINGS, mode=mode, order="caf")
    before = weights_digest(vlm.base)
    found = fitted(place, images, settings)
    assert weights_digest(vlm.base) == before == found.base_sha256
    assert (found.targets["outcome"] == "accepted").sum() >= 3
    write_adapter(found.config, found.weights, "some/model", tmp_path)
    adapted = PeftModel.from_pretrained(tiny.new_tiny_vlm(num_kv_heads=vlm.num_kv_heads).base, tmp_path).eval()
    edited = tiny.new_tiny_vlm(num_kv_heads=vlm.num_kv_heads)
    with torch.no_grad():
        for name, down in found.weights.items():
            if "lora_A" in name:
                path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                edited.base.get_submodule(path).weight += found.weights[name.replace("lora_A", "lora_B")] @ down
        logits = [answer_logits(one, found.probe) for one in (replace(vlm, model=adapted), edited)]
        own = answer_logits(vlm, found.probe)
    assert torch.allclose(logits[0], logits[1], atol=1e-5) and torch.allclose(logits[0], found.logits, atol=1e-5)
    assert (logits[0] - own).abs().max() > 1e-2
    prove_adapter(vlm, tmp_path, found.probe, found.logits)
    measured = divergence(vlm, replace(vlm, model=adapted), images, profile)
    assert measured == pytest.approx(found.kl, abs=1e-5) and 0 < measured <= settings.delta


@pytest.mark.parametrize("mode", ["joint", "greedy"])
def test_step_sizes_are_halved_until_the_divergence_is_small_enough(place, images, tmp_path, mode):
    vlm, profile = place
    loose = fitted(place, images, replace(SETTINGS, mode=mode))
    settings = replace(SETTINGS, mode=mode, delta=loose.kl / 5)
    found = fitted(place, images, settings)
    assert found.kl <= settings.delta < loose.kl
    allowed = {settings.max_alpha / 2**halving for halving in range(settings.halvings + 1)}
    tried = found.targets.filter(pl.col("outcome") != "skipped")
    assert set(tried["alpha"]) <= allowed | {0.0} and min(tried["alpha"]) < settings.max_alpha
    for _, trials in found.trials.group_by("layer", "head", maintain_order=True):
        alphas, accepted = trials["alpha"].to_list(), trials["accepted"].to_list()
        assert alphas == [settings.max_alpha / 2**halving for halving in range(len(alphas))]
        assert not any(accepted[:-1]) and (accepted[-1] or len(alphas) == settings.halvings + 1)
        assert [kl <= settings.delta for kl in trials["kl"]] == accepted
    rolled_back = found.targets.filter(pl.col("outcome") == "rolled back")
    assert set(rolled_back["alpha"]) <= {0.0} and set(rolled_back["reason"]) <= {ABOVE_DELTA}
    assert (rolled_back["kl_before"] == rolled_back["kl_after"]).all()
    write_adapter(found.config, found.weights, "some/model", tmp_path)
    adapted = PeftModel.from_pretrained(tiny.new_tiny_vlm(num_kv_heads=vlm.num_kv_heads).base, tmp_path).eval()
    measured = divergence(vlm, replace(vlm, model=adapted), images, profile)
    assert measured == pytest.approx(found.kl, abs=1e-5) and measured <= settings.delta + 1e-6


def test_what_no_step_fits_is_rolled_back_whole(place, images, tmp_path):
    vlm, _ = place
    before = [parameter.clone() for parameter in vlm.base.parameters()]
    found = fitted(place, images, replace(SETTINGS, delta=1e-12, halvings=2))
    assert set(found.targets["outcome"]) == {"rolled back"} and found.kl == 0
    assert all(torch.equal(one, other) for one, other in zip(before, vlm.base.parameters(), strict=True))
    assert_changes_nothing(vlm, found, tmp_path)


def assert_changes_nothing(vlm: VLM, found, folder) -> None:
    """The folder is a plain adapter that can be loaded, and the model with it is the model."""
    write_adapter(found.config, found.weights, "some/model", folder)
    adapted = PeftModel.from_pretrained(tiny.new_tiny_vlm(num_kv_heads=vlm.num_kv_heads).base, folder).eval()
    with torch.no_grad():
        own, logits = answer_logits(vlm, found.probe), answer_logits(replace(vlm, model=adapted), found.probe)
    assert torch.equal(own, logits) and torch.equal(own, found.logits)


@pytest.mark.parametrize("alike", ["isal", "caf"])
def test_where_all_heads_are_alike_nothing_is_selected_and_nothing_changes(place, images, tmp_path, alike):
    vlm, profile = place
    same = replace(profile, **{alike: np.zeros_like(profile.isal)})
    found = fit_rah_lora(vlm, images, same, SETTINGS, 4, lambda done, total: None)
    assert found.targets.is_empty() and found.trials.is_empty() and found.kl == 0
    assert_changes_nothing(vlm, found, tmp_path)


def test_targets_without_an_anchor_anywhere_are_skipped_with_the_reason(place, images, tmp_path):
    vlm, _ = place
    found = fitted(place, images, replace(SETTINGS, beta=99.0))
    assert len(found.targets) and set(found.targets["outcome"]) == {"skipped"} and set(found.targets["reason"]) == {NO_ANCHOR}
    assert found.targets["alpha"].null_count() == len(found.targets) and found.trials.is_empty()
    assert_changes_nothing(vlm, found, tmp_path)


def test_a_calibration_set_of_one_is_enough(place, images, tmp_path):
    vlm, _ = place
    profile = profile_of(vlm, images, tmp_path, examples=1)
    found = fit_rah_lora(vlm, images, profile, SETTINGS, 4, lambda done, total: None)
    assert 0 < found.kl <= SETTINGS.delta and found.forward_equivalents <= 7


def test_every_target_says_why_and_by_whom(place, images):
    _, profile = place
    found = fitted(place, images, replace(SETTINGS, mode="greedy"))
    for row in found.targets.iter_rows(named=True):
        layer, head = row["layer"], row["head"]
        assert row["isal"] == profile.isal[layer, head] < np.percentile(profile.isal[layer], SETTINGS.p_isal)
        assert row["caf"] == profile.caf[layer, head] > np.percentile(profile.caf[layer], SETTINGS.p_caf)
        assert 1 <= len(row["anchors"]) <= SETTINGS.anchors
        assert all(profile.isal[one["layer"], one["head"]] > SETTINGS.beta for one in row["anchors"])
        assert len(row["singular_values"]) == tiny.WIDTH // tiny.NUM_HEADS and row["effective_rank"] > 1
        assert -1 <= row["damping"] <= 1
    order = found.trials.unique(["layer", "head"], maintain_order=True).select("layer", "head").rows()
    assert order == sorted(order, reverse=True)  # the deepest first
    assert found.targets["kl_after"].max() == pytest.approx(found.trials.filter("accepted")["kl"].max())


def test_only_layers_from_the_first_change_on_are_run_again(place, images):
    vlm, _ = place
    found = fitted(place, images, replace(SETTINGS, mode="joint"))
    first = found.targets.filter(pl.col("outcome") == "accepted")["layer"].min()
    share = (vlm.num_layers - first) / vlm.num_layers
    extra = len(found.curve) - 1  # the accepted change is known
    assert found.forward_equivalents == pytest.approx(1 + (len(found.trials) + extra) * share) and extra == 5
    upper = fitted(place, images, replace(SETTINGS, mode="joint", layers=(0.75, 1.0)))
    assert upper.forward_equivalents == pytest.approx(1 + (len(upper.trials) + extra) / 4)


def test_one_step_for_all_costs_at_most_25_passes_profile_and_all_halvings_included(place, images):
    hopeless = fitted(place, images, replace(SETTINGS, mode="joint", delta=1e-12))
    assert len(hopeless.trials) == SETTINGS.halvings + 1 and set(hopeless.targets["outcome"]) == {"rolled back"}
    curve = 5  # it is drawn where something was accepted
    drawn = Profile(examples=6, probes=6, max_new_tokens=4)  # the gradients of every question
    profile = profile_heads(place[0], images, draw_sample(read_examples(images), drawn), drawn, 4, lambda done, total: None)
    assert sum(profile.forward_equivalents.values()) > 4
    assert sum(profile.forward_equivalents.values()) + hopeless.forward_equivalents + curve <= 25


def test_the_curve_is_the_divergence_of_scaled_changes(place, images, tmp_path):
    vlm, profile = place
    found = fitted(place, images, SETTINGS)
    assert found.curve["scale"].to_list() == [0.01, 0.25, 0.5, 1, 2, 4] and found.curve["kl"].is_sorted()
    halved = {name: tensor / 2 if "lora_B" in name else tensor for name, tensor in found.weights.items()}
    write_adapter(found.config, halved, "some/model", tmp_path)
    adapted = PeftModel.from_pretrained(tiny.new_tiny_vlm(num_kv_heads=vlm.num_kv_heads).base, tmp_path).eval()
    assert divergence(vlm, replace(vlm, model=adapted), images, profile) == pytest.approx(found.curve["kl"][2], abs=1e-5)


def test_a_profile_of_another_model_and_a_quantised_one_are_refused(place, images):
    vlm, profile = place
    with pytest.raises(ValueError, match=r"the profile is of \(3, 6\) layers and heads, the model has \(4, 6\)"):
        other = {name: getattr(profile, name)[:3] for name in ("isal", "caf", "caf_signed")}
        fit_rah_lora(vlm, images, replace(profile, **other), SETTINGS, 4, lambda done, total: None)
    quantised = tiny.new_tiny_vlm(num_kv_heads=vlm.num_kv_heads)
    quantised.base.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="the model is quantised, and RAH-LoRA averages weights: load it in bfloat16 or float32"):
        fit_rah_lora(quantised, images, profile, SETTINGS, 4, lambda done, total: None)
