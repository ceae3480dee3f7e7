"""The page of ZeroTuning's comparison: what every arm gained, whether that is more than its controls, and how profiles agree."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import spearmanr, ttest_1samp

from flows.cells import CLOSED, LEAST_SEEDS, NOTE, Cell, Row, failures, key_of, markdown_table, means, one_direction, singles
from headwise.calibration.settings import CALIBRATION
from headwise.calibration.zerotuning.schema import HEADS, HEADS_FILE
from headwise.evaluation.paired import holm
from headwise.evaluation.table import BASE
from headwise.files import read_json, read_table
from headwise.intervals import LEVEL

ZERO, EXACT = "zero", "zero-exact"
ACCURACY, LIKELIHOOD = ("evaluation", "accuracy"), (f"evaluation{CLOSED}", "perplexity")
CONTROLS = {"label-bias": ACCURACY, "temperature": LIKELIHOOD}
"""What a method has to beat to be called a gain, and by what: they change how labels are read, and no attention. A temperature changes no
answer, so it is beaten by how likely the right labels are."""
OVERLAP = 0.4
"""The share of heads whose choice is compared between two profiles, the paper's."""


def as_markdown(rows: Sequence[Row], cells: Mapping[int, Cell], folders: Mapping[int, Path], margin: float) -> str:
    """The arms' figures, the effects, the sentences, what was chosen with every seed, and how the two profiles agree.

    cells: the answers by seed. folders: the workspaces, by seed. margin: within which two arms count as equal.
    """
    arms = list(dict.fromkeys(arm for cell in cells.values() for arm in cell))
    parts = [
        markdown_table([row for arm in arms if (row := _figures(arm, cells))]),
        markdown_table([_effect(mean, rows) for mean in means(rows)]),
        NOTE,
        *gains(rows),
        *equivalence(rows, margin),
    ]
    tables = {
        "What was chosen:": [row for seed, folder in folders.items() for row in choices(seed, folder)],
        f"Heads by one backward pass ({ZERO}) and by a pass for each ({EXACT}):": [
            row for seed, folder in folders.items() if (row := agreement(seed, folder))
        ],
    }
    parts += [part for title, lines in tables.items() if lines for part in (title, markdown_table(lines))]
    failed = failures(rows)
    return "\n\n".join([*filter(None, parts), *(["Cells that failed:", "\n".join(failed)] if failed else [])]) + "\n"


def _figures(arm: str, cells: Mapping[int, Cell]) -> Row | None:
    """One arm's levels on the evaluation split, the mean over the seeds; None if it failed with all of them."""
    own = [found.filter(pl.col("split") == "evaluation") for cell in cells.values() if isinstance(found := cell.get(arm), pl.DataFrame)]
    own = [found.drop_nulls("right") for found in own]
    if not own:
        return None
    valid = [answered["right"] for found in own if len(answered := found.filter("valid"))]
    return {
        "arm": arm,
        "seeds": len(own),
        "accuracy %": _mean([found["right"] for found in own]),
        "invalid %": 100 - _mean([found["valid"] for found in own]),
        "accuracy of the valid %": _mean(valid) if valid else None,
        "questions": len(own[0]),
    }


def _mean(columns: Sequence[pl.Series]) -> float:
    return float(np.mean([100 * column.to_numpy().mean() for column in columns]))


def _effect(mean: Row, rows: Sequence[Row]) -> Row:
    accuracy = mean["metric"] == "accuracy"
    scale, digits = (100, 2) if accuracy else (1, 4)
    effects = [scale * float(str(row["effect"])) for row in singles(mean, rows)]
    effect, low, high = (f"{scale * float(str(mean[name])):.{digits}f}" for name in ("effect", "low", "high"))
    return {
        "arm": mean["arm"],
        "against": mean["against"],
        "measure": f"{mean['split']}, {'points' if accuracy else 'ratio of perplexities'}",
        "effect": effect,
        "95 % interval": f"{low} to {high}",
        "single seeds": f"{min(effects):.{digits}f} to {max(effects):.{digits}f} ({len(effects)})",
    }


