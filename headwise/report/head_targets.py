"""The page's section about RAH-LoRA: how the heads were profiled, which of them were calibrated, from which others, and how far."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from headwise.arms import HEAD_ARMS
from headwise.calibration.rah_lora.schema import CURVE, CURVE_FILE, NEGLIGIBLE, TARGETS, TARGETS_FILE
from headwise.calibration.settings import CALIBRATION
from headwise.files import read_json, read_table
from headwise.profile.schema import PROFILE_FILE
from headwise.report.charts import divergence_line, heat_map, saliency_scatter
from headwise.report.records import Table, number, read_settings
from headwise.report.sections import Picture, draw_both
from headwise.report.themes import Theme
from headwise.scores.schema import HEADS, HEADS_FILE

CLAIMS = ("targets", "accepted", "rolled_back", "skipped", "damping", "kl")


@dataclass(frozen=True)
class CalibratedSection:
    """Heads that were chosen: the pictures of the first arm with their captions, a row per arm, and what the first arm looked at."""

    sentence: str
    pictures: tuple[tuple[Picture, str], ...]
    arms: Table
    heads: Table


def targets_section(data: Path, folder: Path) -> CalibratedSection | None:
    """What RAH-LoRA did, of the first of its arms in detail; None if it did nothing here."""
    arms = [arm for arm in HEAD_ARMS if (data / "adapters" / arm / TARGETS_FILE).is_file()]
    if not arms or not (data / "profile" / HEADS_FILE).is_file():
        return None
    adapter = data / "adapters" / arms[0]
    targets, profile = read_table(adapter / TARGETS_FILE, TARGETS), read_table(data / "profile" / HEADS_FILE, HEADS)
    return CalibratedSection(
        sentence=_sentence(arms[0], targets, read_json(data / "profile" / PROFILE_FILE)),
        pictures=_pictures(profile, targets, adapter, folder),
        arms=_arms_table(data / "adapters", arms),
        heads=_heads_table(arms[0], targets),
    )


def _sentence(arm: str, targets: pl.DataFrame, profile: dict[str, Any]) -> str:
    accepted = int((targets["outcome"] == "accepted").sum())
    correlation = number(profile["isal_caf_rank_correlation"]["absolute"])
    overlap = f"{100 * profile['caf_signed_overlap']:.0f}\N{NO-BREAK SPACE}%"
    changes = HEAD_ARMS[arm]
    meant = (
        ": heads on which the model's certainty hangs (a high causal flow, CAF) although they look little between text and image (a low "
        "I-SAL)"
    )
    why = "" if {"targets", "caf"} & set(changes) else meant
    if targets.is_empty():
        return f"The arm “{arm}” selected no head{why}: its adapter changes nothing. Profiled on {profile['questions']} questions."
    return (
        f"The arm “{arm}” calibrated {accepted} of {len(targets)} target heads{why}. Profiled on {profile['questions']} questions without "
        f"labels; over all heads the rank correlation of I-SAL and CAF is {correlation}. Of the heads with a high CAF by its strength "
        f"{overlap} have a high one by the paper's signed equation too."
    )


def _pictures(profile: pl.DataFrame, targets: pl.DataFrame, adapter: Path, folder: Path) -> tuple[tuple[Picture, str], ...]:
    places = [(int(layer), int(head)) for layer, head in targets.select("layer", "head").iter_rows()]
    curve = read_table(adapter / CURVE_FILE, CURVE)
    delta = read_settings(adapter).get("delta", 0.0)
    assert isinstance(delta, float)

    def heat(statistic: str) -> Callable[[Path, Theme], Path]:
        return lambda out, theme: heat_map(profile, statistic, out, theme=theme, targets=places)

    drawn: list[tuple[str, Callable[[Path, Theme], Path], str]] = [
        ("isal", heat("isal"), "How much each head looks between text and image, against the others of its layer. Framed: the targets."),
        ("caf", heat("caf"), "How strongly the model's certainty hangs on each head. Framed: the targets."),
        ("scatter", lambda out, theme: saliency_scatter(profile, places, out, theme), "Both at once, a dot per head."),
    ]
    if len(curve):
        line: Callable[[Path, Theme], Path] = lambda out, theme: divergence_line(curve, delta, out, theme)  # noqa: E731
        drawn.append(("divergence", line, "How far the accepted step takes the model from itself, and how far others would."))
    return tuple((draw_both(draw, folder / name, caption), caption) for name, draw, caption in drawn)


def _arms_table(adapters: Path, arms: list[str]) -> Table:
    rows = []
    for arm in arms:
        claims = read_json(adapters / arm / CALIBRATION)
        spent: Any = claims["forward_equivalents"]
        least = read_table(adapters / arm / CURVE_FILE, CURVE).filter(pl.col("scale") == NEGLIGIBLE)
        ends = (least["kl"].item() if len(least) else None, claims["parameters"], float(sum(spent.values())))
        rows.append((arm, *(number(claims[name]) for name in CLAIMS), *map(number, ends)))
    names = tuple(name.replace("_", " ") for name in CLAIMS)
    columns = ("arm", *names, "kl of rounding alone", "parameters", "forward passes over the calibration set")
    return Table("RAH-LoRA, arm by arm", columns, tuple(rows))


def _heads_table(arm: str, targets: pl.DataFrame) -> Table:
    columns = ("target", "I-SAL", "CAF", "gap", "anchors (similarity)", "effective rank", "alpha", "KL after", "outcome")
    rows = []
    for row in targets.iter_rows(named=True):
        anchors = ", ".join(f"{one['layer']}.{one['head']} ({one['similarity']:.2f})" for one in row["anchors"])
        figures = (number(row[name]) for name in ("isal", "caf", "gap"))
        ends = (number(row[name]) for name in ("effective_rank", "alpha", "kl_after"))
        outcome = row["outcome"] + (f": {row['reason']}" if row["reason"] else "")
        rows.append((f"layer {row['layer']}, head {row['head']}", *figures, anchors or "–", *ends, outcome))
    return Table(f"The targets of the arm {arm}", columns, tuple(rows), words=(4, 8))
