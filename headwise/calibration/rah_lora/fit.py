"""RAH-LoRA from a profile of the heads: targets, anchors, changes, step sizes, and what a plain PEFT LoRA folder holds of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from peft import LoraConfig
from torch import Tensor, nn

from headwise.calibration.adapter import weights_digest
from headwise.calibration.rah_lora.moments import Moments
from headwise.calibration.rah_lora.projections import Projections
from headwise.calibration.rah_lora.schema import TARGETS
from headwise.calibration.rah_lora.settings import RahLora
from headwise.calibration.rah_lora.targets import Head, HeadScores, anchors_for, choose_targets, layer_range
from headwise.calibration.rah_lora.transfer import Anchor, Transfer, effective_rank, similarities, transfers
from headwise.calibration.rah_lora.trust_region import Outcome, TrustRegion, divergence_curve, search
from headwise.calibration.rah_lora.updates import Factors, Update, scaled, stacked, updated
from headwise.checkpoints import frozen
from headwise.files import frame_of
from headwise.likelihood import answer_logits
from headwise.profile.saliency import layer_z_scores
from headwise.profile.sample import Question
from headwise.profile.table import HeadProfile
from headwise.vlm import VLM, Batch, encode

NO_ANCHOR = "no head within two layers has an I-SAL above beta"
ABOVE_DELTA = "the divergence is above delta at every step size"


@dataclass(frozen=True)
class RahFit:
    """A calibration: what its folder will hold, what became of every target, and what proves it.

    targets: rows of TARGETS; trials: of TRIALS; curve: of CURVE. kl: the divergence of the accepted model. `logits` are its
    `answer_logits` on `probe`; `base_sha256` is the digest of the model's weights, which are never touched.
    """

    config: LoraConfig
    weights: Mapping[str, Tensor]
    targets: pl.DataFrame
    trials: pl.DataFrame
    curve: pl.DataFrame
    kl: float
    forward_equivalents: float
    base_sha256: str
    probe: Batch
    logits: Float[Tensor, "target vocabulary"]


def fit_rah_lora(
    vlm: VLM, folder: Path, profile: HeadProfile, settings: RahLora, batch_size: int, progress: Callable[[int, int], object]
) -> RahFit:
    """Calibrate the heads that the profile gives as targets, within the trust region on its calibration set.

    folder: of the images. `progress` hears how much of the set is read, how many targets and then how many points of the curve are done.
    Raises ValueError if the profile is of another model, or the model's weights are quantised.
    """
    if profile.isal.shape != (vlm.num_layers, vlm.num_heads):
        raise ValueError(f"the profile is of {profile.isal.shape} layers and heads, the model has {(vlm.num_layers, vlm.num_heads)}")
    if getattr(vlm.base.config, "quantization_config", None) is not None:
        raise ValueError(f"{vlm.base.name_or_path}: the model is quantised, and RAH-LoRA averages weights: load it in bfloat16 or float32")
    projections = Projections(vlm)
    lowest = layer_range(settings, vlm.num_layers)[0]
    first = projections.module(lowest, "o_proj")
    targets = choose_targets(HeadScores(profile.isal, _flow(profile, settings)), settings)
    found = {target: _anchors(projections, target, targets, profile, settings) for target in targets}
    anchored = {target: anchors for target, anchors in found.items() if anchors}
    chunks = -(-len(profile.sample) // batch_size)
    starts = sorted({layer for layer, _ in anchored})  # of one step for all only the lowest is run from
    moments = Moments(projections, starts)

    def flow(unit: Transfer) -> float:
        return max(float(profile.caf[head]) for head in unit.heads)

    with frozen(vlm.base):
        batches = calibration_batches(vlm, folder, profile.sample, batch_size)
        kept_layers = starts[:1] if settings.mode == "joint" else starts
        region = TrustRegion(vlm, batches, kept_layers, moments.reading, lambda read: progress(read, chunks))
        units = transfers(projections, anchored, moments, settings)
        outcomes, trials = search(region, units, flow, settings, progress)
        accepted = [outcome for outcome in outcomes if outcome.alpha]
        kept = stacked([scaled(outcome.transfer.update, outcome.alpha) for outcome in accepted])
        kl = outcomes[-1].kl_after if outcomes else 0.0
        curve = divergence_curve(region, kept, min((outcome.transfer.layer for outcome in accepted), default=0), kl, progress)
        update = kept or {projections.path(lowest, "o_proj"): no_change(first)}
        with torch.no_grad(), updated(vlm.base, update):
            logits = answer_logits(vlm, region.probe)
    return RahFit(
        config=lora_config(update),
        weights=lora_weights(update),
        targets=_records(profile, found, outcomes),
        trials=trials,
        curve=curve,
        kl=kl,
        forward_equivalents=region.forward_equivalents,
        base_sha256=weights_digest(vlm.base),
        probe=region.probe,
        logits=logits,
    )


def _flow(profile: HeadProfile, settings: RahLora) -> Float[np.ndarray, "layer head"] | None:
    return {"absolute": profile.caf, "signed": profile.caf_signed, "none": None}[settings.caf]


def _anchors(projections: Projections, target: Head, targets: Sequence[Head], profile: HeadProfile, settings: RahLora) -> list[Anchor]:
    near = anchors_for(target[0], profile.isal, targets, settings.beta)
    return similarities(projections, target, near, profile.cosines, settings)[: settings.anchors]


def calibration_batches(vlm: VLM, folder: Path, sample: Sequence[tuple[Question, str]], batch_size: int) -> Iterator[Batch]:
    """The calibration set with the model's own answers, in batches of like length."""
    ordered = sorted(sample, key=lambda pair: len(pair[0].example.question) + len(pair[1]))
    for start in range(0, len(ordered), batch_size):
        questions, answers = zip(*ordered[start : start + batch_size], strict=True)
        yield encode(vlm, [one.open(folder) for one in questions], [one.example.question for one in questions], answers)


