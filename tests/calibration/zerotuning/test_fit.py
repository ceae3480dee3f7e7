"""ZeroTuning: profiles against finite differences and each other, the search against trying all, and what ends in the folder."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from headwise.calibration.readout import fit_bias, fit_temperature
from headwise.calibration.steering import NAMES, Steering, steered
from headwise.calibration.zerotuning.fit import draw_labelled, draw_prompts, first_token, fit_zerotuning
from headwise.calibration.zerotuning.measure import Measured, Prompts
from headwise.calibration.zerotuning.search import Candidate, candidates, chosen_heads, successive_halving
from headwise.calibration.zerotuning.settings import OperatorName, ZeroTuning
from headwise.examples import Example
from headwise.labels import label_sets, score_labels, tokenised
from headwise.vlm import VLM
from tests import tiny, zoo
from tests.tiny import NUM_HEADS, NUM_LAYERS

COLOURS = ("red", "blue", "green")


def texts(number: int = 12) -> list[Example]:
    """Questions of two tasks with labels."""
    found = []
    for place in range(number):
        task, words = ("colour", COLOURS) if place % 2 else ("many", ("three squares", "three circles"))
        question = f"{'What colour is it?' * (1 + place % 3)} {place}"
        found.append(Example(f"e{place:02d}", None, None, question, (words[place // 2 % len(words)],), None, task, "calibration"))
    return found


def prompts(vlm: VLM, examples: list[Example], batch_size: int = 5) -> Prompts:
    labels = {task: tokenised(vlm, words) for task, words in label_sets(examples).items()}
    return Prompts(vlm, Path(), examples, labels, batch_size)


def differences(own: Prompts, objective: str, operator: OperatorName, step: float) -> np.ndarray:
    """By whole passes what the mean loss changes by with each head's log gamma at `step`, over `step`."""

    def loss(applied: Steering | None) -> float:
        measured = own.measure(applied)
        return float((measured.entropy if objective == "entropy" else measured.nats).mean())

    found = np.zeros((own.vlm.num_layers, own.vlm.num_heads))
    for head in np.ndindex(found.shape):
        strength = torch.zeros(found.shape)
        strength[head] = step
        found[head] = (loss(Steering(operator, strength)) - loss(None)) / step
    return found


def test_what_is_measured_is_each_example_by_itself() -> None:
    vlm, examples = tiny.tiny_lm(), texts()
    applied = Steering("first_token", torch.full((NUM_LAYERS, NUM_HEADS), 0.7))
    found = prompts(vlm, examples).measure(applied)
    for place, example in enumerate(examples):
        labels = tokenised(vlm, label_sets(examples)[example.task])
        with torch.no_grad(), steered(vlm, applied):
            scores = score_labels(vlm, [None], [example.question], labels)
        p = scores.log_probs[0].double().softmax(-1)
        right = labels.words.index(example.answers[0])
        assert found.nats[place] == pytest.approx(-float(p[right].log()), abs=1e-4)
        assert found.right[place] == float(p.argmax() == right)
        assert found.entropy[place] == pytest.approx(float(scores.entropy[0]), abs=1e-3)


