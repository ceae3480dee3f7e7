"""What the command shows of runs, data sets and models, as tables of text."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
import yaml

from flows.lineage import read_lineage, report_ids
from flows.parameters import EMBEDDED, Night, are_generated, located_masks, weights
from flows.promotion import shortfalls
from flows.workspace import UNFINISHED, find_run
from headwise.data import Progress, check_data, write_data
from headwise.evaluation.paired import planned_effect
from headwise.examples import CAPTION, Example, causes, check_bad_share, read_examples
from headwise.files import read_table
from headwise.leakage import check_leaks, split_leaks
from headwise.masks.annotation import shard_examples
from headwise.masks.exact import exact_masks
from headwise.masks.table import plain_reason
from headwise.scores.schema import HEADS, HEADS_FILE

CUT_SHORT = (
    "The latest run here has not come to its end, so there is no verdict, and what is below may be of an earlier run with other settings: "
    "run it again, and it goes on with the stage that it stopped in."
)
DEFAULT_STATISTICS = ("head_impact", "isal")
Columns = tuple[str, ...]
Cells = list[tuple[str, ...]]


def run_scores(name: str | None, statistic: str | None) -> pl.DataFrame:
    """One statistic of every head of a run; None: Head Impact, or I-SAL where heads were only profiled.

    Raises ValueError if the run has no scores yet, or no such statistic, naming those that it has.
    """
    data = find_run(name) / "data"
    paths = [data / folder / HEADS_FILE for folder in ("scores", "profile") if (data / folder / HEADS_FILE).is_file()]
    if not paths:
        raise ValueError(f"run {data.parent.name!r} has scored no heads yet; `headwise run` with the same options goes on with it")
    heads = pl.concat([read_table(path, HEADS) for path in paths])
    if statistic is None:
        statistic = next(known for known in DEFAULT_STATISTICS if known in heads["statistic"])
    found = heads.filter(pl.col("statistic") == statistic).unique(["layer", "head"], keep="first", maintain_order=True)
    if found.is_empty():
        raise ValueError(f"no statistic {statistic!r}; the scores have {', '.join(heads['statistic'].unique().sort())}")
    return found


def best_heads(name: str | None, statistic: str | None, top: int) -> tuple[Columns, Cells]:
    """The heads with the highest value, with the 95 % interval where the statistic has one; the third column is the statistic's name."""
    best = run_scores(name, statistic).sort("value", descending=True, nulls_last=True).head(top)
    rows = [
        (str(row["layer"]), str(row["head"]), _number(row["value"]), f"{_number(row['low'])} to {_number(row['high'])}", str(row["n"]))
        for row in best.iter_rows(named=True)
    ]
    return ("layer", "head", str(best["statistic"][0]), "95 % interval", "examples"), rows


def export_run(name: str | None, arm: str, out: Path) -> Path:
    """Merge an arm's adapter of a run into its model. Raises ValueError if the run has none, or something is there already."""
    from headwise.calibration.adapter import export_merged

    folder = find_run(name)
    adapters = folder / "data" / "adapters"
    if not (adapters / arm).is_dir():
        arms = ", ".join(sorted(path.name for path in adapters.glob("*"))) or "none yet"
        raise ValueError(f"run {folder.name!r} has no adapter of the arm {arm!r}; it has {arms}")
    if out.exists():
        raise ValueError(f"{out}: is there already; name a new folder")
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    export_merged(params["attention"]["model"], adapters / arm, out)
    return out


def draw_heat_map(name: str | None, statistic: str | None, png: Path) -> Path:
    """Draw one statistic of every head of a run."""
    from headwise.report.charts import heat_map

    scores = run_scores(name, statistic)
    return heat_map(scores, str(scores["statistic"][0]), png)


def write_run_report(name: str | None, out: Path | None) -> Path:
    """Write the report of a run again, with the ids and the verdict that its lineage holds, unless they are an earlier run's."""
    from headwise.report.page import write_report

    folder = find_run(name)
    ids = {"verdict": CUT_SHORT} if (folder / UNFINISHED).is_file() else report_ids(read_lineage(folder))
    return write_report(folder, out or folder / "report", ids)


@dataclass(frozen=True)
class Trial:
    """A data set that was built aside: its examples by split and task, those left out with their reasons, how many of the others have no
    mask to be scored with, by the cause, why a run on it would fail if it would, why no adapter could become champion on it, and of each
    split the gain of accuracy that it shows four times out of five.
    """

    columns: Columns
    rows: Cells
    bad: Mapping[str, str]
    maskless: Mapping[str, int]
    refusals: Sequence[str]
    shortfalls: Sequence[str]
    detectable: Mapping[str, float]


