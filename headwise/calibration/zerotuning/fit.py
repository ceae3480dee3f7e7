"""ZeroTuning from calibration prompts: the heads' profile, the search, and the steering that it ends in; and the controls."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float

from headwise.calibration.readout import fit_bias, fit_temperature
from headwise.calibration.steering import Steering
from headwise.calibration.zerotuning.measure import Measured, Prompts
from headwise.calibration.zerotuning.schema import HEADS, TRIALS
from headwise.calibration.zerotuning.search import Candidate, Trial, candidates, chosen_heads, successive_halving
from headwise.calibration.zerotuning.settings import ZeroTuning
from headwise.checkpoints import frozen
from headwise.examples import BadExample, Example
from headwise.files import frame_of
from headwise.labels import Readout, tokenised
from headwise.vlm import VLM, encode

BACKWARD = 2.0
"""What a backward pass costs, in forward ones."""


@dataclass(frozen=True)
class ZeroFit:
    """A calibration: what its folder will hold, and how it was found.

    heads: rows of HEADS; trials: of TRIALS. chosen: None where no candidate was better than the model as it is, and for the controls.
    forward_equivalents: passes over the calibration prompts, of the profile and of the search.
    """

    applied: Steering
    heads: pl.DataFrame
    trials: pl.DataFrame
    forward_equivalents: Mapping[str, float]
    chosen: Candidate | None = None
    readout: Readout = field(default_factory=Readout)


@dataclass(frozen=True)
class Drawn:
    """Calibration prompts, and what there is none of: examples that cannot be read and tasks without examples enough, with the reasons."""

    prompts: Prompts
    bad: Mapping[str, str]
    left_out: Mapping[str, str]


def draw_prompts(
    vlm: VLM, folder: Path, examples: Sequence[Example], labels: Mapping[str, Sequence[str]], settings: ZeroTuning, batch_size: int
) -> Drawn:
    """The prompts to calibrate with, drawn by the seed: by their labels, or, where answers may not be read, whichever.

    folder: of the images. labels: of each task; examples of other tasks are not drawn. Raises ValueError if there are no examples, every
    task has a label without one, there are more labels than examples asked for, labels cannot be told apart, or no example can be read.
    """
    usable = [example for example in examples if example.task in labels]
    if not usable:
        raise ValueError(f"split {settings.queries!r} has no question with a closed set of answers to calibrate with")
    answered, left_out = settings.objective == "labels", dict[str, str]()
    if answered:
        left_out = _without_examples(usable, labels)
        wanted = {task: words for task, words in labels.items() if task not in left_out}
        if not wanted:
            raise ValueError("; ".join(left_out.values()))
        chosen = draw_labelled([one for one in usable if one.task in wanted], settings.examples, settings.seed, wanted)
    else:
        order = np.random.default_rng(settings.seed).permutation(len(usable))
        chosen = [usable[place] for place in order[: settings.examples]]
    known = {task: tokenised(vlm, labels[task]) for task in dict.fromkeys(example.task for example in chosen)}
    bad = dict[str, str]()
    prompts = Prompts(vlm, folder, chosen, known, batch_size, answered)
    for example in chosen:
        try:
            encode(vlm, [prompts.image_of(example)], [example.question])
        except BadExample as error:
            bad[example.id] = str(error)
    kept = [example for example in chosen if example.id not in bad]
    if not kept:
        raise ValueError(f"none of the {len(chosen)} calibration examples can be read, such as {chosen[0].id}: {bad[chosen[0].id]}")
    return Drawn(replace(prompts, examples=kept), bad, left_out)


def _without_examples(examples: Sequence[Example], labels: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Of each task that has a label without an example which."""
    there = {(example.task, example.answers[0]) for example in examples}
    missing = {task: [word for word in words if (task, word) not in there] for task, words in labels.items()}
    return {
        task: f"task {task!r}: no calibration example has the label {words[0]!r}"
        + (f", nor one of {len(words) - 1} others" if len(words) > 1 else "")
        for task, words in missing.items()
        if words
    }


def draw_labelled(examples: Sequence[Example], number: int, seed: int, labels: Mapping[str, Sequence[str]]) -> list[Example]:
    """So many of the examples, drawn by the seed, in turn from a label of each task, and from each label of a task, so that the first of
    them are of as many tasks as can be.

    labels: of each task, each with an example. Raises ValueError if `number` is below that of the labels.
    """
    groups = defaultdict[tuple[str, str], list[Example]](list)
    for example in examples:
        groups[example.task, example.answers[0]].append(example)
    by_task = [[(task, word) for word in words] for task, words in labels.items()]
    wanted = [key for key in chain.from_iterable(zip_longest(*by_task)) if key is not None]
    if number < len(wanted):
        raise ValueError(f"zerotuning.examples = {number}: fewer than the {len(wanted)} labels of {', '.join(labels)}")
    generator = np.random.default_rng(seed)
    shuffled = [[groups[key][place] for place in generator.permutation(len(groups[key]))] for key in wanted]
    return [example for example in chain.from_iterable(zip_longest(*shuffled)) if example is not None][:number]


