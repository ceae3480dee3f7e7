"""LoRA (Hu et al. 2021) on the query, key and value projections of chosen decoder layers, trained to answer."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from headwise.calibration.adapter import weights_digest
from headwise.calibration.settings import Lora
from headwise.checkpoints import quiet, restored_flags
from headwise.examples import BadExample, Example, check_bad_share
from headwise.files import frame_of
from headwise.likelihood import answer_logits, open_referenced, read_answers
from headwise.vlm import VLM, Batch, encode

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
MAX_GRADIENT_NORM = 1.0
PROBE_EXAMPLES = 4

LOSSES = pa.schema([("step", pa.int32()), ("loss", pa.float64()), ("learning_rate", pa.float64()), ("gradient_norm", pa.float64())])
"""losses.parquet: per step, nats per answer token before the step, the rate used, and the gradient's norm before clipping."""


@dataclass(frozen=True)
class LoraFit:
    """A trained adapter: what its folder will hold, and what proves it.

    `logits` are the trained model's `answer_logits` on `probe`; `base_sha256` is the digest of the model's weights, the same before and
    after; `num_examples` counts the different examples seen.
    """

    config: LoraConfig
    weights: Mapping[str, Tensor]
    losses: pl.DataFrame
    bad: Mapping[str, str]
    num_examples: int
    num_parameters: int
    base_sha256: str
    probe: Batch
    logits: Float[Tensor, "target vocabulary"]


def target_pattern(vlm: VLM, layers: Sequence[int]) -> str:
    """The regular expression of the full module paths: PEFT's `layers_to_transform` with bare suffixes would also hit the vision tower."""
    numbers, projections = "|".join(map(str, sorted(layers))), "|".join(PROJECTIONS)
    return rf"{re.escape(vlm.family.decoder)}\.layers\.(?:{numbers})\.self_attn\.(?:{projections})"


def target_modules(vlm: VLM, layers: Sequence[int]) -> dict[str, nn.Linear]:
    """The projections to adapt, by path. Raises ValueError on layers that the model has not, or projections that are no linear maps."""
    if not layers or len(set(layers)) < len(layers) or not all(0 <= layer < vlm.num_layers for layer in layers):
        raise ValueError(f"layers {list(layers)}: expected different layers from 0 to {vlm.num_layers - 1}, one at least")
    pattern = re.compile(target_pattern(vlm, layers))
    found = {name: module for name, module in vlm.base.named_modules() if pattern.fullmatch(name)}
    linear = {name: module for name, module in found.items() if isinstance(module, nn.Linear)}
    if len(linear) != len(PROJECTIONS) * len(layers):
        raise ValueError(f"{pattern.pattern}: {len(linear)} linear maps match, expected {len(PROJECTIONS)} in each of {len(layers)} layers")
    return linear


def lora_parameters(rank: int, modules: Mapping[str, nn.Linear]) -> int:
    """Trainable parameters: the sum over modules of `rank (in + out)`."""
    return sum(rank * (module.in_features + module.out_features) for module in modules.values())


def learning_rate_factor(step: int, settings: Lora) -> float:
    """Share of the highest learning rate at a step (0-based): a linear warm-up to 1, then half a cosine towards 0."""
    warmup = math.ceil(settings.warmup_ratio * settings.steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))


def fit_lora(
    vlm: VLM,
    folder: Path,
    examples: Sequence[Example],
    layers: Sequence[int],
    settings: Lora,
    progress: Callable[[int, int], object],
) -> LoraFit:
    """Train a LoRA on the first reference answers of the examples (their tokens and the end of turn), and nothing else.

    The adapter is fp32 on a base of any type. The model stays in evaluation mode, so that no running statistic moves, and is handed back
    as it was. `progress` hears how many steps of how many are done. Raises ValueError on unknown layers, too
    many bad examples, or a loss that is not finite.
    """
    modules, before = target_modules(vlm, layers), weights_digest(vlm.base)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=target_pattern(vlm, layers), lora_dropout=0.0)
    num_parameters, seen = lora_parameters(settings.rank, modules), dict[str, str | None]()
    with _adapted(vlm, config, settings.seed) as adapted:
        parameters = _trainable(adapted.model, num_parameters)
        data = _usable(adapted, folder, examples, settings, seen)
        losses = _train(adapted, parameters, data, settings, progress)
        bad = {example_id: reason for example_id, reason in seen.items() if reason is not None}
        num_examples = len(seen) - len(bad)
        probe = _encode(adapted, islice(data, PROBE_EXAMPLES))
        with torch.no_grad():
            logits = answer_logits(adapted, probe)
        weights = {
            name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(adapted.model, save_embedding_layers=False).items()
        }
    if weights_digest(vlm.base) != before:
        raise ValueError("training changed the weights of the base model: is another adapter or hook on it?")
    check_bad_share(bad, len(examples), settings.max_bad_share)
    return LoraFit(config, weights, losses, bad, num_examples, num_parameters, before, probe, logits)


