"""The page's sections with figures: each reads its artefacts, draws into the report's folder, and says in a sentence what is shown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from PIL import Image

from headwise.files import MANIFEST, read_table
from headwise.report.charts import NAMES, heat_map, layer_strips, loss_lines, score_grid
from headwise.report.gallery import Overlay, draw_gallery
from headwise.report.overlays import Head, rank_heads
from headwise.report.records import Table, calibrations_table, read_settings
from headwise.report.results import sort_arms
from headwise.report.themes import DARK, LIGHT, Theme
from headwise.scores.schema import HEADS, HEADS_FILE, IMPACTS
from headwise.selection import SELECTION_FILE, read_selection

NUM_OVERLAYS, NUM_OVERLAY_HEADS, NUM_BEST_HEADS = 50, 4, 10
PIXELS_PER_CSS_PIXEL = 2
"""The charts are sharp on a dense screen."""


@dataclass(frozen=True)
class Picture:
    """A chart in both themes, as paths relative to the page, with its size in CSS pixels and its description."""

    light: str
    dark: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class Scores:
    """The head scores, the statistic that chose layers, the layers chosen (by the first arm there is), and those chosen as the worst;
    empty: none."""

    heads: pl.DataFrame
    statistic: str
    top: tuple[int, ...]
    bottom: tuple[int, ...]

    @property
    def grid(self) -> np.ndarray:
        """The statistic as a layer-by-head array."""
        return score_grid(self.heads, self.statistic)


@dataclass(frozen=True)
class HeadsSection:
    """Heat map, strips and the table of the best heads."""

    sentence: str
    layers: tuple[int, ...]
    heat_map: Picture
    strips: Picture
    best: Table


@dataclass(frozen=True)
class OverlaysSection:
    """The examples and the sentence that says which heads are shown."""

    sentence: str
    examples: list[Overlay]


@dataclass(frozen=True)
class LossesSection:
    """The losses of every calibration as a chart, and a row for each."""

    chart: Picture
    table: Table


def read_scores(data: Path) -> Scores | None:
    """The scores and what was selected by them; None if no head has a value. Without a selection the statistic is Head Impact."""
    path = data / "scores" / HEADS_FILE
    if not path.is_file():
        return None
    selections = {file.parent.name: read_selection(file) for file in (data / "selections").glob(f"*/{SELECTION_FILE}")}
    arms = sort_arms(list(selections))
    statistic = selections[arms[0]].criterion.statistic if arms else IMPACTS[0]
    heads = read_table(path, HEADS).filter(pl.col("statistic") == statistic)
    if heads["value"].null_count() == len(heads):
        return None
    chosen, worst = selections[arms[0]].layers if arms else (), selections["bottom"].layers if "bottom" in selections else ()
    return Scores(heads, statistic, chosen, worst)


def summary(data: Path, scores: Scores | None) -> str:
    """What the page is about: the model, its size, how much was observed."""
    settings = [read_settings(path.parent) for path in sorted((data / "attention").glob(f"shard=*/{MANIFEST}"))]
    models = sorted({str(found["model"]) for found in settings if "model" in found})
    if not scores:
        return f"{join(models)}: no head has been scored yet." if models else "Nothing has been scored yet."
    layers, heads = scores.grid.shape
    return f"{join(models) or 'A model'} with {layers} layers of {heads} heads, scored on {scores.heads['n'].max()} examples."


def heads_section(scores: Scores, folder: Path) -> HeadsSection:
    """The heat map, the strips and the ten best heads of the statistic that chose the layers."""
    best = rank_heads(scores.heads, scores.statistic, range(len(scores.grid)), NUM_BEST_HEADS, best=True)
    sentence = _found(scores, best[0])

    def heat(out: Path, theme: Theme) -> Path:
        return heat_map(scores.heads, scores.statistic, out, scores.top, theme)

    def strips(out: Path, theme: Theme) -> Path:
        return layer_strips(scores.heads, scores.statistic, out, scores.top, theme)

    return HeadsSection(
        sentence=sentence,
        layers=scores.top,
        heat_map=draw_both(heat, folder / "heat-map", f"Heat map, a row per layer and a column per head. {sentence}"),
        strips=draw_both(strips, folder / "strips", f"The heads' scores as dots, layer by layer. {sentence}"),
        best=_best_heads(scores, best),
    )


def _found(scores: Scores, best: Head) -> str:
    """The range of the scores, the best head, and how far the chosen layers stand out."""
    name, grid = NAMES.get(scores.statistic, scores.statistic), scores.grid
    found = f"{name} runs from {np.nanmin(grid):.3f} to {np.nanmax(grid):.3f}, highest in layer {best[0]}, head {best[1]}."
    if not scores.top:
        return f"{found} No layer has been chosen yet."
    means = f"their mean is {np.nanmean(grid[list(scores.top)]):.3f}, that of all layers {np.nanmean(grid):.3f}"
    return f"{found} The chosen layers are {join(scores.top)}; {means}."


def _best_heads(scores: Scores, best: Sequence[Head]) -> Table:
    rows = {(row["layer"], row["head"]): row for row in scores.heads.iter_rows(named=True)}
    cells = [(rows[place], place) for place in best]
    body = tuple((f"layer {layer}, head {head}", f"{row['value']:.3f}", _interval(row), str(row["n"])) for row, (layer, head) in cells)
    return Table(f"The {len(best)} best heads", ("head", NAMES.get(scores.statistic, scores.statistic), "95 % interval", "examples"), body)


def _interval(row: Mapping[str, object]) -> str:
    return "–" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"


def overlays_section(data: Path, scores: Scores, folder: Path) -> OverlaysSection | None:
    """Random examples under the best heads of the chosen layers and under the worst heads of the layers chosen as the worst (or of all)."""
    every = range(len(scores.grid))
    top = rank_heads(scores.heads, scores.statistic, scores.top or every, NUM_OVERLAY_HEADS, best=True)
    bottom = rank_heads(scores.heads, scores.statistic, scores.bottom or every, NUM_OVERLAY_HEADS, best=False)
    examples = draw_gallery(data, folder, top, bottom, NUM_OVERLAYS)
    if not examples:
        return None
    shares = [np.mean([getattr(example, name) for example in examples]) for name in ("top_share", "bottom_share", "area")]
    on_object = [f"{100 * share:.0f}\N{NO-BREAK SPACE}%" for share in shares]
    sentence = (
        f"{len(examples)} calibration examples, drawn at random with a fixed seed. Left: the image, what the answer is about outlined. "
        f"Middle: where the answer's words look, on average over the best heads of {'the chosen' if scores.top else 'all'} layers "
        f"({_names(top)}). Right: the same for the worst heads of {'the bottom' if scores.bottom else 'all'} layers ({_names(bottom)}). "
        f"Each map is coloured from zero to its own maximum. On average {on_object[0]} of the top heads' attention to the image and "
        f"{on_object[1]} of the bottom heads' lies on the outlined object, which takes {on_object[2]} of the image."
    )
    return OverlaysSection(sentence, examples)


def losses_section(adapters: Path, folder: Path) -> LossesSection | None:
    """Every calibration's losses; None if there is no calibration."""
    losses = {path.parent.name: pl.read_parquet(path, columns=["step", "loss"]) for path in adapters.glob("*/losses.parquet")}
    losses = {arm: losses[arm] for arm in sort_arms(list(losses))}
    if not losses:
        return None

    def lines(out: Path, theme: Theme) -> Path:
        return loss_lines(losses, out, theme)

    table = calibrations_table(adapters, losses)
    alt = f"Training loss over the steps. {'; '.join(f'{row[0]}: {row[5]} at first, {row[6]} at the end' for row in table.rows)}."
    return LossesSection(draw_both(lines, folder / "losses", alt), table)


def draw_both(draw: Callable[[Path, Theme], Path], path: Path, alt: str) -> Picture:
    """Draw a chart in both themes; the page shows the one that the reader's system asks for."""
    light, dark = (draw(path.with_name(f"{path.name}-{theme.name}.png"), theme) for theme in (LIGHT, DARK))
    with Image.open(light) as image:
        width, height = (round(side / PIXELS_PER_CSS_PIXEL) for side in image.size)
    return Picture(f"{path.parent.name}/{light.name}", f"{path.parent.name}/{dark.name}", width, height, alt)


def join(values: Sequence[object]) -> str:
    """`1`, `1 and 2`, `1, 2 and 3`."""
    texts = [str(value) for value in values]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def _names(heads: Sequence[Head]) -> str:
    return "layer.head " + join([f"{layer}.{head}" for layer, head in sorted(heads)])
