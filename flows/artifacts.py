"""What Prefect shows of a run: a table per step, the heat map, the verdict."""

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from flows.summaries import Rows
from headwise.evaluation.compare import Comparison

if TYPE_CHECKING:
    import polars as pl

RESULT_COLUMNS = ("arm", "measure", "base", "calibrated", "change", "95 % interval", "verdict")


def publish_table(stage: str, rows: Rows) -> None:
    """The stage's numbers as a table in Prefect's UI; nothing where it has none."""
    if rows:
        create_table_artifact(rows, key=_key(stage), description=f"What the stage `{stage}` wrote.")


def publish_heat_map(heads: "pl.DataFrame", statistic: str, layers: Sequence[int], framed: Sequence[tuple[int, int]] = ()) -> None:
    """The layer-by-head heat map, chosen layers or heads framed, inside the artifact itself: no server has to serve the file."""
    from headwise.report.charts import heat_map

    with TemporaryDirectory() as temporary:
        image = heat_map(heads, statistic, Path(temporary) / "heat_map.png", layers, targets=framed)
        encoded = base64.b64encode(image.read_bytes()).decode()
    create_image_artifact(
        f"data:image/png;base64,{encoded}", key="heat-map", description=f"`{statistic}` of every head; framed: {list(layers or framed)}"
    )


def publish_verdict(sentence: str, results: Mapping[str, Sequence[Comparison]]) -> None:
    """The verdict and the before/after table in Markdown."""
    create_markdown_artifact(f"# {sentence.partition(':')[0]}\n\n{sentence}\n\n{before_after(results)}\n", key="verdict")


def before_after(results: Mapping[str, Sequence[Comparison]]) -> str:
    """A Markdown table of the headlines: each arm against the base model, with 95 % intervals."""
    lines = [f"| {' | '.join(row)} |" for row in (RESULT_COLUMNS, *before_after_rows(results))]
    return "\n".join([lines[0], "|---" * len(RESULT_COLUMNS) + "|", *lines[1:]])


def before_after_rows(results: Mapping[str, Sequence[Comparison]]) -> list[tuple[str, ...]]:
    """The cells of that table: a perplexity's change is a ratio (better below 1), an accuracy's a difference (better above 0)."""
    return [
        (arm, f"{c.split} {c.metric}", f"{c.before:.4g}", f"{c.after:.4g}", *_change(c), c.verdict)
        for arm, comparisons in results.items()
        for c in comparisons
        if c.task is None
    ]


def _change(comparison: Comparison) -> tuple[str, str]:
    c = comparison
    sign, kind = ("", "x ") if c.metric == "perplexity" else ("+", "")
    return f"{kind}{c.effect:{sign}.4f}", f"{c.low:{sign}.4f} to {c.high:{sign}.4f}"


def _key(stage: str) -> str:
    """Prefect's keys hold lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", stage.lower()).strip("-")
