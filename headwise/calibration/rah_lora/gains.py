"""What calibrating each head alone changes in the likelihood of reference answers: where an adapter's gain comes from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from headwise.calibration.adapter import WEIGHTS
from headwise.calibration.rah_lora.projections import SHARED, Projections
from headwise.calibration.rah_lora.schema import GAINS, TARGETS, TARGETS_FILE
from headwise.calibration.rah_lora.targets import Head
from headwise.calibration.rah_lora.updates import Factors, Update, updated
from headwise.checkpoints import frozen
from headwise.evaluation.paired import bootstrap_interval, cluster_sums
from headwise.evaluation.statistics import Statistics
from headwise.examples import BadExample, Example
from headwise.files import frame_of, read_table
from headwise.likelihood import answer_targets, open_referenced
from headwise.profile.sample import Question
from headwise.replay import replay_answers
from headwise.vlm import VLM, encode

UP, DOWN = ".lora_B.weight", ".lora_A.weight"
PREFIX = "base_model.model."


def head_gains(
    vlm: VLM,
    folder: Path,
    adapter: Path,
    questions: Sequence[Question],
    batch_size: int,
    settings: Statistics,
    progress: Callable[[int, int], object],
) -> tuple[pl.DataFrame, dict[str, str]]:
    """The rows of gains.parquet: the whole adapter, and each accepted head with its own part of it alone; and why examples are left out.

    A gain is the mean over the questions of the nats that the reference answer loses, with its 95 % interval over images (none of a single
    one). folder: of the images. Raises ValueError if no example can be used.
    """
    update, projections = read_update(adapter, vlm.device), Projections(vlm)
    targets = read_table(adapter / TARGETS_FILE, TARGETS).filter(pl.col("outcome") == "accepted")
    heads = [(int(row["layer"]), int(row["head"])) for row in targets.iter_rows(named=True)]
    parts: Mapping[Head | None, Update] = {None: update, **{head: part_of(update, head, projections) for head in heads}}
    starts = {None: min((layer for layer, _ in heads), default=0), **{head: head[0] for head in heads}}
    examples = sorted((one.example for one in questions), key=lambda one: sum(map(len, (one.question, *one.answers[:1]))))
    won: dict[Head | None, list[np.ndarray]] = {head: [] for head in parts}
    images, bad = list[str | None](), dict[str, str]()
    for start in range(0, len(examples), batch_size):
        progress(start, len(examples))
        opened = list(_opened(folder, examples[start : start + batch_size], bad))
        if not opened:
            continue
        pictures, chosen = zip(*opened, strict=True)
        images += [example.image for example in chosen]
        encoded = encode(vlm, pictures, [example.question for example in chosen], [example.answers[0] for example in chosen])
        labels = encoded.inputs["input_ids"][answer_targets(encoded)]
        with frozen(vlm.base):
            replay = replay_answers(vlm, encoded, sorted(set(starts.values())))
            before = _nats(replay.logits, labels, replay.examples)
            for head, part in parts.items():
                with updated(vlm.base, part):
                    won[head].append(before - _nats(replay.again(starts[head]), labels, replay.examples))
    progress(len(examples), len(examples))
    if not images:
        raise ValueError(f"{folder}: none of {len(examples)} examples can be used, the first: {next(iter(bad.values()), 'there is none')}")
    rows = [_row(head, np.concatenate(values), np.array(images), settings) for head, values in won.items()]
    return frame_of(rows, GAINS), bad


def _opened(folder: Path, examples: Sequence[Example], bad: dict[str, str]) -> Iterator[tuple[Image.Image | None, Example]]:
    """The usable examples with their images; the others are added to `bad`."""
    for example in examples:
        try:
            yield open_referenced(folder, example), example
        except BadExample as error:
            bad[example.id] = str(error)


def read_update(adapter: Path, device: torch.device) -> Update:
    """The factors of a written adapter by the path of their projection."""
    tensors = load_file(adapter / WEIGHTS, str(device))
    paths = sorted(name.removeprefix(PREFIX).removesuffix(UP) for name in tensors if name.endswith(UP))
    return {path: Factors(tensors[f"{PREFIX}{path}{UP}"], tensors[f"{PREFIX}{path}{DOWN}"]) for path in paths}


def part_of(update: Update, head: Head, projections: Projections) -> Update:
    """What of an update belongs to a head, the values and keys of its group included."""
    return dict(_parts(update, head, projections))


def _parts(update: Update, head: Head, projections: Projections) -> Iterator[tuple[str, Factors]]:
    for name in (*SHARED, "q_proj", "o_proj"):
        path = projections.path(head[0], name)
        if path in update:
            yield path, projections.restricted(head, name, update[path])


def _nats(logits: Float[Tensor, "target vocabulary"], labels: Tensor, examples: Tensor) -> Float[np.ndarray, " example"]:
    nats = cross_entropy(logits.float(), labels, reduction="none")
    return torch.zeros(int(examples.max()) + 1, device=nats.device).index_add(0, examples, nats).double().cpu().numpy()


def _row(head: Head | None, gains: Float[np.ndarray, " example"], images: np.ndarray, settings: Statistics) -> dict[str, object]:
    layer, number = head or (None, None)
    row: dict[str, object] = {"layer": layer, "head": number, "gain": float(gains.mean()), "examples": len(gains)}
    if len(set(images)) > 1:
        sums = cluster_sums(gains, np.ones_like(gains), images)
        row["low"], row["high"] = bootstrap_interval(sums, settings.bootstrap, settings.seed)
    return row
