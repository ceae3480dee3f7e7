"""Prompts, inputs and answers of every family."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import InstructBlipConfig, T5Config

from headwise.likelihood import read_answers, read_continued
from headwise.prefix import generate_continued, read_on, read_prefix
from headwise.vlm import FAMILIES, VLM, Batch, encode, generate, load_vlm
from tests import zoo
from tests.tiny import image, save

QUESTION, ANSWER = "How many squares are in the picture on the left?", "There are three squares."
QUESTIONS = [QUESTION, "What colour is it?", "Where is the large green star?", "Red?", "Describe the image."]
ANSWERS = ["red", ANSWER, "on the left", "no", "A blue triangle."]
SIZES = [(120, 90), (40, 200), None, (64, 64), (200, 40)]
"""Widths and heights; the third example has no image."""

every_family = pytest.mark.parametrize("name", (*zoo.VISUAL_FAMILIES, *zoo.TEXT_FAMILIES))
numpy_warns = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""PaliGemma's processor makes an array of a list of tensors."""
visual_families = pytest.mark.parametrize("name", zoo.VISUAL_FAMILIES)

CHATML = ("<|im_start|>user\n", "{q}<|im_end|>\n<|im_start|>assistant\n")
QWEN = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>", "<|vision_end|>" + CHATML[1])
TILES = "<fake_token_around_image><row_1_col_1><fake_token_around_image><row_1_col_2>\n"
TILES += TILES.replace("row_1", "row_2") + "\n<fake_token_around_image><global-img>"
TILED = (f"User:{TILES}", "<fake_token_around_image>{q}<end_of_utterance>\nAssistant:")
READ: dict[str, tuple[str, str]] = {
    "fast_vlm": CHATML,
    "llava": ("<s>USER: ", "\n{q} ASSISTANT:"),
    "llava_next": ("<s>[INST] ", "\n{q} [/INST]"),
    "llava_onevision": ("<|im_start|>user ", "\n{q}<|im_end|><|im_start|>assistant\n"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), QWEN),
    **dict.fromkeys(("paligemma", "paligemma2"), ("", "<bos>{q}\n")),
    "smolvlm": (f"<|im_start|>{TILED[0]}", TILED[1]),
    "idefics3": (f"<|begin_of_text|>{TILED[0]}", TILED[1]),
    "internvl": ("<|im_start|>user\n<img>", "</img>\n" + CHATML[1]),
    "gemma3": (
        "<bos><start_of_turn>user\n\n\n<start_of_image>",
        "<end_of_image>\n\n{q}<end_of_turn>\n<start_of_turn>model\n",
    ),
    "instructblip": ("", "<s>{q}"),
}
"""What stands before and after the image's tokens."""


def pictures(vlm: VLM) -> list[Image.Image | None]:
    return [None if size is None or vlm.visual_id is None else image(seed, size) for seed, size in enumerate(SIZES)]


def logits(vlm: VLM, batch: Batch) -> Tensor:
    with torch.no_grad():
        return vlm.model(**batch.inputs).logits


def embedded(vlm: VLM, batch: Batch) -> Tensor:
    """What the decoder gets of each token."""
    seen: list[Tensor] = []
    hook = vlm.decoder.register_forward_pre_hook(lambda module, args, options: seen.append(options["inputs_embeds"]), with_kwargs=True)
    logits(vlm, batch)
    hook.remove()
    return seen[0]


def test_every_family_is_in_the_zoo() -> None:
    assert {zoo.vlm(name).base.config.model_type for name in (*zoo.VISUAL_FAMILIES, *zoo.TEXT_FAMILIES)} == set(FAMILIES)