def try_data(night: Night, progress: Progress) -> Trial:
    """Build the data set in a temporary folder, and of its calibration split the masks.

    Raises ValueError if the source cannot give a data set at all.
    """
    source = night.images
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        bad = write_data(source, folder, progress)
        examples = read_examples(folder)
        calibration = [e for e in examples if e.split == "calibration"]
        scored, unusable, maskless = _scorable(folder, calibration, night)
        alike = split_leaks(folder, examples, source.min_distance)
    checks: list[Callable[[], object]] = [
        lambda: check_bad_share(bad, len(bad) + len(examples), source.max_bad_share),
        lambda: check_leaks(alike, "to judge by"),
    ]
    checks += (
        [lambda: check_data(examples, None, 0)]
        if source.kind == "texts"
        else [
            lambda: check_data(examples, night.calibration, night.scores.min_images),
            lambda: _check_shards(calibration, unusable, night),
            lambda: located_masks(night.masks, source),
            lambda: _check_number(calibration, scored, night.scores.min_images),
        ]
    )
    refusals = [reason for check in checks if (reason := _refusal(check))]
    shown = [
        (e.split, e.task, e.image or e.id, e.id in scored if scored is not None and e.split == "calibration" else None) for e in examples
    ]
    schema = {"split": pl.String, "task": pl.String, "image": pl.String, "scored": pl.Boolean}
    groups = pl.DataFrame(shown, schema=schema, orient="row").group_by("split", "task")
    scorable = pl.when(pl.col("scored").count() > 0).then(pl.col("scored").sum()).alias("scored")
    counts = groups.agg(pl.len(), pl.col("image").n_unique(), scorable).sort("split", "task")
    rows = [tuple("-" if value is None else str(value) for value in row) for row in counts.iter_rows()]
    columns = ("split", "task", "examples", "images", "with a usable mask")
    short = shortfalls(examples, night.statistics.margin)
    return Trial(columns, rows, bad | unusable, maskless, refusals, short, _detectable(examples))


def _detectable(examples: Sequence[Example]) -> dict[str, float]:
    closed = [example for example in examples if example.split != "calibration" and example.task != CAPTION]
    splits = {example.split: [one for one in closed if one.split == example.split] for example in closed}
    return {split: planned_effect(len(own), len({example.image or example.id for example in own})) for split, own in sorted(splits.items())}


def _refusal(check: Callable[[], object]) -> str | None:
    try:
        check()
    except ValueError as error:
        return str(error)
    return None


def _check_shards(calibration: Sequence[Example], unusable: Mapping[str, str], night: Night) -> None:
    """Raises ValueError if a shard has more examples without masks than the masks step allows."""
    for place in range(len(night.shards)):
        own = {example.id for example in shard_examples(calibration, place, len(night.shards))}
        check_bad_share({i: reason for i, reason in unusable.items() if i in own}, len(own), night.masks.max_bad_share)


def _check_number(calibration: Sequence[Example], scored: Collection[str] | None, min_images: int) -> None:
    """Raises ValueError if too few images can be scored; of masks that are yet to be made nothing is known."""
    if scored is not None and (number := len({e.image for e in calibration if e.id in scored})) < min_images:
        raise ValueError(
            f"{number} images of split 'calibration' have a usable mask of a key object, the heads need scores.min_images = {min_images} "
            "to be scored: add images or masks to them, or lower the number"
        )


def _scorable(folder: Path, calibration: Sequence[Example], night: Night) -> tuple[set[str] | None, dict[str, str], dict[str, int]]:
    """The examples with a usable mask of a key object (None where the masks are yet to be made), the bad ones with their reasons, and how
    many of the others have no such mask, by the cause.
    """
    if night.images.kind == "texts" or are_generated(night.masks, night.images):
        return None, {}, {}
    masks, unusable = exact_masks(folder, calibration, night.masks.quality)
    scored = set(masks.filter(pl.col("key") & pl.col("reason").is_null())["example_id"])
    without = masks.filter((pl.col("key") | pl.col("object").is_null()) & ~pl.col("example_id").is_in(list(scored)))
    return scored, unusable, causes(plain_reason(reason) for reason in without.unique("example_id")["reason"])


def known_families() -> tuple[str, Columns, Cells]:
    """The families by transformers' model type."""
    from headwise.vlm import FAMILIES

    rows = [(name, "images and text" if family.layout else "text", family.decoder) for name, family in sorted(FAMILIES.items())]
    return f"Model families ({EMBEDDED} comes with Headwise)", ("model_type", "reads", "decoder"), rows


def describe_model(model: str) -> tuple[str, Columns, Cells]:
    """Load a model and say what Headwise sees in it. Raises ValueError if it cannot be used."""
    from headwise.vlm import load_vlm

    weights(model)
    vlm = load_vlm(model)
    parameters = sum(parameter.numel() for parameter in vlm.base.parameters())
    facts = {
        "model_type": vlm.base.config.model_type,
        "layers": vlm.num_layers,
        "query heads per layer": vlm.num_heads,
        "key-value heads per layer": vlm.num_kv_heads,
        "parameters": f"{parameters:,}",
        "dtype": str(vlm.dtype).removeprefix("torch."),
        "device": str(vlm.device),
    }
    return model, ("", "value"), [(name, str(value)) for name, value in facts.items()]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
