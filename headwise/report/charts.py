"""The charts of the report as PNG files: the heat map of the heads, the spread of their scores per layer, the calibrations' losses.

Everything is drawn on its own `Figure` (no pyplot, no state between charts), and the same rows give the same bytes.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from headwise.calibration.rah_lora.schema import NEGLIGIBLE
from headwise.report.themes import LIGHT, Theme

NAMES = {
    "head_impact": "Head Impact (mean IoU)",
    "head_impact_adjusted": "Head Impact above chance (IoU)",
    "head_impact_nosink": "Head Impact without sink tokens (mean IoU)",
    "visual_mass": "Attention that falls on the image",
    "isal": "I-SAL (z-score within the layer)",
    "caf": "Causal flow (CAF)",
    "effect": "Change of the loss per unit of log gamma",
}
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 4.6, 0.55, 0.15, 0.12, 1.02
"""Inches. The heat map and the strips share these margins, so that their layers stand at the same height side by side."""


def score_grid(heads: pl.DataFrame, statistic: str) -> Float[np.ndarray, "layer head"]:
    """The values of one statistic as a layer-by-head array; a head without a row is NaN.

    Raises ValueError if the statistic has no row, with the names of those that have.
    """
    rows = heads.filter(pl.col("statistic") == statistic)
    if rows.is_empty():
        raise ValueError(f"no scores for the statistic {statistic!r}; the scores hold {heads['statistic'].unique().sort().to_list()}")
    layer, head = rows["layer"].to_numpy(), rows["head"].to_numpy()
    grid = np.full((int(layer.max()) + 1, int(head.max()) + 1), np.nan)
    grid[layer, head] = rows["value"].to_numpy()
    return grid


def heat_map(
    heads: pl.DataFrame,
    statistic: str,
    out: Path,
    chosen: Collection[int] = (),
    theme: Theme = LIGHT,
    targets: Collection[tuple[int, int]] = (),
) -> Path:
    """Draw a statistic over layers (rows) and heads (columns), chosen layers and target heads framed, as a PNG; returns `out`.

    The colour map is viridis, perceptually uniform and readable without colour vision. `heads` has the columns layer, head,
    statistic and value. Raises ValueError if the statistic has no row.
    """
    grid = score_grid(heads, statistic)
    figure, axes = _layer_figure(len(grid), theme)
    image = axes.imshow(grid, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set_facecolor(theme.rule)
    _label_layers(axes, len(grid), chosen, theme)
    heads_per_tick = max(1, grid.shape[1] // 16)
    axes.set_xticks(range(0, grid.shape[1], heads_per_tick))
    axes.set_xlabel("head", color=theme.muted)
    for layer in sorted(chosen):
        axes.add_patch(Rectangle((-0.5, layer - 0.5), grid.shape[1], 1, fill=False, linewidth=1.8, edgecolor=theme.chosen, clip_on=False))
    for layer, head in targets:
        axes.add_patch(Rectangle((head - 0.45, layer - 0.45), 0.9, 0.9, fill=False, linewidth=1.6, edgecolor=theme.chosen))
    bar_axes = figure.add_axes((LEFT / WIDTH, 0.42 / _height(len(grid)), 1 - (LEFT + RIGHT) / WIDTH, 0.09 / _height(len(grid))))
    bar = figure.colorbar(image, cax=bar_axes, orientation="horizontal")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]  the stub takes the spines for a callable
    bar.set_label(NAMES.get(statistic, statistic), color=theme.ink)
    bar_axes.tick_params(colors=theme.muted, labelsize=8, length=2)
    return _save(figure, out)


def layer_strips(heads: pl.DataFrame, statistic: str, out: Path, chosen: Collection[int] = (), theme: Theme = LIGHT) -> Path:
    """Draw the spread of the heads' scores in each layer: a dot per head, a bar from quartile to quartile, a tick at the mean."""
    grid = score_grid(heads, statistic)
    figure, axes = _layer_figure(len(grid), theme)
    for layer, values in enumerate(grid):
        values = values[~np.isnan(values)]
        if not len(values):
            continue
        colour = theme.chosen if layer in chosen else theme.third
        if layer in chosen:
            axes.axhspan(layer - 0.5, layer + 0.5, color=theme.chosen, alpha=0.07, linewidth=0)
        low, high = np.quantile(values, [0.25, 0.75])
        axes.barh(layer, high - low, left=low, height=0.62, color=colour, alpha=0.22, linewidth=0)
        axes.scatter(values, np.full(len(values), layer), s=9, color=colour, alpha=0.75, linewidths=0)
        axes.plot([values.mean()] * 2, [layer - 0.36, layer + 0.36], color=colour, linewidth=1.8, solid_capstyle="butt")
    _label_layers(axes, len(grid), chosen, theme)
    axes.set_ylim(len(grid) - 0.5, -0.5)
    axes.grid(axis="x", color=theme.rule, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"{NAMES.get(statistic, statistic)}, one dot per head", color=theme.ink)
    return _save(figure, out)


