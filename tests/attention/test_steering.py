"""Steering whatever is run: against edits of a known batch, the whole matrix of eager attention, and decoding step by step."""

from contextlib import nullcontext
from copy import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from headwise.attention.edits import Edits, editing, steering
from headwise.attention.layer import Attention
from headwise.attention.seam import visiting
from headwise.calibration.adapter import weights_digest
from headwise.vlm import TOKEN_TYPES, VLM, encode, generate_ids, stop_ids
from tests import zoo
from tests.attention.oracle import QUESTIONS, probe
from tests.attention.test_edits import in_double, logits, random_heads, stepwise
from tests.tiny import NUM_HEADS, NUM_LAYERS, image, new_tiny_lm, new_tiny_vlm, tiny_lm, tiny_vlm

MODELS = [
    tiny_vlm,
    tiny_lm,
    lambda: zoo.vlm("paligemma"),
    lambda: zoo.vlm("gemma2"),
    lambda: zoo.vlm("qwen2_5_vl"),
    lambda: zoo.vlm("smolvlm"),
    lambda: zoo.vlm("instructblip"),
]


def biased(vlm: VLM, seed: int = 0) -> Edits:
    return Edits(first_bias=random_heads(vlm.num_layers, vlm.num_heads, seed=seed))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model", MODELS)
def test_it_is_the_edit_of_each_batch(model, side: str) -> None:
    vlm = model()
    batch = probe(vlm, side)
    edits = Edits(gates=1 + 0.3 * random_heads(vlm.num_layers, vlm.num_heads, seed=1), first_bias=biased(vlm).first_bias)
    with torch.no_grad():
        plain = logits(vlm, batch)
        with editing(vlm, edits, batch.segments):
            expected = logits(vlm, batch)
        with steering(vlm, edits):
            assert torch.equal(logits(vlm, batch), expected) and not torch.allclose(expected, plain)
        assert torch.equal(logits(vlm, batch), plain)


