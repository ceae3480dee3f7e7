"""Adapter folders: plain PEFT loads them, merged is unmerged, and a wrong one is found out."""

import json
from dataclasses import replace
from itertools import count

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from headwise.attention.edits import Edits, editing
from headwise.calibration import adapter as adapter_module
from headwise.calibration.adapter import (
    CONFIG,
    MERGED_TOLERANCE,
    WEIGHTS,
    adapter_digest,
    attached,
    export_merged,
    load,
    load_calibrated,
    parameter_count,
    prove_adapter,
    unload,
    weights_digest,
    write_adapter,
)
from headwise.calibration.lora import fit_lora
from headwise.calibration.settings import CALIBRATION, Lora
from headwise.calibration.steering import STEERING, Steering, is_steering, read_readout, write_steering
from headwise.files import write_json
from headwise.labels import Readout
from headwise.likelihood import answer_logits
from headwise.vlm import encode, generate_ids, load_vlm
from tests import tiny
from tests.dataset import write_dataset

SETTINGS = Lora(rank=4, alpha=8, learning_rate=0.02, steps=8, batch_size=6)


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "images"
    examples = write_dataset(folder, calibration=2)
    return fit_lora(tiny.tiny_vlm(), folder, examples, (0, 2), SETTINGS, lambda done, total: None)


@pytest.fixture
def adapter(fit, tmp_path):
    write_adapter(fit.config, fit.weights, "some/model", tmp_path)
    return tmp_path


def test_plain_peft_on_a_plain_model_gives_the_trained_logits(fit, adapter):
    plain = PeftModel.from_pretrained(tiny.new_tiny_vlm().base, adapter)
    with torch.no_grad():
        found = answer_logits(replace(tiny.tiny_vlm(), model=plain.eval()), fit.probe)
        merged = answer_logits(replace(tiny.tiny_vlm(), model=plain.merge_and_unload()), fit.probe)
    assert torch.equal(found, fit.logits)
    assert torch.allclose(merged, fit.logits, atol=1e-4)


def test_the_proof_holds_and_leaves_the_model_as_it_was(fit, adapter):
    vlm = tiny.new_tiny_vlm()
    before = weights_digest(vlm.base)
    proof = prove_adapter(vlm, adapter, fit.probe, fit.logits)
    assert proof.loaded == 0.0 and 0.0 < proof.merged < 1e-4  # in logits, whatever the largest
    assert proof.largest == pytest.approx(fit.logits.abs().max().item(), rel=1e-4)
    assert weights_digest(vlm.base) == before and all(parameter.requires_grad for parameter in vlm.base.parameters())


def test_the_proof_holds_on_a_bfloat16_base(tmp_path):
    vlm = tiny.new_tiny_vlm()
    vlm.base.bfloat16()
    examples = write_dataset(tmp_path / "images", calibration=2)
    fit = fit_lora(vlm, tmp_path / "images", examples, (1,), SETTINGS, lambda done, total: None)
    (tmp_path / "adapter").mkdir()
    write_adapter(fit.config, fit.weights, "tiny", tmp_path / "adapter")
    assert prove_adapter(vlm, tmp_path / "adapter", fit.probe, fit.logits).loaded == 0.0
    assert vlm.dtype == torch.bfloat16


def test_the_proof_finds_one_changed_weight(fit, adapter):
    weights = load_file(adapter / WEIGHTS)
    name = next(name for name in sorted(weights) if "v_proj.lora_B" in name)
    weights[name][0, 0] += 0.5
    save_file(weights, adapter / WEIGHTS)
    with pytest.raises(ValueError, match="loaded, the adapter's logits are off"):
        prove_adapter(tiny.tiny_vlm(), adapter, fit.probe, fit.logits)


