"""Packing several questions into one sequence is only a saving: every loss is what the plain prompts give."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from headwise.compositions import Composition, Question, Thing
from headwise.pretraining import Pretraining, answer_loss, compositions, fit, pack, visual_features
from headwise.vlm import encode
from tests import tiny

QUESTIONS = (Question("caption", "Describe the image.", "A blue star."), Question("colour", "What colour is it?", "red"))


def composition(seed: int) -> Composition:
    return Composition(tiny.image(seed), (Thing("red circle", np.ones((96, 96), dtype=bool)),), QUESTIONS)


def test_packed_loss_is_the_loss_of_the_separate_prompts() -> None:
    vlm = tiny.new_tiny_vlm()
    model, processor = vlm.base, vlm.processor
    batch = [composition(0), composition(1)]
    features = visual_features(model, processor, batch)
    loss, _ = answer_loss(model, features, [pack(QUESTIONS, processor, features.shape[1]) for _ in batch])
    nats, tokens = 0.0, 0
    for one in batch:
        for question in QUESTIONS:
            inputs = encode(vlm, [one.image], [question.question], [question.answer]).inputs
            logits = model(**inputs).logits[0]
            number = len(vlm.tokenizer(question.answer, add_special_tokens=False).input_ids) + 1
            nats += cross_entropy(logits[-number - 1 : -1].float(), inputs["input_ids"][0, -number:], reduction="sum").item()
            tokens += number
    assert loss.item() == pytest.approx(nats / tokens, abs=1e-5)


def test_a_question_never_sees_another_one() -> None:
    vlm = tiny.new_tiny_vlm()
    features = visual_features(vlm.base, vlm.processor, [composition(0)])

    def last_loss(first_answer: str) -> float:
        questions = (Question("caption", "Describe the image.", first_answer), QUESTIONS[1])
        packed = pack(questions, vlm.processor, features.shape[1])
        only_last = packed.answer & (packed.group == 2)
        loss, _ = answer_loss(vlm.base, features, [type(packed)(packed.input_ids, packed.position_ids, packed.group, only_last)])
        return loss.item()

    assert last_loss("A blue star.") == pytest.approx(last_loss("A green star."), abs=1e-6)


def test_the_stream_of_images_is_seeded_and_goes_on_where_it_stopped() -> None:
    settings = Pretraining(photographs=0.0)
    first = compositions(settings, None, start=0)
    skipped = [next(first) for _ in range(3)][2]
    resumed = next(compositions(settings, None, start=2))
    assert skipped.image.tobytes() == resumed.image.tobytes()


SHORT = Pretraining(
    alignment_steps=30, steps=40, images_per_step=1, photographs=0.0, rank=8, learning_rate=2e-2, captions=0.0, compiled=False
)


def trained(out: Path, progress: Callable[[str], None]) -> dict[str, torch.Tensor]:
    vlm = tiny.new_tiny_vlm()
    fit(vlm.base, vlm.processor, SHORT, None, out, progress)
    return load_file(out / "adapter_model.safetensors")


def test_training_lowers_the_loss_and_a_killed_one_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.pretraining.REPORT_STEPS", 10)
    monkeypatch.setattr("headwise.pretraining.CHECKPOINT_STEPS", 10)
    lines: list[str] = []
    unbroken = trained(tmp_path / "a", lines.append)
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines if line.startswith("step")]
    assert losses[-1] < losses[0] - 0.3
    assert all(tensor.any() for name, tensor in unbroken.items() if "lora_B" in name)
    assert any("vision_tower" in name for name in unbroken)

    def killed_at(mark: str) -> Callable[[str], None]:
        def kill(line: str) -> None:
            if line.startswith(mark):
                raise KeyboardInterrupt

        return kill

    for mark in ("alignment 20/", "step 30/"):
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "b", killed_at(mark))
    resumed = trained(tmp_path / "b", lambda line: None)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in unbroken.items())