@contextmanager
def _adapted(vlm: VLM, config: LoraConfig, seed: int) -> Iterator[VLM]:
    """The model with a new adapter on it, seeded without touching the caller's random state; taken off again at the end."""
    with restored_flags(vlm.base), torch.random.fork_rng():
        torch.manual_seed(seed)
        with quiet():
            adapted = get_peft_model(vlm.base, config).eval()
        assert isinstance(adapted, PeftModel)
        try:
            yield replace(vlm, model=adapted)
        finally:
            adapted.unload()


def _trainable(model: nn.Module, expected: int) -> list[nn.Parameter]:
    """The adapter's parameters, proved to be the only trainable ones and as many as the closed form says."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name and parameter.dtype == torch.float32 for name, parameter in trainable.items())
    found = sum(parameter.numel() for parameter in trainable.values())
    if found != expected:
        raise ValueError(f"{found} parameters would be trained, rank (in + out) over the targets is {expected}")
    return list(trainable.values())


def _usable(
    vlm: VLM, folder: Path, examples: Sequence[Example], settings: Lora, seen: dict[str, str | None]
) -> Iterator[tuple[Example, Image.Image | None]]:
    """The usable examples with their images, without end: epoch after epoch, each in its own seeded order.

    Fills `seen` with each example met and why it is bad, None if it is not. Raises ValueError after an epoch with too many bad ones.
    """
    generator = np.random.default_rng(settings.seed)
    while True:
        for index in generator.permutation(len(examples)):
            example = examples[index]
            if seen.get(example.id) is not None:
                continue
            try:
                image = open_referenced(folder, example)
                if example.id not in seen:
                    encode(vlm, [image], [example.question], [example.answers[0]])  # an answer without tokens, a prompt too long
                seen[example.id] = None
                yield example, image
            except BadExample as error:
                seen[example.id] = str(error)
        check_bad_share({i: reason for i, reason in seen.items() if reason is not None}, len(seen), settings.max_bad_share)


def _encode(vlm: VLM, chosen: Iterable[tuple[Example, Image.Image | None]]) -> Batch:
    examples, images = zip(*chosen, strict=True)
    return encode(vlm, images, [example.question for example in examples], [example.answers[0] for example in examples])


def _train(
    vlm: VLM,
    parameters: Sequence[nn.Parameter],
    data: Iterator[tuple[Example, Image.Image | None]],
    settings: Lora,
    progress: Callable[[int, int], object],
) -> pl.DataFrame:
    """AdamW without weight decay; the loss of a step is the sum of its nats over the sum of its answer tokens. Returns the LOSSES table."""
    optimizer = AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    schedule = LambdaLR(optimizer, lambda step: learning_rate_factor(step, settings))
    rows = []
    for step in range(settings.steps):
        nats, tokens, _ = read_answers(vlm, _encode(vlm, islice(data, settings.batch_size)))
        loss = nats.sum() / tokens.sum()
        if not bool(loss.isfinite()):
            raise ValueError(f"step {step}: the loss is {loss.item()}; a lower learning_rate than {settings.learning_rate:g} may help")
        optimizer.zero_grad()
        loss.backward()
        norm = clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        rows.append({"step": step, "loss": loss.item(), "learning_rate": schedule.get_last_lr()[0], "gradient_norm": norm.item()})
        optimizer.step()
        schedule.step()
        progress(step + 1, settings.steps)
    return frame_of(rows, LOSSES)
