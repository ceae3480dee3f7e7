"""The page's section about ZeroTuning: what each head's attention to the first token does, and what was made of it."""

from pathlib import Path
from typing import Any

import polars as pl

from headwise.arms import STEERING_ARMS
from headwise.calibration.settings import CALIBRATION
from headwise.calibration.zerotuning.schema import HEADS, HEADS_FILE, TRIALS, TRIALS_FILE
from headwise.files import read_json, read_table
from headwise.report.charts import heat_map
from headwise.report.head_targets import CalibratedSection
from headwise.report.records import Table, number
from headwise.report.sections import draw_both

EFFECT = "effect"
CAPTION = "What scaling {what} up does to the mean loss, head by head, per unit of log gamma. Framed: the heads that are scaled."
WHAT = {
    "first_token": "the attention to the first token{first}",
    "second_token": "the attention to the second token",
    "key": "the first token's key{first}",
    "sinks": "the attention to sinks after the first token",
    "quotation": "the attention to what the model itself quotes as important",
}


def steering_section(data: Path, folder: Path) -> CalibratedSection | None:
    """What ZeroTuning and its controls did, of the first of their arms in detail; None if they did nothing here."""
    arms = [arm for arm in STEERING_ARMS if (data / "adapters" / arm / HEADS_FILE).is_file()]
    if not arms:
        return None
    adapter = data / "adapters" / arms[0]
    claims, heads = read_json(adapter / CALIBRATION), read_table(adapter / HEADS_FILE, HEADS)
    pictures = ()
    if heads[EFFECT].null_count() < len(heads):  # a control looks at no head
        caption = CAPTION.format(what=_what(claims))
        picture = draw_both(
            lambda out, theme: heat_map(effect_scores(heads), EFFECT, out, theme=theme, targets=scaled_heads(heads)),
            folder / "steered",
            caption,
        )
        pictures = ((picture, caption),)
    return CalibratedSection(
        sentence=_sentence(arms[0], claims, len(heads)),
        pictures=pictures,
        arms=_arms_table(data / "adapters", arms),
        heads=_trials_table(arms[0], read_table(adapter / TRIALS_FILE, TRIALS)),
    )


def effect_scores(heads: pl.DataFrame) -> pl.DataFrame:
    """The effects as rows of scores, which the heat map draws."""
    return heads.select("layer", "head", pl.lit(EFFECT).alias("statistic"), pl.col(EFFECT).alias("value"))


def scaled_heads(heads: pl.DataFrame) -> list[tuple[int, int]]:
    """The (layer, head) of those whose attention is scaled."""
    return [(int(layer), int(head)) for layer, head in heads.filter(pl.col("gamma") != 1).select("layer", "head").iter_rows()]


def _what(claims: dict[str, Any]) -> str:
    token = claims["first_token"]
    return WHAT[claims["operator"]].format(first="" if token is None else f" ({token})")


def _sentence(arm: str, claims: dict[str, Any], heads: int) -> str:
    if claims["readout"] != "as_is":
        done = "shifts the labels' likelihoods" if claims["readout"] == "bias" else "divides the labels' likelihoods by a temperature"
        return f"The arm “{arm}” touches no head and {done}, fitted to {claims['examples']} calibration prompts."
    whose = "evaluation" if claims["queries"] == "evaluation" else "calibration"
    by = "the entropy of the next token" if claims["objective"] == "entropy" else "the likelihood of the right labels"
    chosen = f"chosen by {by} on {claims['examples']} {whose} prompts"
    if claims["direction"] is None:
        return f"The arm “{arm}” scales no head: of what it tried, {chosen}, nothing was better."
    return f"The arm “{arm}” multiplies {_what(claims)} by {number(claims['gamma'])} in {claims['heads']} of {heads} heads, {chosen}."


def _arms_table(adapters: Path, arms: list[str]) -> Table:
    rows = []
    for arm in arms:
        claims: dict[str, Any] = read_json(adapters / arm / CALIBRATION)
        spent = claims["forward_equivalents"]
        chosen = (claims["direction"] or "–", number(claims["share"]), number(claims["gamma"]), number(claims["heads"]))
        scaled = claims["operator"].replace("_", " ") if claims["readout"] == "as_is" else "–"
        rows.append((arm, scaled, *chosen, number(float(sum(spent.values())))))
    columns = ("arm", "what is scaled", "direction", "share of heads", "gamma", "heads", "forward passes over the calibration set")
    return Table("Steering, arm by arm", columns, tuple(rows), words=(1, 2))


def _trials_table(arm: str, trials: pl.DataFrame) -> Table:
    columns = ("candidate", "heads", "examples", "accuracy", "nats", "entropy", "went on")
    rows = []
    for row in trials.iter_rows(named=True):
        name = f"{row['direction']}, {100 * row['share']:g} %, gamma {row['gamma']:g}" if row["direction"] else "the model as it is"
        figures = (number(row[key]) for key in ("heads", "examples", "accuracy", "nats", "entropy"))
        rows.append((name, *figures, "–" if row["kept"] is None else "yes" if row["kept"] else "no"))
    return Table(f"What the arm {arm} tried", columns, tuple(rows))
