"""When an adapter becomes the champion: shown to be better than the model as it was and than the champion so far, and harmless."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headwise.calibration.zerotuning.settings import generates
from headwise.evaluation.compare import FORGETTING, Comparison, least_loss
from headwise.examples import CAPTION, Example

LEAST_IMAGES = 10
"""Of fewer, the bootstrap's intervals are too narrow: of 5 images, 5 % show a gain where there is none, and 2.5 % should."""


@dataclass(frozen=True)
class Verdict:
    """Whether the candidate deserves to be champion, and the words that say why or why not."""

    better: bool
    sentence: str


def verdict(parts: Sequence[Verdict]) -> Verdict:
    """All parts as one sentence; the candidate has to pass every one."""
    better = all(part.better for part in parts)
    return Verdict(better, f"{'Champion' if better else 'No champion'}: {'; '.join(part.sentence for part in parts)}.")


def shortfalls(examples: Sequence[Example], margin: float) -> list[str]:
    """Why no adapter can become champion on these examples, whatever it learns: known before anything is computed."""
    probe = [e for e in examples if e.split == FORGETTING]
    closed, captions = ([e for e in probe if (e.task == CAPTION) is caption] for caption in (False, True))
    groups = {"evaluation split's captions show": [e for e in examples if (e.split, e.task) == ("evaluation", CAPTION)]}
    groups |= {f"forgetting split's {name} show": group for name, group in (("closed questions", closed), ("captions", captions)) if group}
    groups |= {} if probe else {"forgetting split shows": []}
    numbers = {name: len({e.image for e in group}) for name, group in groups.items()}
    found = [f"the {name} {number} images, {LEAST_IMAGES} are needed" for name, number in numbers.items() if number < LEAST_IMAGES]
    if closed and (loss := least_loss(len(closed))) > margin:
        found.append(f"{len(closed)} closed questions in the forgetting split cannot exclude a loss of {margin:g}, only one of {loss:.3g}")
    return found


def against_base(comparisons: Sequence[Comparison], margin: float) -> Verdict:
    """Judge a candidate by its comparison with the base model.

    Better means: the 95 % interval of the evaluation captions' perplexity ratio lies below 1, and for every headline of the forgetting
    split the interval excludes a loss of more than `margin`. What was not measured, or on few images, was not shown.
    """
    target = _target(comparisons)
    probes = [c for c in comparisons if c.split == FORGETTING and c.task is None]
    if target is None:
        return Verdict(False, "the evaluation split has no captions, so there is no perplexity to judge by")
    if not probes:
        return Verdict(False, "there is no forgetting split, so nothing shows what the adapter unlearned")
    if few := [c for c in (target, *probes) if c.num_images < LEAST_IMAGES]:
        return Verdict(False, f"{_words(few[0])} is from {few[0].num_images} images, {LEAST_IMAGES} at least are needed to judge")
    gain = _gain("the base model", target)
    lost = [c for c in probes if not c.loses_at_most(margin)]
    if not gain.better:
        return gain
    if lost:
        few = f": so few questions ({lost[0].num_examples}) cannot show less than {lost[0].least_loss:.2g}"
        why = few if lost[0].metric == "accuracy" and lost[0].least_loss > margin else ""
        return Verdict(False, f"{gain.sentence}, but {_words(lost[0])} may lose more than {margin:g}{why}")
    return Verdict(True, f"{gain.sentence}, and {', '.join(map(_words, probes))} is within the margin of {margin:g}")


def against_champion(comparisons: Sequence[Comparison], version: str) -> Verdict:
    """Judge a candidate by its comparison with the champion so far: the captions' perplexity ratio has to lie below 1 with its interval."""
    target = _target(comparisons)
    if target is None:
        return Verdict(False, f"there are no captions to compare it with version {version}, the champion so far")
    return _gain(f"version {version}, the champion so far,", target)


def against_idle(claims: Mapping[str, object]) -> list[Verdict]:
    """An adapter that changes nothing is never better. claims: its calibration.json, by which a layer's LoRA always changes something."""
    changed = claims.get("accepted", claims.get("heads", 1))
    return [Verdict(False, "the adapter changes nothing, as no head was selected or accepted")] if changed == 0 else []


def against_silent(claims: Mapping[str, object]) -> list[Verdict]:
    """An adapter under which a model cannot generate is never better: it could not be served. claims: its calibration.json."""
    reason = f"steering by {claims.get('operator')} works without a cache alone, so it cannot be served"
    return [] if generates(claims) else [Verdict(False, reason)]


def against_uncommitted(code: Sequence[str]) -> list[Verdict]:
    """Nothing is promoted by code that nobody can look up: the comparison and these words come from the checkout's own files."""
    names = ", ".join(code[:3]) + (", ..." if len(code) > 3 else "")
    return [Verdict(False, f"what judged it is not committed ({names}): commit it and run again, no model is asked twice")] if code else []


def _target(comparisons: Sequence[Comparison]) -> Comparison | None:
    return next((c for c in comparisons if (c.split, c.metric, c.task) == ("evaluation", "perplexity", None)), None)


def _gain(rival: str, target: Comparison) -> Verdict:
    why = "the interval is not below 1" if target.high >= 1 else f"its p-value, adjusted for all headlines, is {target.p_holm:.2g}"
    is_gain = "is a gain" if target.gain else f"is no gain, {why}"
    return Verdict(target.gain, f"against {rival} {_words(target)} {is_gain}")


def _words(comparison: Comparison) -> str:
    c = comparison
    name = "caption perplexity" if c.metric == "perplexity" else "accuracy"
    kind = "ratio" if c.metric == "perplexity" else "difference"
    return f"{c.split} {name} {c.before:.4g} -> {c.after:.4g} ({kind} {c.effect:.4g}, 95 % interval {c.low:.4g} to {c.high:.4g})"