@pytest.mark.parametrize("gamma", [0.01, 0.3, 1.0, 4.0, 100.0])
@pytest.mark.parametrize("model", [tiny_lm, lambda: zoo.language_model("llama", num_key_value_heads=1)])
def test_the_output_is_the_papers_rescaled_attention(model, gamma: float) -> None:
    """In fp64, from eager attention: a0' = gamma a0 / ((gamma-1) a0 + 1), the others over the same, times the values."""
    vlm = in_double(model())
    batch = probe(vlm, "left")
    first = batch.segments.first

    def rescaled(attention: Attention, output: Tensor) -> Tensor:
        group = attention.query.shape[1] // attention.key.shape[1]
        scores = attention.query @ attention.key.repeat_interleave(group, 1).transpose(2, 3) * attention.scaling
        assert attention.mask is not None
        a = scores.masked_fill(~attention.mask, torch.finfo(torch.float64).min).softmax(-1)
        scale = torch.ones_like(a)
        scale[torch.arange(len(a)), :, :, first] = gamma
        a0 = a[torch.arange(len(a)), :, :, first][..., None]
        return ((a * scale / ((gamma - 1) * a0 + 1)) @ attention.value.repeat_interleave(group, 1)).transpose(1, 2)

    with torch.no_grad():
        with visiting(vlm, rescaled):
            expected = logits(vlm, batch)
        with steering(vlm, Edits(first_bias=torch.full((vlm.num_layers, vlm.num_heads), gamma, dtype=torch.float64).log())):
            torch.testing.assert_close(logits(vlm, batch), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gamma_of_1_changes_nothing_to_the_bit(dtype: torch.dtype) -> None:
    vlm = new_tiny_vlm()
    vlm.base.to(dtype)
    batch = probe(vlm, "left")
    with torch.no_grad():
        plain = logits(vlm, batch)
        with steering(vlm, Edits(first_bias=torch.zeros(NUM_LAYERS, NUM_HEADS))):
            assert torch.equal(logits(vlm, batch), plain)


@pytest.mark.parametrize("model", MODELS)
def test_a_cache_changes_neither_answers_nor_attention(model) -> None:
    """Greedy answers, by Headwise and by plain transformers, are those without a cache; so is the last row's attention at every step."""
    vlm, steps = model(), 5
    prompts = encode(vlm, [image(0), image(1), None] if vlm.visual_id is not None else [None] * 3, QUESTIONS, padding_side="left")
    ids, mask = prompts.inputs["input_ids"], prompts.inputs["attention_mask"]
    length, seen = ids.shape[1], list[Tensor]()

    def see(attention: Attention, output: Tensor) -> None:
        seen.append(attention.probabilities(attention.every_row())[:, :, -1])

    with steering(vlm, biased(vlm)), torch.no_grad():
        with visiting(vlm, see):
            new = generate_ids(vlm, prompts, steps)
        plain = vlm.base.generate(**prompts.inputs, max_new_tokens=steps, do_sample=False, pad_token_id=vlm.end_id)
        shortest = min(plain.shape[1] - length, new.shape[1])
        assert torch.equal(plain[:, length : length + shortest], new[:, :shortest])
        cached, seen = seen, []
        for step in range(new.shape[1]):
            given = {"input_ids": torch.cat([ids, new[:, :step]], 1), "attention_mask": pad(mask, (0, step), value=1)}
            given |= {n: pad(prompts.inputs[n], (0, step), value=vlm.family.answer_type) for n in TOKEN_TYPES if n in prompts.inputs}
            with visiting(vlm, see):
                likeliest = vlm.model(**{**prompts.inputs, **given}, use_cache=False).logits[:, -1].argmax(-1)
            going = ~torch.isin(new[:, :step], torch.tensor(sorted(stop_ids(vlm)))).any(1)
            assert torch.equal(likeliest[going], new[going, step])
    assert len(seen) == len(cached) == vlm.num_layers * new.shape[1]
    for one, other in zip(cached, seen, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_behind_a_sliding_window_nothing_is_changed_though_the_cache_forgets() -> None:
    """Mistral with a window of 4: behind it the first token is not attended to, whether its key is masked or gone from the cache."""
    vlm = zoo.language_model("mistral", num_key_value_heads=2, sliding_window=4)
    prompts = encode(vlm, [None], ["How many green squares are in the picture?"], padding_side="left")
    assert prompts.inputs["input_ids"].shape[1] > 8
    with torch.no_grad(), steering(vlm, biased(vlm)):
        full = stepwise(vlm, prompts, 6)
        forgetting = vlm.base.generate(**prompts.inputs, max_new_tokens=6, do_sample=False, pad_token_id=vlm.end_id)
        keeping = vlm.base.generate(
            **prompts.inputs, max_new_tokens=6, do_sample=False, pad_token_id=vlm.end_id, past_key_values=DynamicCache()
        )
    assert torch.equal(forgetting, keeping)
    new = forgetting[:, prompts.inputs["input_ids"].shape[1] :]
    assert [text.strip() for text in vlm.tokenizer.batch_decode(new, skip_special_tokens=True)] == full


def test_without_a_mask_the_first_token_is_the_first() -> None:
    vlm = tiny_lm()
    batch = encode(vlm, [None], QUESTIONS[:1])
    with torch.no_grad(), steering(vlm, biased(vlm)):
        expected = vlm.model(**batch.inputs).logits
        assert torch.equal(vlm.model(batch.inputs["input_ids"]).logits, expected)  # also where it is no keyword


def test_a_model_without_a_beginning_of_text_and_an_image_before_all() -> None:
    """The first real token is the prompt's own, whatever it is: in PaliGemma the image's first patch."""
    bare = replace(tiny_lm(), processor=copy(tiny_lm().tokenizer))
    bare.tokenizer.chat_template = None
    for vlm in (zoo.vlm("paligemma"), bare):
        pictures = [image(0)] if vlm.visual_id is not None else [None]
        batch = encode(vlm, pictures, QUESTIONS[:1])
        assert int(batch.segments.first[0]) == 0
        first = int(batch.inputs["input_ids"][0, 0])
        assert first == vlm.visual_id or (vlm.visual_id is None and first != vlm.tokenizer.bos_token_id)
        with torch.no_grad():
            with editing(vlm, biased(vlm), batch.segments):
                expected = logits(vlm, batch)
            with steering(vlm, biased(vlm)):
                assert torch.equal(logits(vlm, batch), expected)


def test_it_is_taken_off_whole() -> None:
    vlm = new_tiny_lm()
    batch = probe(vlm, "left")
    digest, before = weights_digest(vlm.base), vlm.text_config._attn_implementation
    with torch.no_grad():
        plain = logits(vlm, batch)
        for error in (nullcontext(), pytest.raises(RuntimeError)):
            with error, steering(vlm, biased(vlm)):
                logits(vlm, batch)
                if not isinstance(error, nullcontext):
                    raise RuntimeError
        assert torch.equal(logits(vlm, batch), plain)
    assert weights_digest(vlm.base) == digest and vlm.text_config._attn_implementation == before
    assert not vlm.base._forward_pre_hooks


def test_a_number_for_each_example_and_other_shapes_are_refused() -> None:
    vlm = tiny_lm()
    with (
        pytest.raises(ValueError, match=r"gates of shape \(3, 4, 6\): \(4, 6\) is needed"),
        steering(vlm, Edits(gates=torch.ones(3, 4, 6))),
    ):
        pass
