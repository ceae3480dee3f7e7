"""Which heads, in which direction, by how much: candidates, and the search by successive halving."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from headwise.calibration.zerotuning.measure import Measured
from headwise.calibration.zerotuning.settings import ZeroTuning

FIRST_ROUND = 25
"""Examples that every candidate is tried on, before the better half goes on with twice as many."""


@dataclass(frozen=True)
class Candidate:
    """The heads whose effect most wants this direction, and their gamma."""

    direction: Literal["up", "down"]
    share: float
    gamma: float


def candidates(settings: ZeroTuning) -> list[Candidate]:
    """Every direction, share and gamma."""
    gammas = {"up": settings.up, "down": settings.down}
    return [Candidate(way, share, gamma) for way in ("up", "down") for share in settings.shares for gamma in gammas[way]]


def chosen_heads(effect: Float[np.ndarray, "layer head"], candidate: Candidate, settings: ZeroTuning) -> Bool[np.ndarray, "layer head"]:
    """The share of all heads of the allowed layers that gain most in the candidate's direction; fewer where fewer gain at all."""
    depth = np.arange(len(effect)) / len(effect)
    allowed = np.broadcast_to(((depth >= settings.layers[0]) & (depth < settings.layers[1]))[:, None], effect.shape)
    gain = np.where(allowed, -effect if candidate.direction == "up" else effect, -np.inf)
    number = round(candidate.share * allowed.sum())
    order = np.argsort(-gain, axis=None, kind="stable")[:number]
    found = np.zeros(effect.size, dtype=bool)
    found[order] = gain.ravel()[order] > 0
    return found.reshape(effect.shape)


@dataclass(frozen=True)
class Trial:
    """A candidate on the first so many examples, what was measured, and whether it went on, at the end as the winner."""

    candidate: Candidate
    examples: int
    measured: Measured
    kept: bool


def successive_halving(
    found: Sequence[Candidate], measure: Callable[[Candidate, int], Measured], score: Callable[[Measured], float], examples: int
) -> list[Trial]:
    """All candidates on a few examples, the better half on twice as many, until all are used (Jamieson and Talwalkar 2016); the last trial
    that is kept is the winner's. measure: a candidate on the first so many examples. score: the higher the better; of equal ones the first
    is.
    """
    trials, number = list[Trial](), min(FIRST_ROUND, examples)
    while True:
        measured = [measure(candidate, number) for candidate in found]
        left = 1 if number == examples else -(-len(found) // 2)
        kept = set(sorted(range(len(found)), key=lambda place: (-score(measured[place]), place))[:left])
        trials += [Trial(found[place], number, measured[place], place in kept) for place in range(len(found))]
        if number == examples:
            return trials
        found = [found[place] for place in sorted(kept)]
        number = examples if len(found) == 1 else min(2 * number, examples)
