"""How far RAH-LoRA goes: the divergence from the uncalibrated model, and the search for the step size that it allows."""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from headwise.calibration.rah_lora.schema import CURVE, NEGLIGIBLE, TRIALS
from headwise.calibration.rah_lora.settings import RahLora
from headwise.calibration.rah_lora.transfer import Transfer
from headwise.calibration.rah_lora.updates import Update, scaled, stacked, updated
from headwise.files import frame_of
from headwise.replay import Replay, replay_answers
from headwise.vlm import VLM, Batch

CURVE_SCALES = (NEGLIGIBLE, 0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Outcome:
    """What became of a target: its step size, 0 if it was rolled back, and the divergence before it was tried and after."""

    transfer: Transfer
    alpha: float
    kl_before: float
    kl_after: float


class TrustRegion:
    """The calibration set, run once, and what a change makes of it; `forward_equivalents` counts the passes over it so far."""

    def __init__(
        self,
        vlm: VLM,
        batches: Iterable[Batch],
        layers: Collection[int],
        reading: Callable[[Batch], AbstractContextManager[object]],
        read: Callable[[int], object],
    ) -> None:
        """Run every batch, inside the block that `reading` gives for it, and keep the streams where a layer of these begins, and the first
        batch as `probe`. `read` hears how many are read.
        """
        self._vlm = vlm
        self._replays = list[Replay]()
        for batch in batches:
            if not self._replays:
                self.probe = batch
            with reading(batch):
                self._replays.append(replay_answers(vlm, batch, layers))
            read(len(self._replays))
        self.forward_equivalents = 1.0

    def divergence(self, update: Update, start: int) -> float:
        """`E[KL(p || p')]` in nats: p the uncalibrated model, p' the one with this change of no layer below `start`; the mean over the
        calibration set of each example's mean over the last position of its prompt and those of its answer.
        """
        with updated(self._vlm.base, update):
            means = [divergences(replay.logits, replay.again(start), replay.examples) for replay in self._replays]
        self.forward_equivalents += (self._vlm.num_layers - start) / self._vlm.num_layers
        return float(torch.cat(means).mean())


def divergences(
    before: Float[Tensor, "target vocabulary"], after: Float[Tensor, "target vocabulary"], examples: Tensor
) -> Float[Tensor, " example"]:
    """Per example the mean KL(before || after) over its targets, in nats. examples: whose each target is, from 0."""
    log_p, log_q = (logits.float().log_softmax(-1) for logits in (before, after))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)
    number = int(examples.max()) + 1
    sums = torch.zeros(number, device=kl.device).index_add(0, examples, kl)
    return sums / torch.bincount(examples, minlength=number)


def divergence_curve(region: TrustRegion, update: Update, start: int, known: float, progress: Callable[[int, int], object]) -> pl.DataFrame:
    """The rows of curve.parquet: how fast the divergence grows around an accepted change, whose own is known."""
    found = dict[float, float]()
    for done, scale in enumerate(CURVE_SCALES if update else ()):
        progress(done, len(CURVE_SCALES))
        found[scale] = known if scale == 1 else region.divergence(scaled(update, scale), start)
    return frame_of([{"scale": scale, "kl": kl} for scale, kl in found.items()], CURVE)


def search(
    region: TrustRegion,
    transfers: Sequence[Transfer],
    flow: Callable[[Transfer], float],
    settings: RahLora,
    progress: Callable[[int, int], object],
) -> tuple[list[Outcome], pl.DataFrame]:
    """The step size of every transfer: max_alpha halved until the divergence is at most delta, or 0 after so many halvings.

    `joint` seeks one for all, `greedy` one for each on top of those accepted so far. Returns the outcomes in the order of the search and
    every trial (TRIALS; joint trials name no head). flow: by which `order = caf` sorts.
    """
    trials = list[dict[str, object]]()
    if settings.mode == "joint":
        units = [list(transfers)] if transfers else []
    elif settings.order == "caf":
        units = [[one] for one in sorted(transfers, key=flow, reverse=True)]
    else:
        units = [[one] for one in sorted(transfers, key=lambda one: one.heads, reverse=True)]
    kept, lowest, before = list[Update](), list[int](), 0.0
    outcomes = list[Outcome]()
    for done, unit in enumerate(units):
        change, start = stacked([one.update for one in unit]), min([one.layer for one in unit] + lowest)
        layer, head = unit[0].heads[0] if settings.mode == "greedy" else (None, None)
        alpha, after = 0.0, before
        for tried in (settings.max_alpha / 2**halving for halving in range(settings.halvings + 1)):
            found = region.divergence(stacked([*kept, scaled(change, tried)]), start)
            trials.append({"layer": layer, "head": head, "alpha": tried, "kl": found, "accepted": found <= settings.delta})
            if found <= settings.delta:
                alpha, after = tried, found
                kept.append(scaled(change, alpha))
                lowest.append(start)
                break
        outcomes += [Outcome(one, alpha, before, after) for one in unit]
        before = after
        progress(done + 1, len(units))
    return outcomes, frame_of(trials, TRIALS)