@pytest.mark.parametrize("operator", sorted(set(NAMES) - {"quotation"}))  # a random model quotes nothing
@pytest.mark.parametrize("objective", ["labels", "entropy"])
def test_the_gradient_of_all_heads_is_each_heads_difference(objective: str, operator: OperatorName) -> None:
    vlm, examples = tiny.tiny_lm(), texts()
    own = prompts(vlm, examples)
    gradient = own.gradient(objective, operator)
    assert gradient.shape == (NUM_LAYERS, NUM_HEADS) and np.median(np.abs(gradient)) > 0  # a head without sinks has none to lower
    exact = differences(own, objective, operator, 1e-2)
    assert gradient == pytest.approx(exact, abs=0.05 * np.abs(exact).max())
    assert np.corrcoef(gradient.ravel(), exact.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("objective", ["labels", "entropy"])
@pytest.mark.parametrize("model", [tiny.tiny_lm, tiny.tiny_vlm, lambda: zoo.vlm("paligemma"), lambda: zoo.vlm("instructblip")])
def test_the_exact_profile_is_a_whole_pass_for_every_head(model: Callable[[], VLM], objective: str, tmp_path: Path) -> None:
    vlm, examples = model(), texts()
    if vlm.visual_id is not None:
        tiny.image(3).save(tmp_path / "one.png")
        examples = [replace(example, image="one.png") for example in examples]
    own, shares = replace(prompts(vlm, examples), folder=tmp_path), list[float]()
    exact = own.exact(objective, 1.5, shares.append)
    assert exact == pytest.approx(differences(own, objective, "first_token", np.log(1.5)), abs=1e-4)
    assert sum(shares) == pytest.approx(vlm.num_heads * (vlm.num_layers + 1) / 2) and np.abs(exact).max() > 1e-3


def test_the_heads_that_gain_most_in_a_direction_are_chosen() -> None:
    effect = np.array([[-3.0, 1.0, 2.0], [-1.0, 0.0, 5.0], [-2.0, 4.0, -9.0]])
    settings = ZeroTuning()
    up, down = (chosen_heads(effect, Candidate(way, 0.35, 2.0), settings) for way in ("up", "down"))
    assert np.argwhere(up).tolist() == [[0, 0], [2, 0], [2, 2]] and np.argwhere(down).tolist() == [[0, 2], [1, 2], [2, 1]]
    every = chosen_heads(effect, Candidate("up", 1.0, 2.0), settings)
    assert (every == (effect < 0)).all()  # the others would lose
    shallow = chosen_heads(effect, Candidate("up", 0.35, 2.0), replace(settings, layers=(0.0, 0.5)))
    assert np.argwhere(shallow).tolist() == [[0, 0], [1, 0]]


def test_halving_finds_the_best_of_what_all_examples_show_and_tells_its_trials() -> None:
    settings = ZeroTuning()
    found, asked = candidates(settings), []
    assert len(found) == len(settings.shares) * (len(settings.up) + len(settings.down))

    def measure(candidate: Candidate, number: int) -> Measured:
        asked.append(number)
        value = np.full(number, abs(candidate.gamma - 1.5) + abs(candidate.share - 0.2))
        return Measured(np.zeros(number), value, value)

    trials = successive_halving(found, measure, lambda measured: -float(measured.nats.mean()), 100)
    assert [trial.examples for trial in trials] == asked and sorted(set(asked)) == [25, 50, 100]
    assert [asked.count(number) for number in (25, 50, 100)] == [24, 12, 6]
    last = [trial for trial in trials if trial.examples == 100]
    assert [trial.candidate for trial in last if trial.kept] == [Candidate("up", 0.2, 1.5)]
    few = successive_halving(found, measure, lambda measured: 0.0, 7)
    assert len(few) == 24 and [trial.candidate for trial in few if trial.kept] == found[:1]


def test_a_calibration_ends_in_the_best_candidate_or_in_none() -> None:
    vlm, examples = tiny.tiny_lm(), texts()
    heard: list[tuple[int, int]] = []
    settings = ZeroTuning(shares=(0.2, 0.5), up=(2.0, 8.0), down=(0.5, 0.1))
    fit = fit_zerotuning(prompts(vlm, examples), settings, lambda done, most: heard.append((done, most)))
    assert fit.chosen is not None and first_token(prompts(vlm, examples)) == "<|im_start|>"
    own = prompts(vlm, examples)
    nats = {None: own.measure(None).nats.mean()}
    for candidate in candidates(settings):
        heads = chosen_heads(own.gradient("labels", "first_token"), candidate, settings)
        nats[candidate] = own.measure(Steering("first_token", torch.tensor(heads * np.log(candidate.gamma)).float())).nats.mean()
    assert min(nats, key=lambda one: nats[one]) == fit.chosen
    assert own.measure(fit.applied).nats.mean() == pytest.approx(nats[fit.chosen], abs=1e-5)
    gammas = fit.heads["gamma"].to_numpy().reshape(NUM_LAYERS, NUM_HEADS)
    assert np.log(gammas) == pytest.approx(fit.applied.strength.numpy(), abs=1e-6)
    assert fit.trials["direction"][0] is None and fit.trials["kept"].sum() == 1 and len(fit.trials) == 9
    assert fit.forward_equivalents == {"profile": 3.0, "search": 9.0}
    assert heard[-1][0] <= heard[-1][1] and [done for done, _ in heard] == sorted(done for done, _ in heard)
    nobody = replace(settings, layers=(0.0, 0.25), shares=(0.02,))
    none = fit_zerotuning(prompts(vlm, examples), nobody, lambda done, most: None)
    assert none.chosen is None and not none.applied.strength.any()


def test_in_coarser_types_the_exact_profile_is_checked_as_they_round(tmp_path: Path) -> None:
    vlm = tiny.new_tiny_lm()
    vlm.base.bfloat16()
    own = replace(prompts(vlm, texts(6)), folder=tmp_path)
    assert np.isfinite(own.exact("labels", 1.5, lambda share: None)).all()


def test_the_first_examples_are_of_every_task() -> None:
    labels = {task: tuple(f"{task}{word}" for word in range(9)) for task in "abc"}
    examples = [
        Example(f"{word}{n}", None, None, "?", (word,), None, task, "s") for task in labels for word in labels[task] for n in range(3)
    ]
    first = draw_labelled(examples, 30, 0, labels)[:6]
    assert [one.task for one in first] == ["a", "b", "c", "a", "b", "c"] and len({one.answers[0] for one in first}) == 6


def test_examples_are_drawn_from_every_label_in_turn() -> None:
    examples = texts(40)
    labels = label_sets(examples)
    drawn = draw_labelled(examples, 10, 0, labels)
    assert len({one.id for one in drawn}) == 10
    counts = [sum(one.answers[0] == word for one in drawn) for words in labels.values() for word in words]
    assert min(counts) == max(counts) == 2
    assert [one.id for one in drawn] != [one.id for one in draw_labelled(examples, 10, 1, labels)]
    assert len(draw_labelled(examples, 400, 0, labels)) == 40
    with pytest.raises(ValueError, match=r"zerotuning\.examples = 4: fewer than the 5 labels of many, colour"):
        draw_labelled(examples, 4, 0, labels)


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan"), float("inf")])
def test_gammas_that_scale_nothing_are_refused(gamma: float) -> None:
    for field in ("up", "down"):
        with pytest.raises(ValueError, match=field):
            ZeroTuning(**{field: (gamma,)})
    with pytest.raises(ValueError, match="up and down are both empty"):
        ZeroTuning(up=(), down=())
    with pytest.raises(ValueError, match="profile = exact is for operator = first_token; key has a gradient"):
        ZeroTuning(profile="exact", operator="key")
    with pytest.raises(ValueError, match="queries = evaluation would read the answers that are judged"):
        ZeroTuning(queries="evaluation")


def test_the_controls_touch_no_head_and_read_labels_otherwise() -> None:
    vlm, examples = tiny.tiny_lm(), texts(24)
    own = prompts(vlm, examples)
    assert {task: len(right) for task, (_, _, right) in own.scored().items()} == {"many": 12, "colour": 12}
    for readout, expected in (("bias", fit_bias(own.scored())), ("temperature", fit_temperature(own.scored()))):
        fit = fit_zerotuning(own, ZeroTuning(readout=readout), lambda done, most: None)
        assert fit.readout == expected and fit.chosen is None and not fit.applied.strength.any() and fit.trials.is_empty()
        assert fit.heads["effect"].null_count() == len(fit.heads) and set(fit.heads["gamma"]) == {1.0}


def test_without_labels_no_answer_is_read() -> None:
    vlm, settings = tiny.tiny_lm(), ZeroTuning(objective="entropy", queries="evaluation", examples=9, shares=(0.3,))
    examples = texts()
    labels = label_sets(examples)
    drawn = draw_prompts(vlm, Path(), examples, labels, settings, 5).prompts
    unknown = [replace(example, answers=("never",)) for example in examples]
    blind = draw_prompts(vlm, Path(), unknown, labels, settings, 5).prompts
    assert [one.id for one in blind.examples] == [one.id for one in drawn.examples] and len(drawn.examples) == 9
    found, same = (fit_zerotuning(one, settings, lambda done, most: None) for one in (drawn, blind))
    assert torch.equal(found.applied.strength, same.applied.strength) and found.applied.strength.any()
    assert found.trials["accuracy"].null_count() == len(found.trials) and found.trials["entropy"].null_count() == 0
    last = found.trials.filter("kept").row(-1, named=True)
    assert last["entropy"] == found.trials.filter(pl.col("examples") == 9)["entropy"].min() < found.trials["entropy"][0]
    with pytest.raises(ValueError, match="split 'evaluation' has no question with a closed set of answers"):
        draw_prompts(vlm, Path(), [], labels, settings, 5)


def test_tasks_without_examples_enough_and_examples_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    vlm, examples = tiny.tiny_vlm(), texts(20)
    labels = {**label_sets(examples), "colour": (*COLOURS, "yellow", "white")}
    drawn = draw_prompts(vlm, tmp_path, examples, labels, ZeroTuning(examples=8), 4)
    assert set(drawn.left_out) == {"colour"} and {one.task for one in drawn.prompts.examples} == {"many"}
    assert drawn.left_out["colour"] == "task 'colour': no calibration example has the label 'white', nor one of 1 others" or (
        drawn.left_out["colour"] == "task 'colour': no calibration example has the label 'yellow', nor one of 1 others"
    )
    with pytest.raises(ValueError, match="task 'colour': no calibration example has the label 'yellow'"):
        draw_prompts(vlm, tmp_path, examples, {"colour": (*COLOURS, "yellow")}, ZeroTuning(examples=8), 4)
    missing = [replace(example, image=f"{example.id}.png") if example.id in ("e00", "e03") else example for example in examples]
    drawn = draw_prompts(vlm, tmp_path, missing, label_sets(missing), ZeroTuning(examples=20), 4)
    assert set(drawn.bad) == {"e00", "e03"} and len(drawn.prompts.examples) == 18 and not drawn.left_out
    gone = [replace(example, image=f"{example.id}.png") for example in examples]
    with pytest.raises(ValueError, match="none of the 8 calibration examples can be read, such as e"):
        draw_prompts(vlm, tmp_path, gone, label_sets(gone), ZeroTuning(examples=8), 4)


def test_where_every_candidate_is_worse_no_head_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, examples = tiny.tiny_lm(), texts()
    own = prompts(vlm, examples)
    wrong = -own.gradient("labels", "first_token")  # heads by what harms
    monkeypatch.setattr(Prompts, "gradient", lambda self, objective, operator: wrong)
    fit = fit_zerotuning(own, ZeroTuning(shares=(1.0,), up=(1.3,), down=(0.7,)), lambda done, most: None)
    assert fit.chosen is None and not fit.applied.strength.any() and set(fit.heads["gamma"]) == {1.0} and fit.trials["heads"].max() > 0
