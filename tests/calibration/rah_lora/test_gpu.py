"""RAH-LoRA where the model is on a GPU: nothing lies on the other device, and the adapter is what was accepted."""

from dataclasses import replace

import pytest
import torch

from headwise.calibration.adapter import prove_adapter, write_adapter
from headwise.calibration.rah_lora.fit import fit_rah_lora
from headwise.calibration.rah_lora.gains import head_gains
from headwise.calibration.rah_lora.schema import TARGETS
from headwise.calibration.rah_lora.settings import RahLora
from headwise.evaluation.statistics import Statistics
from headwise.examples import read_examples
from headwise.files import write_table
from headwise.profile.measure import profile_heads
from headwise.profile.sample import draw_sample
from headwise.profile.settings import Profile
from headwise.profile.table import read_profile, write_profile
from tests import tiny
from tests.dataset import write_dataset


def nothing(done: int, total: int) -> None:
    pass


@pytest.mark.gpu
@pytest.mark.parametrize("beta", [0.0, 99.0], ids=["targets", "no anchors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_kv_heads", [tiny.NUM_KV_HEADS, tiny.NUM_HEADS])
def test_heads_are_calibrated_and_measured_on_a_gpu(num_kv_heads, dtype, beta, tmp_path):
    vlm, images = tiny.new_tiny_vlm(num_kv_heads=num_kv_heads), tmp_path / "images"
    vlm = replace(vlm, model=vlm.base.to("cuda", dtype))
    settings = Profile(examples=6, probes=3, max_new_tokens=3)
    write_dataset(images, calibration=3)
    questions = draw_sample(read_examples(images), settings)
    write_profile(profile_heads(vlm, images, questions, settings, 4, nothing), tmp_path)
    rah = RahLora(p_isal=40.0, p_caf=20.0, layers=(0.0, 1.0), beta=beta, delta=5.0)
    fit = fit_rah_lora(vlm, images, read_profile(tmp_path), rah, 4, nothing)
    assert (fit.targets["outcome"] == "accepted").any() == (beta == 0)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(fit.config, fit.weights, "some/model", adapter)
    write_table(fit.targets, adapter / "targets.parquet", TARGETS)
    prove_adapter(vlm, adapter, fit.probe, fit.logits)
    gains, bad = head_gains(vlm, images, adapter, questions, 4, Statistics(bootstrap=200), nothing)
    assert gains["gain"].is_finite().all() and not bad