@pytest.mark.parametrize(("scale", "allowed"), [(0.1, "0.0001"), (100.0, "0.05")])
def test_merging_may_be_off_by_the_tolerance_or_its_share_of_the_largest_logit(fit, adapter, monkeypatch, scale, allowed):
    """A merge that changes the logits by 5 is told so, beside what is allowed: 1e-4, times the largest logit where that is above 1."""
    calls = count()

    def scaled(vlm, batch):
        return answer_logits(vlm, batch) * scale + (5.0 if next(calls) == 2 else 0.0)  # after the loaded and the unmerged ones

    monkeypatch.setattr(adapter_module, "answer_logits", scaled)
    with pytest.raises(ValueError, match=rf"merged, the adapter's logits are off by 5, allowed is {allowed}"):
        prove_adapter(tiny.new_tiny_vlm(), adapter, fit.probe, fit.logits * scale)


def test_our_loader_reads_it_too(fit, adapter, tmp_path_factory):
    model = tiny.save(tiny.tiny_vlm(), tmp_path_factory.mktemp("model"))
    vlm = load(load_vlm(model, dtype="float32"), adapter)
    with torch.no_grad():
        assert torch.equal(answer_logits(vlm, fit.probe), fit.logits)


def test_an_adapter_is_taken_off_even_after_an_error(adapter):
    vlm = tiny.new_tiny_vlm()
    with pytest.raises(RuntimeError, match="on purpose"), attached(vlm, adapter) as adapted:
        assert isinstance(adapted.model, PeftModel)
        raise RuntimeError("on purpose")
    assert not any("lora" in name for name, _ in vlm.base.named_modules())