def loss_lines(losses: Mapping[str, pl.DataFrame], out: Path, theme: Theme = LIGHT) -> Path:
    """Draw each arm's training loss over its steps: every step faint, a running mean over a tenth of the steps on top."""
    figure = Figure(figsize=(WIDTH, 2.9), facecolor=theme.card)
    axes = figure.add_axes((LEFT / WIDTH, 0.17, 1 - (LEFT + RIGHT) / WIDTH, 0.72))
    _dress(axes, theme)
    for arm, frame in losses.items():
        steps, values = frame["step"].to_numpy(), frame["loss"].to_numpy()
        axes.plot(steps, values, color=theme.arm(arm), alpha=0.25, linewidth=0.8)
        axes.plot(steps, running_mean(values, max(1, len(values) // 10)), color=theme.arm(arm), linewidth=1.8, label=arm)
    axes.grid(axis="y", color=theme.rule, linewidth=0.6)
    axes.set_xlabel("step", color=theme.muted)
    axes.set_ylabel("loss (nats per token)", color=theme.muted)
    axes.legend(frameon=False, labelcolor=theme.ink, fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1, 0.99), borderaxespad=0)
    return _save(figure, out)


def saliency_scatter(heads: pl.DataFrame, targets: Collection[tuple[int, int]], out: Path, theme: Theme = LIGHT) -> Path:
    """Draw every head by its I-SAL and the logarithm of its causal flow, the targets in colour."""
    isal, caf = (score_grid(heads, name) for name in ("isal", "caf"))
    chosen = np.zeros(isal.shape, dtype=bool)
    for target in targets:
        chosen[target] = True
    figure, axes = _plot_figure(theme)
    for mask, colour, size, label in ((~chosen, theme.third, 9, "other heads"), (chosen, theme.chosen, 26, "targets")):
        axes.scatter(isal[mask], caf[mask], s=size, color=colour, alpha=0.75, linewidths=0, label=label)
    if (caf > 0).any():
        axes.set_yscale("log")
    axes.set_xlabel(NAMES["isal"], color=theme.muted)
    axes.set_ylabel(NAMES["caf"], color=theme.muted)
    return _finish(figure, axes, out, theme)


def divergence_line(curve: pl.DataFrame, delta: float, out: Path, theme: Theme = LIGHT) -> Path:
    """Draw how the divergence grows with the step size around the accepted one, where the trust region ends, and what is rounding."""
    figure, axes = _plot_figure(theme)
    drawn, floor = curve.filter(pl.col("scale") > NEGLIGIBLE), curve.filter(pl.col("scale") == NEGLIGIBLE)
    axes.plot(drawn["scale"], drawn["kl"], color=theme.third, linewidth=1.4, marker="o", markersize=4)
    for least in floor["kl"]:
        axes.axhline(least, color=theme.muted, linewidth=1, linestyle=":", label="a hundredth of it: rounding")
    own = curve.filter(pl.col("scale") == 1)
    axes.plot(own["scale"], own["kl"], color=theme.chosen, marker="o", markersize=7, linestyle="", label="accepted")
    axes.axhline(delta, color=theme.muted, linewidth=1, linestyle="--", label="delta")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("step size alpha, as a multiple of the accepted one", color=theme.muted)
    axes.set_ylabel("KL from the uncalibrated model (nats)", color=theme.muted)
    return _finish(figure, axes, out, theme)


def _plot_figure(theme: Theme) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 3.4), facecolor=theme.card)
    axes = figure.add_axes((0.16, 0.15, 0.81, 0.75))
    _dress(axes, theme)
    axes.grid(color=theme.rule, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _finish(figure: Figure, axes: Axes, out: Path, theme: Theme) -> Path:
    axes.minorticks_off()
    axes.legend(frameon=False, labelcolor=theme.ink, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 0.99), borderaxespad=0)
    return _save(figure, out)


def running_mean(values: Float[np.ndarray, "step"], window: int) -> Float[np.ndarray, "step"]:
    """The mean over the last `window` values at each step, over fewer at the start, so that no value is invented."""
    sums = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    return (sums[end] - sums[start]) / (end - start)


def _layer_figure(num_layers: int, theme: Theme) -> tuple[Figure, Axes]:
    height = _height(num_layers)
    figure = Figure(figsize=(WIDTH, height), facecolor=theme.card)
    axes = figure.add_axes((LEFT / WIDTH, BOTTOM / height, 1 - (LEFT + RIGHT) / WIDTH, 1 - (TOP + BOTTOM) / height))
    _dress(axes, theme)
    return figure, axes


def _height(num_layers: int) -> float:
    """Rows of at most 0.2 inch, and of less where the model is deep, so that the chart fits a screen."""
    return TOP + BOTTOM + max(1.0, min(0.2 * num_layers, 7.0))


def _dress(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.card)
    axes.tick_params(colors=theme.muted, labelsize=8, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _label_layers(axes: Axes, num_layers: int, chosen: Collection[int], theme: Theme) -> None:
    """Label every layer, or every fifth of a deep model, and always the chosen ones, in their colour and bold."""
    step = 1 if num_layers <= 40 else 5
    axes.set_yticks(sorted({*range(0, num_layers, step), *chosen}))
    axes.set_ylabel("layer", color=theme.muted)
    for layer, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True):
        if int(layer) in chosen:
            label.set(color=theme.chosen, fontweight="bold")


def _save(figure: Figure, out: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(out, dpi=200, facecolor=figure.get_facecolor(), metadata={"Software": None})
    return out
