"""The page of the ablations: every effect, whether the paper's order held, and what became of the heads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import norm

from flows.cells import CLOSED, LEAST_SEEDS, NOTE, Pair, Row, failures, key_of, markdown_table, means, one_direction, singles
from headwise.arms import HEAD_ARMS
from headwise.calibration.rah_lora.schema import CURVE, CURVE_FILE, GAINS, GAINS_FILE, NEGLIGIBLE, TARGETS, TARGETS_FILE
from headwise.calibration.settings import CALIBRATION
from headwise.evaluation.compare import SCALES
from headwise.evaluation.paired import POWER, holm
from headwise.evaluation.table import BASE
from headwise.files import read_json, read_table
from headwise.intervals import LEVEL

FULL = "rah"
MAIN = (FULL, "rah-without-caf", "rah-random", "rah-inverse")
"""What the paper orders: full > without CAF > random targets ~ no change > inverse targets."""
EQUAL = "random ~ no change"
ORDER: Mapping[str, Pair] = {
    "full > no change": (BASE, FULL),
    "full > without CAF": ("rah-without-caf", FULL),
    "without CAF > random": ("rah-random", "rah-without-caf"),
    EQUAL: (BASE, "rah-random"),
    "no change > inverse": ("rah-inverse", BASE),
}
"""The paper's order, each with the worse arm and the better one."""
MEASURES = {
    ("evaluation", "accuracy"): "closed questions, points",
    (f"evaluation{CLOSED}", "perplexity"): "their answers' perplexity, ratio",
    ("evaluation", "perplexity"): "caption perplexity, ratio",
    ("forgetting", "accuracy"): "forgetting probe, points",
}
CLAIMS = ("targets", "accepted", "rolled_back", "skipped", "damping", "parameters", "kl")


def as_markdown(rows: Sequence[Row], folders: Mapping[str, Path], margin: float) -> str:
    """The table of effects, whether the paper's order held, and from each data set's first cell what became of the targets.

    folders: of those cells. margin: within which two arms count as equal.
    """
    made = {kind: outcomes(folder) for kind, folder in folders.items()}
    parts = [_effects(rows, made), NOTE, *signs(rows, margin)]
    for kind, folder in folders.items():
        tables = {"what became of the targets": made[kind], "singular values": spectra(folder), "single heads": heads(folder)}
        parts += [part for title, table in tables.items() if table for part in (f"{kind}, {title}:", markdown_table(table))]
    failed = failures(rows)
    return "\n\n".join([*parts, *(["Cells that failed:", "\n".join(failed)] if failed else [])]) + "\n"


def _effects(rows: Sequence[Row], made: Mapping[str, Sequence[Row]]) -> str:
    """A line per data set and pair of arms, a column per measure; how many heads an arm changed with the first seed, and how far. Empty
    where every cell failed.
    """
    found = {key_of(row): row for row in means(rows)}
    dose = {(kind, row["arm"]): row for kind, own in made.items() for row in own}
    pairs = list(dict.fromkeys((row["data"], row["arm"], row["against"], row["seeds"]) for row in means(rows)))
    lines: list[Row] = []
    for kind, arm, against, seeds in pairs:
        own = {title: found.get((kind, arm, against, *measure)) for measure, title in MEASURES.items()}
        cells = {title: _words(row) if row else "" for title, row in own.items()}
        went = dose.get((str(kind), arm), {})
        same = {"data": kind, "arm": arm, "against": against, "seeds": seeds, "heads": went.get("accepted"), "KL": went.get("kl")}
        lines.append({**same, **cells})
    return markdown_table(lines)


def _words(row: Row) -> str:
    scale, digits = (100, 2) if row["metric"] == "accuracy" else (1, 4)
    effect, low, high = (f"{scale * float(str(row[name])):{'+' if scale == 100 else ''}.{digits}f}" for name in ("effect", "low", "high"))
    return f"{effect} ({low} to {high})"


