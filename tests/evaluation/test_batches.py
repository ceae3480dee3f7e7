"""Answers in batches, padded on the left with a cache, are those of one by one: every family, every kind of adapter."""

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from headwise.attention.edits import Edits, editing
from headwise.vlm import VLM, Batch, encode, generate_ids
from tests import zoo
from tests.attention.test_parity import QUESTIONS, SIZES
from tests.tiny import image

FAMILIES = [*zoo.VISUAL_FAMILIES, *zoo.TEXT_FAMILIES]
TIE = 1e-4
STEPS = 6
PROJECTIONS = r".*\.self_attn\.{}"


def adapted(vlm: VLM, kind: str) -> VLM:
    """With an adapter of random weights on the decoder's attention, or the model as it is."""
    if kind == "none" or kind == "gates":
        return vlm
    query, output = PROJECTIONS.format("[qkv]_proj"), PROJECTIONS.format("o_proj")
    lora = LoraConfig(r=2, lora_alpha=8, target_modules=query, init_lora_weights=False)
    gain = IA3Config(target_modules=output, feedforward_modules=output, init_ia3_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = get_peft_model(vlm.base, gain if kind == "ia3" else lora)
        spread(model)
    found = VLM(model.eval(), vlm.processor, vlm.family)
    if kind == "merged":
        merged = model.merge_and_unload()
        assert isinstance(merged, type(vlm.base))
        found = VLM(merged, vlm.processor, vlm.family)
    return found


def spread(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            parameter.data.uniform_(0.2, 2)
        elif "lora_" in name:
            parameter.data.normal_(std=0.3)


def prompts(vlm: VLM, examples: list[int]) -> Batch:
    pictures = [image(k, SIZES[k]) if vlm.visual_id is not None else None for k in examples]
    return encode(vlm, pictures, [QUESTIONS[k] for k in examples], padding_side="left")


def edited(vlm: VLM, kind: str, batch: Batch) -> AbstractContextManager[object]:
    gates = torch.linspace(0.3, 1.7, vlm.num_layers * vlm.num_heads).reshape(vlm.num_layers, vlm.num_heads)
    return editing(vlm, Edits(gates=gates), batch.segments) if kind == "gates" else nullcontext()


def said(vlm: VLM, kind: str, examples: list[int]) -> Tensor:
    batch = prompts(vlm, examples)
    with edited(vlm, kind, batch):
        return generate_ids(vlm, batch, STEPS)


def is_tie(vlm: VLM, kind: str, k: int, before: Tensor) -> bool:
    """Whether the two likeliest tokens after the prompt and these lie within TIE of each other."""
    batch = prompts(vlm, [k])
    inputs = dict(batch.inputs)
    more = {"input_ids": before, "attention_mask": 1, "token_type_ids": vlm.family.answer_type, "mm_token_type_ids": 0}
    for name in more.keys() & inputs.keys():
        own = torch.as_tensor(more[name]).expand(1, len(before))
        inputs[name] = torch.cat([inputs[name], own.to(inputs[name].dtype)], dim=1)
    with edited(vlm, kind, batch), torch.no_grad():
        first, second = vlm.model(**inputs, use_cache=False).logits[0, -1].topk(2).values
    return float(first - second) < TIE


@pytest.mark.parametrize("kind", ["none", "lora", "merged", "ia3", "gates"])
@pytest.mark.parametrize("name", FAMILIES)
def test_answers_in_batches_are_those_of_one_by_one(name: str, kind: str) -> None:
    vlm = adapted(zoo.fresh(name), kind)
    together, plain = (said(model, of, list(range(5))) for model, of in ((vlm, kind), (zoo.vlm(name), "none")))
    for k in range(5):
        alone = said(vlm, kind, [k])[0]
        differs = (together[k, : len(alone)] != alone).nonzero()
        assert not len(differs) or is_tie(vlm, kind, k, alone[: int(differs[0])]), (k, alone, together[k])
    assert isinstance(vlm.model, PeftModel) is (kind in ("lora", "ia3"))
    size = min(together.shape[1], plain.shape[1])
    assert torch.equal(together[:, :size], plain[:, :size]) is (kind == "none"), "an adapter that changes no answer shows nothing"