@every_family
@pytest.mark.parametrize("number", [2, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_gives_what_single_examples_give(name: str, number: int, side: str) -> None:
    vlm = zoo.vlm(name)
    examples = list(zip(pictures(vlm), QUESTIONS, ANSWERS, strict=True))[:number]
    if name == "instructblip":  # an example without an image makes no batch of its own there
        examples = [example for example in examples if example[0] is not None]
    batch = encode(vlm, *zip(*examples, strict=True), padding_side=side)
    lengths, together = batch.inputs["attention_mask"].sum(1).tolist(), logits(vlm, batch)
    assert len(set(lengths)) > 1
    for row, (picture, question, answer) in enumerate(examples):
        alone = logits(vlm, encode(vlm, [picture], [question], [answer]))[0]
        assert alone.isfinite().all()
        difference = together[row][batch.inputs["attention_mask"][row].bool()] - alone
        assert float(difference.abs().max() / alone.abs().max()) < 1e-4


@visual_families
def test_an_example_without_an_image_may_be_among_others(name: str) -> None:
    vlm = zoo.vlm(name)
    both, one = (encode(vlm, images, QUESTIONS[: len(images)]) for images in ([image(0), None], [image(0)]))
    assert both.segments.layouts[1] is None
    assert not both.segments.visual[1].any()
    alone = logits(vlm, one)[0]
    torch.testing.assert_close(logits(vlm, both)[0, : len(alone)], alone, rtol=1e-4, atol=1e-4)


def test_a_family_that_cannot_do_without_an_image_says_so() -> None:
    with pytest.raises(ValueError, match="a batch without an image: instructblip cannot do without"):
        encode(zoo.vlm("instructblip"), [None], QUESTIONS[:1])


def test_without_its_chat_template_a_family_is_refused() -> None:
    vlm = zoo.llava()
    vlm.processor.chat_template = None
    with pytest.raises(ValueError, match="this llava has no chat template"):
        encode(vlm, [image(0)], [QUESTION])


def test_a_language_model_with_an_encoder_is_refused(tmp_path: Path) -> None:
    InstructBlipConfig(text_config=T5Config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Headwise reads decoders alone"):
        load_vlm(tmp_path)


def test_a_processor_from_before_patch_sizes_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = save(zoo.vlm("llava"), tmp_path)
    settings = json.loads((path / "processor_config.json").read_text())
    (path / "processor_config.json").write_text(json.dumps(settings | {"patch_size": None}))
    with pytest.raises(ValueError, match="does not know how many tokens an image takes: save it with patch_size=8"):
        load_vlm(path)


@pytest.mark.parametrize("name", ["llava", "paligemma", "qwen2_5_vl", "idefics3", "instructblip"])
def test_a_folder_loads_as_the_model_that_was_saved(name: str, tmp_path: Path) -> None:
    vlm = zoo.vlm(name)
    loaded = load_vlm(save(vlm, tmp_path), dtype="float32", device="cpu")
    ours, theirs = (encode(model, [image(0)], [QUESTION], [ANSWER]) for model in (vlm, loaded))
    torch.testing.assert_close(logits(loaded, theirs), logits(vlm, ours))


SHARING = {"fast_vlm", "llava", "smolvlm", "idefics3"}
"""Of the zoo, whose others have windows that keys slide out of, or do not share at all."""


@visual_families
def test_images_read_once_serve_all_their_questions(name: str) -> None:
    vlm, pictures, of = zoo.vlm(name), [image(k, (96, 96)) for k in range(3)], [0, 0, 1, 2]
    asked = [pictures[k] for k in of]
    with torch.no_grad():
        prefix = read_prefix(vlm, pictures)
        assert (prefix is not None) is (name in SHARING)
        if prefix is None:
            return
        batch, prompts = encode(vlm, asked, QUESTIONS[:4], ANSWERS[:4]), encode(vlm, asked, QUESTIONS[:4])
        assert prefix.fits(batch) and prefix.fits(prompts)
        for _ in range(2):  # the prefix stays as it is
            continued = read_on(vlm, prefix, of, batch)
            once, again = read_continued(continued), read_answers(vlm, batch)
            torch.testing.assert_close(once[0], again[0], rtol=1e-4, atol=1e-4)
            assert torch.equal(once[1], again[1]) and torch.equal(once[2], again[2])
            alone = [generate(vlm, [one], [question], 6)[0] for one, question in zip(asked, QUESTIONS, strict=False)]
            assert generate_continued(vlm, read_on(vlm, prefix, of, prompts), range(4), 6) == alone
            assert generate_continued(vlm, continued, [3, 1], 6) == [alone[3], alone[1]], "the answers that were read are not seen"


@visual_families
def test_the_segments_read_as_the_family_writes_its_prompts(name: str) -> None:
    vlm = zoo.vlm(name)
    batch = encode(vlm, [image(0)], [QUESTION], [ANSWER])
    ids, found = batch.inputs["input_ids"][0], batch.segments
    marks = found.system[0] & (ids == vlm.visual_id)
    read = [vlm.tokenizer.decode(ids[mask]) for mask in (found.system[0] & ~marks, found.question[0], found.answer[0])]
    assert read == [READ[name][0], READ[name][1].format(q=QUESTION), ANSWER]
    assert set(ids[found.visual[0]].tolist()) == {vlm.visual_id}
    assert ids[~found.real[0]].tolist() == [vlm.end_id]


@pytest.mark.parametrize(
    ("name", "end"), [("gemma3", "<end_of_turn>"), ("idefics3", "<end_of_utterance>"), ("llava", "</s>"), ("paligemma", "<eos>")]
)
def test_the_end_of_turn_is_what_the_template_writes(name: str, end: str) -> None:
    vlm = zoo.vlm(name)
    assert vlm.tokenizer.decode([vlm.end_id]) == end


@pytest.mark.parametrize("name", zoo.VISUAL_FAMILIES)
def test_another_image_changes_the_visual_tokens_and_no_others(name: str) -> None:
    vlm = zoo.vlm(name)
    one, other = (encode(vlm, [image(seed)], [QUESTION], [ANSWER]) for seed in (0, 7))
    assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
    changed = (embedded(vlm, one) - embedded(vlm, other)).abs().amax(-1) > 1e-3
    assert torch.equal(changed, one.segments.visual)
    first = int(one.segments.visual[0].int().argmax())
    before, after = (logits(vlm, one) - logits(vlm, other)).abs().amax(-1)[0].tensor_split([first])
    assert float(before.max() if first else 0) < 1e-4
    assert float(after[one.segments.answer[0, first:]].min()) > 1e-3


@numpy_warns
@visual_families
def test_the_prompt_is_the_processors_own(name: str) -> None:
    vlm = zoo.vlm(name)
    ours = encode(vlm, [image(0)], [QUESTION]).inputs
    if vlm.has_template:
        parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        text = vlm.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False)
        special = not text.startswith(vlm.tokenizer.bos_token)
        theirs = vlm.processor(images=[image(0)], text=[text], return_tensors="pt", add_special_tokens=special)
    else:
        text = QUESTION if name == "instructblip" else f"<image>{QUESTION}"
        theirs = vlm.processor(images=image(0), text=text, return_tensors="pt")
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("name", ["fast_vlm", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "gemma3"])
def test_an_appended_answer_is_what_the_template_makes_of_the_conversation(name: str) -> None:
    """Where the template puts no space before an answer."""
    vlm = zoo.vlm(name)
    ours = encode(vlm, [image(0)], [QUESTION], [ANSWER]).inputs
    turns = [("user", [{"type": "image", "image": image(0)}, {"type": "text", "text": QUESTION}])]
    turns.append(("assistant", [{"type": "text", "text": ANSWER}]))
    messages = [{"role": role, "content": content} for role, content in turns]
    theirs = vlm.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    for key in {"input_ids", "token_type_ids", "mm_token_type_ids"} & set(ours):
        assert torch.equal(ours[key], theirs[key][:, : ours["input_ids"].shape[1]]), key


@numpy_warns
@pytest.mark.parametrize("name", ["paligemma", "paligemma2"])
def test_an_appended_answer_is_paligemmas_suffix(name: str) -> None:
    vlm = zoo.vlm(name)
    ours = encode(vlm, [image(0)], [QUESTION], [ANSWER]).inputs
    theirs = vlm.processor(images=image(0), text=f"<image>{QUESTION}", suffix=ANSWER, return_tensors="pt")
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


@visual_families
def test_special_tokens_in_questions_and_answers_are_plain_text(name: str) -> None:
    vlm = zoo.vlm(name)
    mark = vlm.tokenizer.decode([vlm.visual_id])
    question, answer = f"Is {mark} {vlm.tokenizer.eos_token} here?", f"{vlm.tokenizer.eos_token} {mark}"
    hostile, plain = (encode(vlm, [image(0)], [q], [a]) for q, a in ((question, answer), (QUESTION, ANSWER)))
    ids = hostile.inputs["input_ids"][0]
    assert vlm.tokenizer.decode(ids[hostile.segments.answer[0]]) == answer
    assert vlm.tokenizer.decode(ids[hostile.segments.question[0]]) == READ[name][1].format(q=question)
    for token in (vlm.visual_id, vlm.tokenizer.eos_token_id, vlm.end_id):
        assert int((ids == token).sum()) == int((plain.inputs["input_ids"] == token).sum())


def test_two_images_in_one_prompt_are_refused() -> None:
    vlm = zoo.vlm("paligemma")
    layout = FAMILIES["paligemma"].layout
    assert layout is not None

    def half(*args):
        found = layout(*args)
        return replace(found, is_cell=found.is_cell[: len(found.is_cell) // 2])

    twice = replace(vlm, family=replace(vlm.family, layout=half))
    with pytest.raises(ValueError, match="16 image tokens in the prompt, one image makes 8: is there exactly one image"):
        encode(twice, [image(0)], [QUESTION])


def greedy(vlm: VLM, picture: Image.Image | None, steps: int) -> str:
    """The likeliest next token again and again, everything read anew each time."""
    inputs, found = encode(vlm, [picture], [QUESTION]).inputs, list[int]()
    ends = vlm.base.generation_config.eos_token_id
    while len(found) < steps and (not found or found[-1] not in {vlm.end_id, *(ends if isinstance(ends, list) else [ends])}):
        with torch.no_grad():
            found.append(int(vlm.model(**inputs, use_cache=False).logits[0, -1].argmax()))
        more = {"input_ids": found[-1], "attention_mask": 1, "token_type_ids": vlm.family.answer_type, "mm_token_type_ids": 0}
        inputs |= {key: torch.cat([inputs[key], torch.tensor([[more[key]]])], dim=1) for key in more if key in inputs}
    return vlm.tokenizer.decode(found, skip_special_tokens=True).strip()


@every_family
def test_generation_is_greedy_and_does_not_depend_on_the_batch(name: str) -> None:
    vlm = zoo.vlm(name)
    images = [None, None] if vlm.visual_id is None else [image(0), image(1, (40, 200))]
    together = generate(vlm, images, [QUESTION, "Red?"], max_new_tokens=6)
    assert together[0] == greedy(vlm, images[0], 6)
    assert together[1] == generate(vlm, images[1:], ["Red?"], max_new_tokens=6)[0]


@visual_families
def test_gradients_reach_the_decoder_and_the_image(name: str) -> None:
    vlm = zoo.vlm(name)
    batch = encode(vlm, [image(0)], [QUESTION], [ANSWER])
    weight, pixels = vlm.decoder.layers[0].self_attn.q_proj.weight, batch.inputs["pixel_values"].requires_grad_()
    loss = vlm.model(**batch.inputs).logits[batch.segments.answer].square().sum()
    for gradient in torch.autograd.grad(loss, [weight, pixels]):
        assert gradient.isfinite().all()
        assert float(gradient.abs().max()) > 0