def signs(rows: Sequence[Row], margin: float) -> list[str]:
    """For each data set and measure, which part of the paper's order held, by p-values adjusted over all of these questions (Holm).

    A difference holds if the whole interval and its adjusted p-value say so, and each of `LEAST_SEEDS` seeds at least; "random ~ no change"
    if none is seen, both one-sided tests at the margin exclude one as large, and each of as many seeds stays within it. What was not shown
    is said with the smallest gain that the sample shows four times out of five to the first of Holm's tests, the strictest.
    """
    found = {key_of(row): row for row in means(rows)}
    asked = [
        (kind, name, measure, row)
        for kind in dict.fromkeys(row["data"] for row in rows)
        for name, pair in ORDER.items()
        for measure in list(MEASURES)[:3]
        if (row := _of_pair(found, kind, pair, measure))
    ]
    claims = np.array([row["p_equivalent" if name == EQUAL else "p_value"] for _, name, _, row in asked], dtype=np.float64)
    sentences = []
    for (kind, name, measure, row), p in zip(asked, holm(claims) if asked else [], strict=True):
        words = _equal(row, float(p), rows, margin) if name == EQUAL else _held(row, float(p), len(asked), agreed=one_direction(row, rows))
        sentences.append(f"{kind}, {name}, by {MEASURES[measure].split(',')[0]}: {words}.")
    return sentences


def _of_pair(found: Mapping[tuple[object, ...], Row], kind: object, pair: Pair, measure: tuple[str, str]) -> Row | None:
    """The row of two arms; with the model as it was on the better side, the same row of the worse arm turned round."""
    worse, better = pair
    if better != BASE:
        return found.get((kind, better, worse, *measure))
    row = found.get((kind, worse, better, *measure))
    return turned(row) if row else None


def turned(row: Row) -> Row:
    """The comparison seen from the other side."""
    values = {name: float(str(row[name])) for name in ("before", "after", "effect", "low", "high", "detectable")}
    back = (lambda x: 1 / x) if row["metric"] == "perplexity" else (lambda x: -x)
    effects = {"effect": back(values["effect"]), "low": back(values["high"]), "high": back(values["low"])}
    detectable = values["detectable"]  # as large a change in the direction that is better
    return {**row, **effects, "before": values["after"], "after": values["before"], "detectable": detectable}


def _beyond(row: Row) -> int:
    """On which side of no change the whole interval lies: 1 better, -1 worse, 0 neither."""
    scale = SCALES["perplexity" if row["metric"] == "perplexity" else "accuracy"]
    low, high = (float(str(row[name])) for name in ("low", "high"))
    return scale.better if low > scale.neutral else -scale.better if high < scale.neutral else 0


def _equal(row: Row, p: float, rows: Sequence[Row], margin: float) -> str:
    within = f"{100 * margin:g} {'%' if row['metric'] == 'perplexity' else 'points'}"
    if _beyond(row) and float(str(row["p_value"])) < 1 - LEVEL:
        return f"not so, {_words(row)}"
    scale = SCALES["perplexity" if row["metric"] == "perplexity" else "accuracy"]
    single = [float(str(each["effect"])) for each in singles(row, rows)]
    near = len(single) >= LEAST_SEEDS and all(abs(effect - scale.neutral) < margin for effect in single)
    return f"{'held' if near and p < 1 - LEVEL else 'not shown'} within {within}, {_words(row)}; single seeds {_range(row, single)}"


def _range(row: Row, effects: Sequence[float]) -> str:
    scale, digits = (100, 1) if row["metric"] == "accuracy" else (1, 4)
    return f"{scale * min(effects):.{digits}f} to {scale * max(effects):.{digits}f} ({len(effects)})"


def _held(row: Row, p: float, asked: int, *, agreed: bool) -> str:
    effect, side = _words(row), _beyond(row)
    if side and p < 1 - LEVEL:
        found = f"{'held' if side == 1 else 'the other way round'}, {effect}"
        return found if agreed else f"{found}, but not with every one of {LEAST_SEEDS} seeds or more"
    single, family = (norm.ppf(1 - (1 - LEVEL) / (2 * tests)) + norm.ppf(POWER) for tests in (1, asked))
    detectable = float(str(row["detectable"]))
    if row["metric"] == "perplexity":
        return f"not shown, {effect}; a ratio of {detectable ** (family / single):.4f} would have been"
    return f"not shown, {effect}; a gain of {100 * detectable * family / single:.1f} would have been"


