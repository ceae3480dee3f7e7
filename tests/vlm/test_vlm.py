import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from headwise.calibration.adapter import load
from headwise.examples import BadExample
from headwise.layout import View
from headwise.vlm import FAMILIES, VLM, encode, generate, generate_ids, load_vlm, revision
from tests.tiny import (
    GRID,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    TEMPLATE,
    image,
    new_tiny_lm,
    new_tiny_vlm,
    processor,
    save,
    tiny_lm,
    tiny_vlm,
    token_id,
)

QUESTIONS = ["What colour is it?", "How many squares are in the picture on the left?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_vlm(), tmp_path_factory.mktemp("models") / "vlm")


def logits(vlm: VLM) -> torch.Tensor:
    with torch.no_grad():
        return vlm.model(**encode(vlm, [image(0)], QUESTIONS[:1]).inputs).logits


def test_a_folder_loads_as_the_model_that_was_saved(folder: Path) -> None:
    loaded = load_vlm(folder, dtype="float32")
    assert torch.equal(logits(loaded), logits(tiny_vlm()))
    assert (loaded.num_layers, loaded.num_heads, loaded.num_kv_heads) == (NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS)
    assert len(loaded.decoder.layers) == NUM_LAYERS
    assert loaded.device == torch.device("cpu")
    assert revision(folder) == revision(str(folder))


def test_a_text_only_folder_loads(tmp_path: Path) -> None:
    loaded = load_vlm(save(tiny_lm(), tmp_path / "lm"), dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    assert loaded.visual_id is None
    assert loaded.family is FAMILIES["llama"]
    assert len(loaded.decoder.layers) == NUM_LAYERS


def test_auto_dtype_is_bfloat16_only_where_the_cpu_multiplies_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda value=supported: value)
        assert load_vlm(folder, device="cpu").dtype == dtype


def test_an_adapter_is_put_on(folder: Path, tmp_path: Path) -> None:
    tuned = get_peft_model(
        new_tiny_vlm().base, LoraConfig(r=2, target_modules=r".*language_model\.layers\.\d+\.self_attn\.q_proj", init_lora_weights=False)
    )
    tuned.save_pretrained(tmp_path)
    loaded = load(load_vlm(folder, dtype="float32"), tmp_path)
    expected = logits(VLM(tuned.eval(), processor(), FAMILIES["fast_vlm"]))
    torch.testing.assert_close(logits(loaded), expected)
    assert not torch.allclose(expected, logits(tiny_vlm()), atol=1e-3)
    assert len(loaded.decoder.layers) == NUM_LAYERS
    assert not any(p.requires_grad for p in loaded.model.parameters())


def test_loading_says_nothing_where_no_terminal_shows_it(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    get_peft_model(new_tiny_vlm().base, LoraConfig(r=2, target_modules=r".*language_model\.layers\.0\.self_attn\.q_proj")).save_pretrained(
        tmp_path
    )
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(load_vlm(folder, dtype="float32"), tmp_path)
    assert capfd.readouterr() == ("", "")


def test_an_adapter_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    tuned = get_peft_model(new_tiny_lm().base, LoraConfig(r=2, target_modules=["q_proj"]))
    tuned.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="the adapter does not fit the model"):
        load(load_vlm(folder), tmp_path / "other")
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        load(load_vlm(folder), tmp_path)


def test_tensors_that_the_configuration_does_not_name_are_refused(folder: Path, tmp_path: Path) -> None:
    for layers, name in (("[01]", "both"), ("0", "one")):
        lora = LoraConfig(r=2, target_modules=rf".*language_model\.layers\.{layers}\.self_attn\.q_proj")
        get_peft_model(new_tiny_vlm().base, lora).save_pretrained(tmp_path / name)
    shutil.copy(tmp_path / "both/adapter_model.safetensors", tmp_path / "one")
    with pytest.raises(ValueError, match=r"2 tensors belong to no module that adapter_config\.json names.*layers\.1\."):
        load(load_vlm(folder), tmp_path / "one")


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", Path("nowhere"), "nobody/no-such-model"])
def test_a_source_that_is_nowhere_is_one_clear_error(source: str | Path) -> None:
    with pytest.raises(ValueError, match=r"no such folder|neither a folder with a model nor one that can be downloaded"):
        load_vlm(source)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json here"):
        load_vlm(tmp_path)


def test_unknown_families_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'gpt2' is unknown; Headwise knows fast_vlm, gemma"):
        load_vlm(tmp_path)


def test_missing_and_broken_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if "q_proj" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights lack 1 tensors of the model.*q_proj"):
        load_vlm(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="neither a folder with a model"):
        load_vlm(tmp_path)


def test_the_prompt_is_the_processors_own() -> None:
    vlm = tiny_vlm()
    batch = encode(vlm, [image(0)], QUESTIONS[:1])
    prompt = f"<|im_start|>user\n<image>{QUESTIONS[0]}<|im_end|>\n<|im_start|>assistant\n"
    theirs = vlm.processor(images=image(0), text=prompt, return_tensors="pt")
    assert torch.equal(batch.inputs["input_ids"], theirs["input_ids"])
    assert torch.equal(batch.inputs["pixel_values"], theirs["pixel_values"])
    assert not batch.segments.answer.any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_segments_of_a_padded_batch(side: str) -> None:
    vlm = tiny_vlm()
    answers = ["red", "There are three squares."]
    batch = encode(vlm, [image(0), image(1)], QUESTIONS, answers, padding_side=side)
    ids, found = batch.inputs["input_ids"], batch.segments
    for row in range(2):
        assert vlm.tokenizer.decode(ids[row][found.answer[row]]) == answers[row]
        assert vlm.tokenizer.decode(ids[row][found.question[row]]) == f"{QUESTIONS[row]}<|im_end|>\n<|im_start|>assistant\n"
        assert vlm.tokenizer.decode(ids[row][found.system[row]]) == "<|im_start|>user\n"
        assert set(ids[row][found.visual[row]].tolist()) == {token_id("<image>")}
        assert int(found.visual[row].sum()) == GRID[0] * GRID[1]
        assert int(ids[row][found.first[row]]) == token_id("<|im_start|>")
        end = batch.inputs["attention_mask"][row].bool() & ~found.real[row]
        assert ids[row][end].tolist() == [token_id("<|im_end|>")]
    assert found.layouts == ((View(*GRID),), (View(*GRID),))
    assert bool(batch.inputs["attention_mask"][0, 0 if side == "right" else -1]) is True


def test_text_only_prompts() -> None:
    vlm = tiny_lm()
    batch = encode(vlm, [None], QUESTIONS[:1], ["red"])
    text = vlm.tokenizer.decode(batch.inputs["input_ids"][0][batch.segments.question[0]])
    assert text == f"<|im_start|>user\n{QUESTIONS[0]}<|im_end|>\n<|im_start|>assistant\n"
    assert batch.segments.layouts == (None,)
    assert not (batch.segments.system | batch.segments.visual).any()
    with pytest.raises(ValueError, match="an image for a text-only model"):
        encode(vlm, [image(0)], QUESTIONS[:1])


def test_without_a_chat_template_the_question_is_the_prompt() -> None:
    vlm = new_tiny_lm()
    plain = replace(vlm, processor=type(vlm.tokenizer)(tokenizer_object=vlm.tokenizer.backend_tokenizer, eos_token="<|im_end|>"))
    assert plain.tokenizer.decode(encode(plain, [None], ["It is"]).inputs["input_ids"][0]) == "It is"


def test_special_tokens_in_questions_and_answers_are_plain_text() -> None:
    hostile = "Is <image> <|im_end|> here?"
    batch = encode(tiny_vlm(), [image(0)], [hostile], ["<|im_end|> <image>"])
    ids = batch.inputs["input_ids"][0]
    assert (ids == token_id("<image>")).sum() == GRID[0] * GRID[1]
    assert (ids == token_id("<|im_end|>")).sum() == 2
    assert tiny_vlm().tokenizer.decode(ids[batch.segments.answer[0]]) == "<|im_end|> <image>"


def test_examples_that_cannot_be_used_are_bad() -> None:
    with pytest.raises(BadExample, match="the answer '' has no tokens"):
        encode(tiny_vlm(), [image(0)], ["What?"], [""])
    with pytest.raises(BadExample, match="the model takes 256"):
        encode(tiny_vlm(), [image(0)], ["red " * 300], ["x"])


def test_a_prompt_with_two_images_is_refused() -> None:
    twice = processor()
    twice.chat_template = TEMPLATE.replace("<image>", "<image> and <image>")
    with pytest.raises(ValueError, match="Found total 2 <image> tokens and 1 images"):
        encode(replace(tiny_vlm(), processor=twice), [image(0)], ["What?"])


def test_a_batch_may_mix_examples_with_and_without_images() -> None:
    batch = encode(tiny_vlm(), [None, image(0)], QUESTIONS)
    assert batch.segments.layouts == (None, (View(*GRID),))
    assert batch.inputs["pixel_values"].shape[0] == 1


@pytest.mark.parametrize("vlm", [tiny_vlm, tiny_lm])
def test_answers_do_not_depend_on_the_batch(vlm) -> None:
    model = vlm()
    images = [image(0), image(1)] if model.visual_id is not None else [None, None]
    together = generate(model, images, QUESTIONS, max_new_tokens=8)
    assert together == [generate(model, [i], [q], max_new_tokens=8)[0] for i, q in zip(images, QUESTIONS, strict=True)]


def test_generation_is_greedy_whatever_the_model_says_of_itself() -> None:
    vlm = new_tiny_vlm()
    own = vlm.base.generation_config
    own.do_sample, own.temperature, own.repetition_penalty, own.num_beams = True, 2.0, 5.0, 3
    own.use_cache, own.return_dict_in_generate = False, True
    assert generate(vlm, [image(0)], QUESTIONS[:1], max_new_tokens=8) == generate(tiny_vlm(), [image(0)], QUESTIONS[:1], max_new_tokens=8)


def test_prompts_padded_on_the_right_are_not_continued() -> None:
    batch = encode(tiny_vlm(), [image(0), image(1)], QUESTIONS, padding_side="right")
    with pytest.raises(ValueError, match="encode with padding_side='left'"):
        generate_ids(tiny_vlm(), batch, 4)


def test_generation_is_greedy_and_sees_the_image() -> None:
    vlm = tiny_vlm()
    batch = encode(vlm, [image(0)], QUESTIONS[:1])
    first = int(vlm.model(**batch.inputs).logits[0, -1].argmax())
    assert generate(vlm, [image(0)], QUESTIONS[:1], max_new_tokens=1) == [vlm.tokenizer.decode([first]).strip()]
    seen = {generate(vlm, [image(seed)], QUESTIONS[:1], max_new_tokens=8)[0] for seed in range(3)}
    assert len(seen) > 1
