"""From stored attention and masks to the score table of every head, with its intervals and the tests behind it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from headwise.attention.schema import SCALARS
from headwise.examples import causes
from headwise.files import new_file
from headwise.layout import layout_name
from headwise.scores.head_impact import HeadImpact
from headwise.scores.impacts import THRESHOLDS, Impacts, Survey, head_impacts, survey
from headwise.scores.schema import EXAMPLE_SCORES, HEADS, IMPACTS
from headwise.scores.sink_tokens import sink_tokens
from headwise.scores.stability import DrawnMeans, HeadRanks, image_draws, layers_differ, stability_over_images, stability_over_thresholds
from headwise.scores.stored import Heads, count_heads
from headwise.scores.token_masks import Targets, token_masks


@dataclass(frozen=True)
class Scores:
    """The tables of heads.parquet and tests.json, and the examples without a score: those with nothing to look at, and the bad ones."""

    heads: pl.DataFrame
    tests: dict[str, object]
    left_out: dict[str, str]
    bad: dict[str, str]


def score_heads(parts: Sequence[Path], masks: pl.DataFrame, settings: HeadImpact, examples: Path) -> Scores:
    """Score every head of the stored attention (part.parquet files) against the masks (masks.parquet); `examples` is written on the way.

    The maps are streamed twice, and of an example its ids and token mask alone stay in memory. The result does not depend on how the
    examples were shared out among the parts. Where the model's visual tokens have no place in the image, the means of the attention's
    scalars are all that the table holds, and the file of examples has no row. Raises ValueError if more than `max_bad_share` of the
    examples have no readable mask, fewer than `min_images` images have an example with a token mask, or a part is broken.
    """
    heads = count_heads(parts)
    found = survey(parts, heads)
    targets = token_masks(masks, found.layouts, settings)
    _check(targets, found, settings)
    sums = _Sums(heads, settings, targets.num_images)
    with new_file(examples) as temporary, _example_writer(temporary) as writer:
        for block in head_impacts(parts, heads, found, targets.examples, settings):
            sums.add(block)
            writer.write_table(_example_table(heads, block))
    tests = {
        "examples": {
            "observed": len(found.layouts),
            "scored": len(targets.examples),
            "images": targets.num_images,
            "left_out": causes(targets.left_out.values()),
            "bad": causes(targets.bad.values()),
        },
        **sums.tests(),
        "sink_tokens": _sinks(found, settings),
    }
    table = pl.concat([*sums.rows(), *_mean_rows(heads, found)]).sort("statistic", "layer", "head")
    return Scores(table, tests, targets.left_out, targets.bad)


def _check(targets: Targets, found: Survey, settings: HeadImpact) -> None:
    observed = len(found.layouts)
    if len(targets.bad) > settings.max_bad_share * observed:
        allowed = f"more than max_bad_share = {settings.max_bad_share:g} allows"
        raise ValueError(f"{len(targets.bad)} of {observed} observed examples cannot be scored, {allowed}; {_counted(targets.bad)}")
    if targets.num_images < settings.min_images and not found.placeless:
        fewer = f"{targets.num_images} images ({len(targets.examples)} of {observed} observed examples) can be scored"
        without = {**targets.left_out, **targets.bad}
        raise ValueError(
            f"{fewer}, scores.min_images = {settings.min_images} are needed; {_counted(without) if without else 'none is left out'} "
            "(attention.max_examples limits what is observed)"
        )


def _counted(reasons: Mapping[str, str]) -> str:
    """How many examples each cause has, and the first three reasons."""
    counts = ", ".join(f"{cause}: {count}" for cause, count in causes(reasons.values()).items())
    return f"{counts} (such as {'; '.join(f'{i}: {reasons[i]}' for i in sorted(reasons)[:3])})"


class _Sums:
    """What the score table and the tests need of the examples, gathered block by block."""

    def __init__(self, heads: Heads, settings: HeadImpact, images: int) -> None:
        self.heads, self.settings, self.images = heads, settings, images
        self.means = {statistic: DrawnMeans(settings.bootstrap, heads.rows) for statistic in IMPACTS}
        self.ranks = HeadRanks(heads.num_layers, heads.num_heads)
        self.by_threshold = np.zeros((len(THRESHOLDS), heads.num_layers))

    def add(self, block: Impacts) -> None:
        """HI, HI minus chance, and HI without sinks, in the order of `IMPACTS`."""
        draws = image_draws(block.images, self.settings.bootstrap, self.settings.seed)
        for means, scores in zip(self.means.values(), (block.head_impact, block.head_impact - block.chance, block.nosink), strict=True):
            means.add(scores, draws)
        self.ranks.add(block.head_impact.reshape(-1, self.heads.num_layers, self.heads.num_heads))
        self.by_threshold += block.by_threshold

    def rows(self) -> Iterator[pl.DataFrame]:
        """The rows of heads.parquet with an interval; none without an example."""
        for statistic, means in self.means.items() if self.ranks.n else ():
            yield _rows(self.heads, statistic, means.sample, means.n, *means.interval(self.images))

    def tests(self) -> dict[str, object]:
        """The tests of tests.json, over layers and within them; none without an example."""
        if not self.ranks.n:
            return {}
        impact = self.means[IMPACTS[0]]
        by_layer = impact.sample.reshape(self.heads.num_layers, -1)
        layers = by_layer.mean(axis=1)
        drawn = impact.drawn.reshape(-1, *by_layer.shape).mean(axis=2)
        return {
            "across_layers": layers_differ(by_layer),
            "within_layers": self.ranks.tests(),
            "layer_ranking_over_images": stability_over_images(layers, drawn, self.images),
            "layer_ranking_over_thresholds": stability_over_thresholds(layers, dict(zip(THRESHOLDS, self.by_threshold, strict=True))),
        }


def _mean_rows(heads: Heads, found: Survey) -> Iterator[pl.DataFrame]:
    unknown = np.full(heads.rows, np.nan)
    for name, means in zip(SCALARS, found.means.T, strict=True):
        yield _rows(heads, name, means, len(found.layouts), unknown, unknown)


def _rows(heads: Heads, statistic: str, value: np.ndarray, n: int, low: np.ndarray, high: np.ndarray) -> pl.DataFrame:
    layers, numbers = np.divmod(np.arange(heads.rows), heads.num_heads)
    same = {"statistic": [statistic] * heads.rows, "n": [n] * heads.rows}
    columns = {"layer": layers, "head": numbers, "value": value, "low": low, "high": high, **same}
    return pl.DataFrame({name: columns[name] for name in HEADS.names}).with_columns(pl.col("value", "low", "high").fill_nan(None))


def _sinks(found: Survey, settings: HeadImpact) -> dict[str, list[int]]:
    """The places of the sink tokens of each layout, in the order of its tokens."""
    maps = sorted(found.mean_maps.items(), key=itemgetter(0))
    return {layout_name(layout): np.flatnonzero(sink_tokens(map_, layout, settings.sink_fence)).tolist() for layout, map_ in maps}


def _example_writer(path: Path) -> pq.ParquetWriter:
    """A chance level hardly occurs twice: with a dictionary of its values the file is larger and takes longer to write."""
    repeated = [name for name in EXAMPLE_SCORES.names if name != "chance"]
    return pq.ParquetWriter(path, EXAMPLE_SCORES, compression="zstd", use_dictionary=repeated)  # pyright: ignore[reportArgumentType]


def _example_table(heads: Heads, block: Impacts) -> pa.Table:
    layers, numbers = np.divmod(np.arange(heads.rows, dtype=np.int16), np.int16(heads.num_heads))
    num_examples = len(block.example_ids)
    example = pa.array(np.repeat(np.arange(num_examples), heads.rows))
    scores = (block.head_impact, block.chance, block.nosink)
    columns = [
        pa.array(block.example_ids).take(example),
        pa.array(block.images).take(example),
        pa.array(np.tile(layers, num_examples)),
        pa.array(np.tile(numbers, num_examples)),
        *(pa.array(score.reshape(-1), mask=np.isnan(score.reshape(-1))) for score in scores),
    ]
    return pa.Table.from_arrays(columns, schema=EXAMPLE_SCORES)