def outcomes(folder: Path) -> list[Row]:
    """For each arm of a cell the targets, how far it went, what it cost, and which earlier arm took the same steps on the same heads."""
    lines: list[Row] = []
    seen: dict[object, str] = {}
    for arm in HEAD_ARMS:
        path = folder / "data" / "adapters" / arm / CALIBRATION
        if path.is_file():
            claims = read_json(path)
            spent: Any = claims["forward_equivalents"]
            counts = {name.replace("_", " "): claims[name] for name in CLAIMS}
            least = read_table(path.parent / CURVE_FILE, CURVE).filter(pl.col("scale") == NEGLIGIBLE)
            counts["KL of a hundredth"] = least["kl"].item() if len(least) else None
            steps = read_table(path.parent / TARGETS_FILE, TARGETS, ["layer", "head", "alpha"])
            same = seen.setdefault(tuple(steps.rows()), arm)
            lines.append({"arm": arm, **counts, "forward equivalents": sum(spent.values()), "heads and steps": "" if same == arm else same})
    return lines


def spectra(folder: Path) -> list[Row]:
    """By thirds of the calibrated depth: how many singular values the heads' changes have, and which share of their energy a rank keeps."""
    path = folder / "data" / "adapters" / FULL / TARGETS_FILE
    changes = read_table(path, TARGETS).drop_nulls("singular_values") if path.is_file() else pl.DataFrame()
    if changes.is_empty():
        return []
    depth = int(np.max(changes["layer"].to_numpy())) + 1
    lines: list[Row] = []
    for _, own in sorted(changes.group_by(pl.col("layer") * 3 // depth), key=lambda group: str(group[0])):
        energies = [np.square(values) / np.square(values).sum() for values in map(np.asarray, own["singular_values"])]
        kept = {f"energy in {rank}": float(np.mean([energy[:rank].sum() for energy in energies])) for rank in (4, 8, 16, 32)}
        ends = own["layer"].to_numpy()
        effective = float(np.mean(own["effective_rank"].to_numpy()))
        lines.append({"layers": f"{ends.min()} to {ends.max()}", "heads": len(own), "effective rank": effective, **kept})
    return lines


def heads(folder: Path) -> list[Row]:
    """Where the gain comes from: the influence-saliency gap against the gain per head, what of the sum of gains the heads with the widest
    gaps bring, and the rank correlation of influence and saliency over all heads. Values that a group shares count for each of its heads.
    """
    gains, targets = folder / "data" / "gains" / FULL / GAINS_FILE, folder / "data" / "adapters" / FULL / TARGETS_FILE
    if not gains.is_file():
        return []
    measured = read_table(gains, GAINS)
    whole = measured.filter(pl.col("layer").is_null()).row(0, named=True)
    each = measured.drop_nulls("layer").join(read_table(targets, TARGETS).select("layer", "head", "gap"), on=["layer", "head"])
    each = each.sort("gap", descending=True)
    total = float(each["gain"].sum())
    correlation = read_json(folder / "data" / "profile" / "profile.json")["isal_caf_rank_correlation"]
    assert isinstance(correlation, dict)
    found: dict[str, object] = {
        "nats an answer gained by the whole adapter": f"{whole['gain']:.5f}{_between(whole['low'], whole['high'])}",
        "sum of the gains of single heads": f"{total:.5f}",
        "heads whose interval excludes 0: better, worse": f"{_count(each, 'low', 1)}, {_count(each, 'high', -1)}{_by_chance(len(each))}",
    }
    if len(each) > 1:
        gap = each.select(pl.corr("gap", "gain", method="spearman")).item()
        found["rank correlation of gap and gain"] = f"{gap:.2f} ({len(each)} heads)"
        for share in (10, 25, 50):
            number = max(1, round(share / 100 * len(each)))
            found[f"gain of the {share} % with the widest gap"] = f"{float(each['gain'][:number].sum()):.5f}"
    found |= {f"rank correlation of I-SAL and {name} CAF": value for name, value in correlation.items()}
    return [{"quantity": quantity, "value": value} for quantity, value in found.items()]


def _by_chance(number: int) -> str:
    return f" (of {number}; by chance {number * (1 - LEVEL) / 2:.1f} each)"


def _between(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ({low:.5f} to {high:.5f})"


def _count(gains: pl.DataFrame, bound: str, side: int) -> int:
    return int((gains[bound].to_numpy() * side > 0).sum())