def test_the_folder_names_the_model_and_no_path_of_this_machine(fit, adapter):
    config = json.loads((adapter / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "some/model" and config["inference_mode"] is True
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert sorted(file.name for file in adapter.iterdir()) == [CONFIG, WEIGHTS]


def test_of_a_model_in_a_folder_only_the_folders_name_is_kept(fit, adapter, tmp_path_factory):
    digests = set()
    for name in ("here", "there"):
        model = tiny.save(tiny.tiny_vlm(), tmp_path_factory.mktemp(name) / "my-vlm")
        write_adapter(fit.config, fit.weights, str(model), adapter)
        assert json.loads((adapter / CONFIG).read_text())["base_model_name_or_path"] == "my-vlm"
        digests.add(adapter_digest(adapter))
        plain = PeftModel.from_pretrained(tiny.new_tiny_vlm().base, adapter)
        assert torch.equal(answer_logits(replace(tiny.tiny_vlm(), model=plain.eval()), fit.probe), fit.logits)
    assert len(digests) == 1


def test_an_adapter_goes_on_the_weights_it_was_trained_on_and_on_no_others(fit, adapter, tmp_path_factory):
    model = tiny.save(tiny.tiny_vlm(), tmp_path_factory.mktemp("model"))
    write_json({"base_sha256": fit.base_sha256, "dtype": "float32"}, adapter / CALIBRATION)
    with torch.no_grad():
        assert torch.equal(answer_logits(load_calibrated(str(model), adapter), fit.probe), fit.logits)
    other = tiny.save(tiny.new_tiny_vlm(seed=1), tmp_path_factory.mktemp("other"))
    with pytest.raises(ValueError, match=rf"the weights have sha256 \w+, the adapter was trained on {fit.base_sha256}: give the model"):
        load_calibrated(str(other), adapter)


def test_an_exported_model_is_a_plain_folder_that_answers_as_the_adapter_does(fit, adapter, tmp_path):
    model = tiny.save(tiny.tiny_vlm(), tmp_path / "model")
    write_json({"base_sha256": fit.base_sha256, "dtype": "float32"}, adapter / CALIBRATION)
    export_merged(str(model), adapter, tmp_path / "merged")
    merged = load_vlm(tmp_path / "merged", dtype="float32")
    with torch.no_grad():
        assert torch.allclose(answer_logits(merged, fit.probe), fit.logits, atol=MERGED_TOLERANCE)
        assert not torch.allclose(answer_logits(load_vlm(model, dtype="float32"), fit.probe), fit.logits, atol=1e-3)
    assert not list((tmp_path / "merged").glob("adapter*"))


def test_the_digest_is_the_adapters_alone(fit, adapter, tmp_path_factory):
    before = adapter_digest(adapter)
    (adapter / "README.md").write_text("anything")
    assert adapter_digest(adapter) == before
    other = tmp_path_factory.mktemp("other")
    write_adapter(replace(fit.config, lora_alpha=9), fit.weights, "some/model", other)
    assert adapter_digest(other) != before
    assert parameter_count(other) == parameter_count(adapter) == fit.num_parameters


@pytest.fixture
def steered(tmp_path):
    bias = torch.randn(tiny.NUM_LAYERS, tiny.NUM_HEADS, generator=torch.Generator().manual_seed(0))
    write_steering(Steering("first_token", bias), Readout(bias={"sign": {"up": 0.5}}), tiny.tiny_vlm(), "some/model", tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", ["adapter", "steered"])
def test_what_is_loaded_stays_in_generation_too_and_is_taken_off_to_the_bit(fit, kind, request):
    folder, vlm = request.getfixturevalue(kind), tiny.new_tiny_vlm()
    digest, prompts = weights_digest(vlm.base), encode(vlm, [tiny.image(0), None], ["What?", "Which colour?"], padding_side="left")
    with torch.no_grad():
        plain, said = answer_logits(vlm, fit.probe), generate_ids(vlm, prompts, 6)
        loaded = load(vlm, folder)
        assert not torch.allclose(answer_logits(loaded, fit.probe), plain) and not torch.equal(generate_ids(loaded, prompts, 6), said)
        by_transformers = loaded.base.generate(**prompts.inputs, max_new_tokens=6, do_sample=False, pad_token_id=vlm.end_id)
        assert torch.equal(by_transformers[:, prompts.inputs["input_ids"].shape[1] :], generate_ids(loaded, prompts, 6))
        with pytest.raises(ValueError, match="the model has an adapter already: unload it first"):
            load(vlm, folder)
        again = unload(loaded)
        assert again.base is vlm.base and torch.equal(answer_logits(again, fit.probe), plain)
    assert weights_digest(vlm.base) == digest
    with pytest.raises(ValueError, match="no adapter that was loaded"):
        unload(again)


def test_a_steering_folder_is_what_was_written_and_peft_refuses_it(fit, steered):
    assert is_steering(steered) and parameter_count(steered) == tiny.NUM_LAYERS * tiny.NUM_HEADS and len(adapter_digest(steered)) == 64
    vlm = tiny.tiny_vlm()
    bias = load_file(steered / STEERING)["strength"]
    assert read_readout(steered) == Readout(bias={"sign": {"up": 0.5}})
    with torch.no_grad(), editing(vlm, Edits(first_bias=bias), fit.probe.segments):
        expected = answer_logits(vlm, fit.probe)
    with torch.no_grad(), attached(vlm, steered) as found:
        assert torch.equal(answer_logits(found, fit.probe), expected)
    with pytest.raises(KeyError, match="HEADWISE_STEERING"):
        PeftModel.from_pretrained(tiny.new_tiny_vlm().base, steered)
    with pytest.raises(ValueError, match="changes no weights, so there is nothing to merge"):
        export_merged("headwise-smol", steered, steered / "merged")


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"strength": torch.zeros(2, 2)}, r"strength is of shape \(2, 2\), the model has 4 layers of 6 heads"),
        ({"strength": torch.full((4, 6), torch.nan)}, "strength has values that are not finite numbers"),
        ({"bias": torch.zeros(4, 6)}, r"holds \['bias'\], and strength is needed"),
    ],
)
def test_a_steering_folder_that_does_not_fit_is_refused(steered, tensors, reason):
    save_file(tensors, steered / STEERING)
    with pytest.raises(ValueError, match=reason), attached(tiny.tiny_vlm(), steered):
        pass
    (steered / STEERING).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"), attached(tiny.tiny_vlm(), steered):
        pass
