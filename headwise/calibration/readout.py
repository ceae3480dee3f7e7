"""Controls that leave the model alone: labels' log-likelihoods shifted, or sharpened, by what calibration examples say."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax

from headwise.labels import Readout

LOG_TEMPERATURES = (-5.0, 5.0)
"""Between which the logarithm of a temperature is sought."""
Scored = tuple[Sequence[str], Float[np.ndarray, "example label"], Int[np.ndarray, " example"]]
"""A task's labels, their log-likelihoods, and which is right."""


def fit_bias(scored: Mapping[str, Scored]) -> Readout:
    """For each task the shift of its labels that makes the right ones likeliest (mean nats, a convex problem): a threshold moved, no more.

    With two labels it is their decision threshold; cf. the bias of contextual calibration (Zhao et al. 2021, arXiv 2102.09690), fitted.
    """
    return Readout(bias={task: _shift(*own) for task, own in scored.items()})


def fit_temperature(scored: Mapping[str, Scored]) -> Readout:
    """One temperature for all tasks that makes the right labels likeliest (Guo et al. 2017, arXiv 1706.04599); no answer changes by it."""

    def nats(log_temperature: float) -> float:
        each = [_nats(log_probs / np.exp(log_temperature), right) for _, log_probs, right in scored.values()]
        return float(np.concatenate(each).mean())

    found: Any = minimize_scalar(nats, bounds=LOG_TEMPERATURES, method="bounded")
    return Readout(temperature=float(np.exp(found.x)))


def _shift(words: Sequence[str], log_probs: Float[np.ndarray, "example label"], right: Int[np.ndarray, " example"]) -> dict[str, float]:
    chosen = np.eye(len(words))[right]

    def loss(bias: Float[np.ndarray, " label"]) -> tuple[float, Float[np.ndarray, " label"]]:
        likely = log_softmax(log_probs + bias, axis=1)
        return float(-(likely * chosen).sum(1).mean()), (np.exp(likely) - chosen).mean(0)

    found = minimize(loss, np.zeros(len(words)), jac=True, method="L-BFGS-B", bounds=[(-50.0, 50.0)] * len(words)).x
    return {word: float(shift) for word, shift in zip(words, found - found.mean(), strict=True)}


def _nats(log_probs: Float[np.ndarray, "example label"], right: Int[np.ndarray, " example"]) -> Float[np.ndarray, " example"]:
    return -log_softmax(log_probs, axis=1)[np.arange(len(right)), right]