def gains(rows: Sequence[Row]) -> list[str]:
    """Whether ZeroTuning is a gain: better than the model as it is and than each control, by p-values adjusted over these questions
    (Holm), and with every one of at least `LEAST_SEEDS` seeds.
    """
    rivals = {BASE: ACCURACY, **CONTROLS}
    found = {row["against"]: row for row in means(rows) if row["arm"] == ZERO and rivals.get(str(row["against"])) == key_of(row)[3:]}
    asked = {name: found[name] for name in rivals if name in found}
    p_values = np.array([row["p_value"] for row in asked.values()], dtype=np.float64)
    beaten = {
        name: _better(row) and p < 1 - LEVEL and one_direction(row, rows)
        for (name, row), p in zip(asked.items(), holm(p_values) if asked else [], strict=True)
    }
    sentences = []
    for against, row in asked.items():
        name = "the model as it is" if against == BASE else f"the control {against}"
        effect = _effect(row, rows)
        what = "points of accuracy" if row["metric"] == "accuracy" else "times the right labels' perplexity"
        held = "better" if beaten[against] else "not shown to be better"
        sentences.append(f"{ZERO} against {name}: {effect['effect']} {what} ({effect['95 % interval']}), {held}.")
    if missing := [name for name in rivals if name not in beaten]:
        sentences.append(f"Whether {ZERO} is a gain is open: it was not compared with {', '.join(missing)}.")
    else:
        whole = all(beaten.values())
        sentences.append(
            f"By the rule that a gain has to beat the model as it is and both controls, {ZERO} is {'a' if whole else 'no'} gain."
        )
    return sentences


def _better(row: Row) -> bool:
    """Whether the whole interval is on the better side of no change."""
    return float(str(row["low"])) > 0 if row["metric"] == "accuracy" else float(str(row["high"])) < 1


def equivalence(rows: Sequence[Row], margin: float) -> list[str]:
    """Whether profiling by one backward pass ends as well as the exact one: two one-sided tests (Schuirmann 1987) on the seeds'
    differences, and over the examples, which the seeds share: both have to say so.
    """
    mean = next((row for row in means(rows) if key_of(row)[1:] == (ZERO, EXACT, *ACCURACY)), None)
    if mean is None:
        return []
    differences = np.array([float(str(row["effect"])) for row in singles(mean, rows)])
    words = f"{ZERO} against {EXACT}: {100 * differences.mean():.2f} points over {len(differences)} seeds"
    if len(differences) < LEAST_SEEDS:
        return [f"{words}; too few differences for a test over seeds."]
    if differences.std() == 0:
        p = float(abs(differences[0]) >= margin)  # the same with every seed
    else:
        tested: Any = [ttest_1samp(differences, end, alternative=side) for end, side in ((-margin, "greater"), (margin, "less"))]
        p = max(float(test.pvalue) for test in tested)
    over_examples = float(str(mean["p_equivalent"]))
    equal = max(p, over_examples) < 1 - LEVEL
    tests = f"two one-sided tests over the seeds p = {p:.3g}, over the questions p = {over_examples:.3g}"
    return [f"{words}, {'' if equal else 'not shown to be '}equivalent within {100 * margin:g} points ({tests})."]


def choices(seed: int, folder: Path) -> list[Row]:
    """What every arm's search ended in with this seed, and what it cost."""
    lines: list[Row] = []
    for path in sorted((folder / "data" / "adapters").glob(f"*/{CALIBRATION}")):
        claims = read_json(path)
        spent = claims["forward_equivalents"]
        assert isinstance(spent, dict)
        same = {name: claims[name] for name in ("direction", "share", "gamma", "heads", "examples")}
        lines.append({"arm": path.parent.name, "seed": seed, **same, **{f"passes, {part}": passes for part, passes in spent.items()}})
    return lines


def agreement(seed: int, folder: Path) -> Row | None:
    """How one backward pass and a pass for each head agree on what the heads do; None where one of them was not run."""
    paths = [folder / "data" / "adapters" / arm / HEADS_FILE for arm in (ZERO, EXACT)]
    if not all(path.is_file() for path in paths):
        return None
    gradient, exact = (read_table(path, HEADS)["effect"].to_numpy() for path in paths)
    number = round(OVERLAP * len(exact))
    chosen = [set(np.argsort(effect, kind="stable")[:number].tolist()) for effect in (gradient, exact)]
    correlation: Any = spearmanr(gradient, exact)
    return {
        "seed": seed,
        "same sign %": 100 * float((np.sign(gradient) == np.sign(exact)).mean()),
        "rank correlation": float(correlation.statistic),
        f"same of the first {100 * OVERLAP:g} %": 100 * len(chosen[0] & chosen[1]) / number,
    }