def no_change(module: nn.Linear) -> Factors:
    """Factors of rank 1 that are 0: a PEFT folder names at least one module."""
    zeros = partial(torch.zeros, device=module.weight.device)
    return Factors(zeros(module.out_features, 1), zeros(1, module.in_features))


def lora_config(update: Update) -> LoraConfig:
    """A LoRA on exactly these projections, each with its own rank and an equal alpha, so that every scale is 1."""
    ranks = {path: factors.up.shape[1] for path, factors in update.items()}
    return LoraConfig(r=1, lora_alpha=1, lora_dropout=0.0, target_modules=sorted(ranks), rank_pattern=ranks, alpha_pattern=ranks)


def lora_weights(update: Update) -> dict[str, Tensor]:
    """The factors under the names that PEFT gives them."""
    pairs = {path: (factors.down, factors.up) for path, factors in update.items()}
    return {
        f"base_model.model.{path}.lora_{letter}.weight": factor
        for path, both in pairs.items()
        for letter, factor in zip("AB", both, strict=True)
    }


def _records(profile: HeadProfile, found: Mapping[Head, Sequence[Anchor]], outcomes: Sequence[Outcome]) -> pl.DataFrame:
    """The rows of targets.parquet."""
    gap = layer_z_scores(profile.caf) - layer_z_scores(profile.isal)
    by_head = {head: outcome for outcome in outcomes for head in outcome.transfer.heads}
    rows = []
    for head, anchors in found.items():
        row: dict[str, object] = {"layer": head[0], "head": head[1], "isal": profile.isal[head], "caf": profile.caf[head], "gap": gap[head]}
        row["anchors"] = [
            {"layer": a.head[0], "head": a.head[1], "similarity": a.similarity, "maps": a.maps, "values": a.values, "outputs": a.outputs}
            for a in anchors
        ]
        rows.append(row | (_outcome(head, by_head[head]) if head in by_head else {"outcome": "skipped", "reason": NO_ANCHOR}))
    return frame_of(rows, TARGETS).sort("layer", "head")


def _outcome(head: Head, outcome: Outcome) -> dict[str, object]:
    values = outcome.transfer.singular_values[head]
    return {
        "outcome": "accepted" if outcome.alpha else "rolled back",
        "reason": None if outcome.alpha else ABOVE_DELTA,
        "singular_values": values.tolist(),
        "effective_rank": effective_rank(values),
        "damping": outcome.transfer.damping[head],
        "projections": sorted({path.rpartition(".")[2] for path in outcome.transfer.update}),
        "alpha": outcome.alpha,
        "kl_before": outcome.kl_before,
        "kl_after": outcome.kl_after,
    }