def fit_zerotuning(prompts: Prompts, settings: ZeroTuning, progress: Callable[[int, int], object]) -> ZeroFit:
    """Profile the heads on the prompts and search direction, share of heads and gamma; or fit a control's readout.

    `progress` hears how many passes over prompts, of how many at most, are done. Raises BadExample if a prompt cannot be read.
    """
    with frozen(prompts.vlm.base):
        return _searched(prompts, settings, progress) if settings.readout == "as_is" else _control(prompts, settings)


def _searched(prompts: Prompts, settings: ZeroTuning, progress: Callable[[int, int], object]) -> ZeroFit:
    number, found = len(prompts.examples), candidates(settings)
    shape = (prompts.vlm.num_layers, prompts.vlm.num_heads)
    profile = 1 + BACKWARD if settings.profile == "gradient" else 1 + shape[1] * (shape[0] + 1) / 2
    done, most = 0.0, (profile + len(found) + 1) * number  # each candidate on every prompt would be the most

    def tell(passes: float) -> None:
        nonlocal done
        done += passes
        progress(int(done), int(most))

    def measure(candidate: Candidate | None, number: int) -> Measured:
        applied = steering_of(prompts, chosen_heads(effect, candidate, settings), candidate, settings) if candidate else None
        measured = prompts.first(number).measure(applied)
        tell(number)
        return measured

    if settings.profile == "gradient":
        effect = prompts.gradient(settings.objective, settings.operator)
        tell(profile * number)
    else:
        effect = prompts.exact(settings.objective, settings.step, lambda share: tell(share * number))
    before = measure(None, number)
    trials = successive_halving(found, measure, partial(_score, settings=settings), number)
    winner = next(trial for trial in reversed(trials) if trial.kept)
    chosen = winner.candidate if _score(winner.measured, settings) > _score(before, settings) else None
    heads = chosen_heads(effect, chosen, settings) if chosen else np.zeros(shape, dtype=bool)
    return ZeroFit(
        applied=steering_of(prompts, heads, winner.candidate, settings),
        heads=_heads(effect, heads, winner.candidate.gamma),
        trials=frame_of([_row(None, 0, number, before), *(_trial(trial, effect, settings) for trial in trials)], TRIALS),
        forward_equivalents={"profile": profile, "search": 1 + sum(trial.examples for trial in trials) / number},
        chosen=chosen,
    )


def _control(prompts: Prompts, settings: ZeroTuning) -> ZeroFit:
    """No head is touched; labels' likelihoods are."""
    scored, shape = prompts.scored(), (prompts.vlm.num_layers, prompts.vlm.num_heads)
    return ZeroFit(
        applied=Steering(settings.operator, torch.zeros(shape, device=prompts.vlm.device)),
        heads=_heads(np.full(shape, np.nan), np.zeros(shape, dtype=bool), 1.0),
        trials=frame_of([], TRIALS),
        forward_equivalents={"profile": 1.0, "search": 0.0},
        readout=fit_bias(scored) if settings.readout == "bias" else fit_temperature(scored),
    )


def steering_of(prompts: Prompts, chosen: Bool[np.ndarray, "layer head"], candidate: Candidate, settings: ZeroTuning) -> Steering:
    """`log gamma` for the chosen heads, 0 for the others."""
    return Steering(settings.operator, torch.from_numpy(chosen * np.log(candidate.gamma)).float().to(prompts.vlm.device))


def first_token(prompts: Prompts) -> str | None:
    """The first real token of all prompts, as text: `<|im_start|>` where a chat begins so; None where each begins with its own."""
    found = set[int]()
    for example in prompts.examples:
        batch = encode(prompts.vlm, [prompts.image_of(example)], [example.question])
        found.add(int(batch.inputs["input_ids"][0, batch.segments.first[0]]))
    return str(prompts.vlm.tokenizer.decode(list(found))) if len(found) == 1 else None


def _score(measured: Measured, settings: ZeroTuning) -> float:
    return -float((measured.nats if settings.objective == "labels" else measured.entropy).mean())


def _trial(trial: Trial, effect: Float[np.ndarray, "layer head"], settings: ZeroTuning) -> dict[str, object]:
    heads = int(chosen_heads(effect, trial.candidate, settings).sum())
    return _row(trial.candidate, heads, trial.examples, trial.measured) | {"kept": trial.kept}


def _row(candidate: Candidate | None, heads: int, examples: int, measured: Measured) -> dict[str, object]:
    own = asdict(candidate) if candidate else {"share": 0.0, "gamma": 1.0}
    means = {"accuracy": measured.right, "nats": measured.nats, "entropy": measured.entropy}
    known = {name: float(values.mean()) for name, values in means.items() if np.isfinite(values).all()}
    return {**own, "heads": heads, "examples": examples, **known}


def _heads(effect: Float[np.ndarray, "layer head"], chosen: Bool[np.ndarray, "layer head"], gamma: float) -> pl.DataFrame:
    return frame_of(
        [
            {
                "layer": layer,
                "head": head,
                "effect": float(own) if np.isfinite(own) else None,
                "gamma": gamma if chosen[layer, head] else 1.0,
            }
            for (layer, head), own in np.ndenumerate(effect)
        ],
        HEADS,
    )
