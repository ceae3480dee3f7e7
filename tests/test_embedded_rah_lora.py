"""RAH-LoRA on the embedded model, in the type that the machine runs it in."""

from dataclasses import replace

import pytest
import torch

from headwise.calibration.adapter import attached, write_adapter
from headwise.calibration.rah_lora.fit import calibration_batches, fit_rah_lora
from headwise.calibration.rah_lora.settings import RahLora
from headwise.calibration.rah_lora.trust_region import divergences
from headwise.checkpoints import frozen
from headwise.data import DataSource, write_data
from headwise.examples import read_examples
from headwise.likelihood import answer_logits, answer_targets
from headwise.observation import EMBEDDED
from headwise.profile.measure import profile_heads
from headwise.profile.sample import draw_sample
from headwise.profile.settings import Profile
from headwise.profile.table import read_profile, write_profile
from headwise.vlm import load_vlm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS = RahLora(max_alpha=1.0, delta=0.02)
"""A first step that is too long, so that the trust region binds."""


def nothing(done: int, total: int) -> None:
    pass


def test_the_embedded_model_is_calibrated_within_the_trust_region(tmp_path):
    write_data(DataSource(calibration=12, evaluation=2, forgetting=2), tmp_path / "images", nothing)
    vlm, settings = load_vlm(EMBEDDED), replace(Profile(), examples=24, probes=8)
    questions = draw_sample(read_examples(tmp_path / "images", "calibration"), settings)
    found = profile_heads(vlm, tmp_path / "images", questions, settings, 8, nothing)
    write_profile(found, tmp_path)
    profile = read_profile(tmp_path)
    fit = fit_rah_lora(vlm, tmp_path / "images", profile, STEPS, 8, nothing)
    accepted = fit.targets.filter(fit.targets["outcome"] == "accepted")
    assert len(accepted) >= 8 and len(fit.trials) > 1 and 0 < fit.kl <= STEPS.delta
    assert sum(found.forward_equivalents.values()) + fit.forward_equivalents <= 25

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(fit.config, fit.weights, EMBEDDED, adapter)
    means = []
    with torch.no_grad(), frozen(vlm.base):
        for batch in calibration_batches(vlm, tmp_path / "images", profile.sample, 8):
            before, examples = answer_logits(vlm, batch), answer_targets(batch).nonzero()[:, 0]
            with attached(vlm, adapter) as adapted:
                means.append(divergences(before, answer_logits(adapted, batch), examples))
    measured = float(torch.cat(means).mean())
    assert measured == pytest.approx(fit.kl, rel=0.05)  # in bfloat16 rows that are read together round together
    assert measured <= 1.05 * STEPS.delta
