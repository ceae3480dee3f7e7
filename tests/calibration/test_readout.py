"""The controls against trying many values, and what they cannot do."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from headwise.calibration.readout import fit_bias, fit_temperature
from headwise.labels import Labels, Readout

GENERATOR = np.random.default_rng(0)
WORDS = ("a", "b", "c")


def scored(number: int = 60, labels: int = 3):
    right = GENERATOR.integers(0, labels, number)
    log_probs = log_softmax(
        2 * GENERATOR.normal(size=(number, labels)) + 2 * np.eye(labels)[right] + np.array([3.0, 0.0, -1.0])[:labels], axis=1
    )
    return WORDS[:labels], log_probs, right


def nats(log_probs, right) -> float:
    return float(-log_softmax(log_probs, axis=1)[np.arange(len(right)), right].mean())


def test_the_bias_is_the_best_of_many() -> None:
    words, log_probs, right = scored(labels=2)
    found = fit_bias({"task": (words, log_probs, right)}).bias["task"]
    assert sum(found.values()) == pytest.approx(0, abs=1e-9) and found["a"] < 0  # the model said `a` too often
    best = min(np.linspace(-4, 4, 801), key=lambda half: nats(log_probs + np.array([half, -half]), right))
    assert found["a"] == pytest.approx(best, abs=0.01)
    many = scored()
    own = fit_bias({"one": (words, log_probs, right), "other": many}).bias
    assert own["one"] == found
    shifted = many[1] + np.array([own["other"][word] for word in WORDS])
    for _ in range(50):
        assert nats(shifted, many[2]) <= nats(shifted + 0.1 * GENERATOR.normal(size=3), many[2]) + 1e-9


def test_the_temperature_is_the_best_of_many_and_changes_no_answer() -> None:
    tasks = {"one": scored(), "other": scored(labels=2)}  # as many examples of each
    found = fit_temperature(tasks)
    means = {t: np.mean([nats(log_probs / t, right) for _, log_probs, right in tasks.values()]) for t in np.linspace(0.3, 5, 471)}
    assert found.temperature == pytest.approx(min(means, key=lambda t: means[t]), abs=0.02)
    labels = Labels(WORDS, ((1,), (2,), (3,)))
    log_probs = torch.tensor(tasks["one"][1])
    likely = found.applied(log_probs, "one", labels)
    assert torch.equal(likely.argmax(1), log_probs.argmax(1)) and torch.allclose(likely.exp().sum(1), torch.ones(60, dtype=torch.float64))


def test_what_is_not_named_is_left_alone() -> None:
    labels, log_probs = Labels(WORDS, ((1,), (2,), (3,))), torch.randn(4, 3).log_softmax(-1)
    assert torch.allclose(Readout().applied(log_probs, "one", labels), log_probs, atol=1e-6)
    assert torch.allclose(Readout(bias={"other": {"a": 9.0}}).applied(log_probs, "one", labels), log_probs, atol=1e-6)
    assert Readout(bias={"one": {"a": 9.0}}).applied(log_probs, "one", labels).argmax(1).tolist() == [0] * 4


def test_labels_that_examples_separate_give_a_finite_shift() -> None:
    """Only one label is ever right: the best shift would be infinite."""
    log_probs = log_softmax(GENERATOR.normal(size=(20, 2)), axis=1)
    found = fit_bias({"task": (WORDS[:2], log_probs, np.zeros(20, dtype=np.int64))}).bias["task"]
    assert 1 < found["a"] < 100
