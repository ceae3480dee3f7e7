"""Pretraining of the embedded model: the projector learns to speak in the words of the language model, then both learn to answer.

Every image is composed on the fly and seen once, so there is nothing to memorise but the names themselves. Two things make it cheap
enough for a CPU: the questions about one image share its visual tokens in one packed sequence (each question sees the image and itself,
never another question), and the language model's head runs on answer tokens alone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from peft import LoraConfig, get_peft_model
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import FastVlmForConditionalGeneration, LlavaProcessor, get_cosine_schedule_with_warmup

from headwise.checkpoints import quiet
from headwise.compositions import Composition, Question
from headwise.cutouts import Photographs, compose_photograph
from headwise.files import new_file
from headwise.layout import View
from headwise.scenes import compose_scene, descriptions
from headwise.segments import coverage
from headwise.smol import NAME

TARGETS = (
    r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    r"|model\.vision_tower\.timm_model\.(blocks\.\d+\.\d+\.conv_pwl?|conv_head)"
)
"""All linear layers of the language model, and the vision tower's pointwise convolutions: made for ImageNet's names, it tells hues apart
poorly (88 % of the drawn figures' cells by a probe) and letters hardly at all."""
PROJECTOR = "multi_modal_projector"
TEMPERATURE = 0.03
"""Of the cosine similarities: descriptions that differ by one word of four are alike by 0.9 and more."""
REPORT_STEPS, CHECKPOINT_STEPS = 20, 100
ALIGNMENT_START = 1_000_000_000
"""The number of the alignment's first composition, far from those of the answering that follows."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class Pretraining:
    """How `headwise-smol` is trained."""

    alignment_steps: Annotated[int, Field(ge=0, description="steps that fit the visual tokens to the names' embeddings")] = 450
    steps: Annotated[int, Field(ge=1, description="steps of answering questions, projector and LoRA together")] = 1600
    images_per_step: Annotated[
        int, Field(ge=1, description="new compositions per step of answering; alignment takes eight times as many")
    ] = 4
    photographs: Annotated[float, Field(ge=0, le=1, description="share of composed photographs, the rest are drawn scenes")] = 0.3
    questions: Annotated[int, Field(ge=1, description="closed questions per image at most")] = 6
    captions: Annotated[float, Field(ge=0, le=1, description="share of images whose caption is learnt too")] = 0.7
    rank: Annotated[int, Field(ge=1, description="rank of the LoRA on the language model and the vision tower")] = 32
    learning_rate: Annotated[float, Field(gt=0, description="peak learning rate (cosine, warm-up 3 %)")] = 1e-3
    compiled: Annotated[bool, Field(description="compile the decoder layers: a fifth faster, needs a C++ compiler")] = True
    seed: Annotated[int, Field(ge=0, description="seed of the compositions and of the LoRA")] = 0


@plain_dataclass(frozen=True)
class Lessons:
    """What is trained, and on what."""

    model: FastVlmForConditionalGeneration
    processor: LlavaProcessor
    settings: Pretraining
    photographs: Photographs | None


@plain_dataclass(frozen=True)
class Packed:
    """One image with several questions in one sequence: prefix, visual tokens, then each question with its answer."""

    input_ids: Int[Tensor, " token"]
    position_ids: Int[Tensor, " token"]
    group: Int[Tensor, " token"]
    """0 for the shared prefix and the visual tokens, k for the k-th question; a token sees group 0 and its own, causally."""
    answer: Bool[Tensor, " token"]
    """The tokens to predict: the answers and their ends."""


def compositions(settings: Pretraining, photographs: Photographs | None, start: int) -> Iterator[Composition]:
    """The endless, seeded stream of pretraining images from number `start` on: photographs (where there are any) and scenes."""
    number = start
    while True:
        rng = np.random.default_rng([settings.seed, number])
        if photographs is not None and rng.random() < settings.photographs:
            yield compose_photograph(photographs, "pretrain", rng)
        else:
            yield compose_scene(rng, "pretrain")
        number += 1


def visual_features(
    model: FastVlmForConditionalGeneration, processor: LlavaProcessor, batch: Sequence[Composition]
) -> Float[Tensor, "image visual channel"]:
    """The vision tower's features, one row per grid cell in reading order."""
    images: Any = processor.image_processor
    pixels = images([c.image for c in batch], return_tensors="pt")["pixel_values"]
    tower: Any = model.model.vision_tower
    features = tower(pixels.to(tower.dtype)).last_hidden_state
    return features.flatten(2).transpose(1, 2)


def align(lessons: Lessons, out: Path, progress: Callable[[str], None]) -> None:
    """Fit projector and vision LoRA so that a visual token resembles the mean input embedding of the words that describe what its cell
    shows: texture, colour, shape and number of figures, words, names.

    The loss is the cross-entropy of the cosine similarities with all descriptions there are (the embeddings' common mean taken off),
    plus the squared distance to the description's embedding. Without it the language model needs many thousand questions before it
    finds out that the visual tokens mean anything.
    """
    model, processor, settings = lessons.model, lessons.processor, lessons.settings
    table: Any = model.get_input_embeddings()
    embeddings = table.weight.detach().float()
    mean = embeddings.mean(0)
    known = descriptions() + (lessons.photographs.names(drift=False) if lessons.photographs else [])
    tokens = processor.tokenizer(known, add_special_tokens=False).input_ids
    targets = torch.stack([embeddings[ids].mean(0) for ids in tokens])
    parts: Any = (model.model.vision_tower, model.model.multi_modal_projector)
    trained = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
    weights = MasterWeights(trained, settings.learning_rate, settings.alignment_steps)
    number = 8 * settings.images_per_step
    first = weights.load(out) if out.is_file() else 0
    stream = compositions(settings, lessons.photographs, start=ALIGNMENT_START + first * number)
    for step in range(first, settings.alignment_steps):
        batch = [next(stream) for _ in range(number)]
        features = visual_features(model, processor, batch)
        outputs = model.model.multi_modal_projector(features).float().flatten(0, 1)
        side = math.isqrt(outputs.shape[0] // len(batch))
        labels = _cell_labels(batch, View(side, side), known)
        shown = labels >= 0
        logits = normalize(outputs[shown] - mean, dim=-1) @ normalize(targets - mean, dim=-1).T / TEMPERATURE
        distance = (outputs[shown] - targets[labels[shown]]).square().sum(-1).mean() + (outputs[~shown] - mean).square().sum(-1).mean()
        loss = cross_entropy(logits, labels[shown]) + 0.1 * distance
        weights.step(loss)
        if (step + 1) % REPORT_STEPS == 0:
            right = (logits.argmax(-1) == labels[shown]).float().mean()
            progress(
                f"alignment {step + 1}/{settings.alignment_steps} loss {loss.item():.3f} cells described {right:.1%} of {len(known)} ways"
            )
        if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == settings.alignment_steps:
            weights.save(out, step + 1)


def _cell_labels(batch: Sequence[Composition], view: View, known: Sequence[str]) -> Int[Tensor, " cell"]:
    """For every visual token the number of the description of the thing that covers most of its cell (-1: under 40 %)."""
    number = {description: i for i, description in enumerate(known)}
    labels = []
    for composition in batch:
        shares = np.stack([coverage(thing.mask, (view,)) for thing in composition.things])
        numbers = np.array([number[thing.description or thing.phrase] for thing in composition.things])
        labels.append(np.where(shares.max(0) >= 0.4, numbers[shares.argmax(0)], -1))
    return torch.from_numpy(np.concatenate(labels))


def pack(questions: Sequence[Question], processor: LlavaProcessor, num_visual: int) -> Packed:
    """Token ids of one image's questions in the model's own chat form."""
    tokenizer = processor.tokenizer
    prefix = tokenizer("<|im_start|>user\n", add_special_tokens=False).input_ids
    image_id = tokenizer.convert_tokens_to_ids(processor.image_token)
    ids = [*prefix, *[image_id] * num_visual]
    start = len(ids)
    positions, group, answer = list(range(start)), [0] * start, [False] * start
    for k, question in enumerate(questions, start=1):
        prompt = tokenizer(f"{question.question}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False).input_ids
        reply = [*tokenizer(question.answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids += prompt + reply
        positions += range(start, start + len(prompt) + len(reply))
        group += [k] * (len(prompt) + len(reply))
        answer += [False] * len(prompt) + [True] * len(reply)
    return Packed(torch.tensor(ids), torch.tensor(positions), torch.tensor(group), torch.tensor(answer))


def packed_mask(group: Int[Tensor, "image token"]) -> Bool[Tensor, "image 1 token token"]:
    """Who sees whom: causally, the shared prefix and the own question; padding (group -1) sees and shows itself alone."""
    number = group.shape[1]
    causal = torch.ones(number, number, dtype=torch.bool).tril()
    allowed = (group[:, :, None] == group[:, None, :]) | ((group[:, None, :] == 0) & (group[:, :, None] > 0))
    return (causal & allowed & ((group[:, :, None] >= 0) | torch.eye(number, dtype=torch.bool)))[:, None]


def answer_loss(
    model: FastVlmForConditionalGeneration, features: Float[Tensor, "image visual channel"], packed: Sequence[Packed]
) -> tuple[Float[Tensor, ""], float]:
    """Mean cross-entropy of the answer tokens in nats, and the share of answer tokens that are right."""
    body = model.model
    pad = lambda parts, value: torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)  # noqa: E731
    ids, group = pad([p.input_ids for p in packed], 0), pad([p.group for p in packed], -1)
    embedded = body.get_input_embeddings()(ids)
    projected = body.multi_modal_projector(features.to(embedded.dtype))
    embedded = embedded.masked_scatter((ids == model.config.image_token_id)[..., None], projected)
    hidden = body.language_model(
        inputs_embeds=embedded,
        attention_mask=packed_mask(group),
        position_ids=pad([p.position_ids for p in packed], 0),
        use_cache=False,
    ).last_hidden_state
    predicted = pad([p.answer for p in packed], False)[:, 1:]
    logits = model.lm_head(hidden[:, :-1][predicted]).float()
    labels = ids[:, 1:][predicted]
    return cross_entropy(logits, labels), (logits.argmax(-1) == labels).float().mean().item()


class MasterWeights:
    """AdamW on fp32 copies of bfloat16 parameters, with warm-up and cosine: small steps would be lost in bfloat16's eight bits."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], learning_rate: float, steps: int) -> None:
        """Copies of the parameters as they are now."""
        self.parameters = parameters
        self.masters = [parameter.detach().float().clone() for parameter in parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, round(0.03 * steps), steps)

    def step(self, loss: Float[Tensor, ""]) -> None:
        """One update, its gradient clipped to norm 1."""
        gradients = torch.autograd.grad(loss, list(self.parameters))
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient.float()
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self._write_back()

    def save(self, path: Path, step: int) -> None:
        """Everything that the next step depends on, written whole."""
        with new_file(path) as temporary:
            torch.save(
                {"step": step, "masters": self.masters, "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()},
                temporary,
            )

    def load(self, path: Path) -> int:
        """Go on from a saved state; returns its step."""
        state = torch.load(path, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for master, saved in zip(self.masters, state["masters"], strict=True):
            master.copy_(saved)
        self._write_back()
        return int(state["step"])

    @torch.no_grad()
    def _write_back(self) -> None:
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            parameter.copy_(master)


def fit(
    model: FastVlmForConditionalGeneration,
    processor: LlavaProcessor,
    settings: Pretraining,
    photographs: Photographs | None,
    out: Path,
    progress: Callable[[str], None],
) -> None:
    """Align, then train projector and LoRA in bfloat16 with fp32 master weights; `out` is a PEFT folder in the end.

    Both write a checkpoint into `out` every CHECKPOINT_STEPS steps and go on from it, so a killed training loses minutes.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    lora = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=TARGETS, modules_to_save=[PROJECTOR])
    nn.Module.to(model, torch.bfloat16)
    with quiet():
        adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    lessons = Lessons(model, processor, settings, photographs)
    align(lessons, out / "alignment.pt", progress)
    answer(lessons, out / "checkpoint.pt", progress)
    lora.base_model_name_or_path = NAME
    adapted.save_pretrained(str(out), save_embedding_layers=False)


def answer(lessons: Lessons, out: Path, progress: Callable[[str], None]) -> None:
    """Train projector and LoRA, the vision tower's too, to answer the compositions' questions and to caption them."""
    model, processor, settings = lessons.model, lessons.processor, lessons.settings
    if settings.compiled:
        for layer in model.model.language_model.layers:
            layer.compile(dynamic=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = MasterWeights(trained, settings.learning_rate, settings.steps)
    first = weights.load(out) if out.is_file() else 0
    stream = compositions(settings, lessons.photographs, start=first * settings.images_per_step)
    losses: list[tuple[float, float]] = []
    for step in range(first, settings.steps):
        batch = [next(stream) for _ in range(settings.images_per_step)]
        features = visual_features(model, processor, batch)
        loss, right = answer_loss(model, features, _pack_batch(processor, settings, batch, step, features.shape[1]))
        weights.step(loss)
        losses.append((loss.item(), right))
        if len(losses) == REPORT_STEPS:
            mean, share = np.mean(losses, axis=0)
            progress(f"step {step + 1}/{settings.steps} loss {mean:.4f} answer tokens right {share:.1%}")
            losses.clear()
        if (step + 1) % CHECKPOINT_STEPS == 0:
            weights.save(out, step + 1)


def _pack_batch(processor: LlavaProcessor, settings: Pretraining, batch: Sequence[Composition], step: int, num_visual: int) -> list[Packed]:
    """Each image's first closed questions, and for a random share of the images the caption."""
    rng = np.random.default_rng([settings.seed, 1, step])
    packed = []
    for composition in batch:
        caption, *closed = composition.questions
        questions = [*closed[: settings.questions], *([caption] if rng.random() < settings.captions else [])]
        packed.append(pack(questions, processor, num_visual))
    return packed
