"""What a head brings alone, against a model whose weights were edited in that head only."""

import pytest
import torch

from headwise.calibration.adapter import write_adapter
from headwise.calibration.rah_lora.fit import fit_rah_lora
from headwise.calibration.rah_lora.gains import head_gains, part_of, read_update
from headwise.calibration.rah_lora.projections import Projections
from headwise.calibration.rah_lora.schema import TARGETS
from headwise.calibration.rah_lora.settings import RahLora
from headwise.evaluation.statistics import Statistics
from headwise.examples import read_examples
from headwise.files import write_table
from headwise.likelihood import open_referenced, read_answers
from headwise.profile.measure import profile_heads
from headwise.profile.sample import draw_sample
from headwise.profile.settings import Profile
from headwise.profile.table import read_profile, write_profile
from headwise.vlm import encode
from tests import tiny
from tests.dataset import write_dataset


def nothing(done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("num_kv_heads", [tiny.NUM_KV_HEADS, tiny.NUM_HEADS])
def test_a_heads_gain_is_the_nats_that_its_own_edit_saves(num_kv_heads, tmp_path):
    vlm, images = tiny.new_tiny_vlm(num_kv_heads=num_kv_heads), tmp_path / "images"
    settings = Profile(examples=6, probes=3, max_new_tokens=3)
    write_dataset(images, calibration=3)
    questions = draw_sample(read_examples(images), settings)
    write_profile(profile_heads(vlm, images, questions, settings, 4, nothing), tmp_path)
    rah = RahLora(p_isal=40.0, p_caf=20.0, layers=(0.0, 1.0), beta=0.0, delta=5.0, max_alpha=0.5)
    fit = fit_rah_lora(vlm, images, read_profile(tmp_path), rah, 4, nothing)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(fit.config, fit.weights, "some/model", adapter)
    write_table(fit.targets, adapter / "targets.parquet", TARGETS)
    found, bad = head_gains(vlm, images, adapter, questions, 4, Statistics(bootstrap=200), nothing)
    assert not bad
    update, projections = read_update(adapter, vlm.device), Projections(vlm)
    for row in found.iter_rows(named=True):
        part = update if row["layer"] is None else part_of(update, (row["layer"], row["head"]), projections)
        edited = tiny.new_tiny_vlm(num_kv_heads=num_kv_heads)
        with torch.no_grad():
            for path, factors in part.items():
                edited.base.get_submodule(path).weight += factors.up @ factors.down
            saved = [nats(vlm, images, one.example) - nats(edited, images, one.example) for one in questions]
        assert row["gain"] == pytest.approx(sum(saved) / len(saved), abs=1e-4)
    assert len(found) == (fit.targets["outcome"] == "accepted").sum() + 1 > 3

    lost = read_examples(images)[0]
    (images / str(lost.image)).unlink()
    fewer, bad = head_gains(vlm, images, adapter, questions, 4, Statistics(bootstrap=200), nothing)
    gone = {one.example.id for one in questions if one.example.image == lost.image}
    assert set(bad) == gone and set(fewer["examples"]) == {len(questions) - len(gone)} and gone
    (single, *_), _ = head_gains(vlm, images, adapter, questions[-1:], 4, Statistics(bootstrap=200), nothing)[0].rows(named=True), None
    assert single["low"] is None and single["high"] is None and single["examples"] == 1
    with pytest.raises(ValueError, match=r"none of \d examples can be used, the first: .*cannot be read"):
        head_gains(vlm, images, adapter, [one for one in questions if one.example.id in gone], 4, Statistics(bootstrap=200), nothing)


def nats(vlm, images, example) -> float:
    batch = encode(vlm, [open_referenced(images, example)], [example.question], [example.answers[0]])
    return float(read_answers(vlm, batch)[0])
