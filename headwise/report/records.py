"""What the page says beside its figures: the statistical tests, the manifests' digests, the examples left out and why."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from headwise.examples import BAD
from headwise.files import MANIFEST, read_json, read_table, sha256_file
from headwise.masks.table import read_masks, written_shards

STAGES = ("images", "masks", "attention", "scores", "selections", "profile", "adapters", "evaluations")
MAX_BAD_ROWS = 200
TITLES = {
    "examples": "Examples",
    "across_layers": "Do the layers differ? Kruskal-Wallis over their heads' means",
    "within_layers": "Do the heads of a layer differ? Kruskal-Wallis, and Friedman for repeated measures",
    "layer_ranking_over_images": "Would other images rank the layers alike? Kendall's tau",
    "layer_ranking_over_thresholds": "Would another threshold rank the layers alike? Kendall's tau",
    "sink_tokens": "Visual tokens taken for sinks, in reading order",
}


@dataclass(frozen=True)
class Table:
    """A plain table: what it shows, the heads of its columns (none where it is pairs), and rows of text, the first cell naming the row.

    words: the columns, counted from 0, that hold words rather than figures.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[int, ...] = ()


@dataclass(frozen=True)
class BadExamples:
    """How many examples each step left out, and which."""

    sentence: str
    table: Table


def statistical_tests(path: Path) -> list[Table]:
    """The file of tests as tables, whatever its structure: one for each entry that holds others, one for the single values.

    An entry that holds entries with keys of their own (a test per layer, per threshold) becomes a table with a row for each.
    """
    if not path.is_file():
        return []
    content = read_json(path)
    single = {name: value for name, value in content.items() if not isinstance(value, (Mapping, list))}
    tables = [_pairs("Values", single)] if single else []
    for name, value in content.items():
        rows = _rows(value)
        if rows:
            tables.append(_grid(title(name), rows))
        elif isinstance(value, (Mapping, list)):
            tables.append(_pairs(title(name), _flat(value) if isinstance(value, Mapping) else {"values": value}))
    return tables


def _rows(value: object) -> dict[str, Mapping[str, object]]:
    """The entries of a list or mapping of mappings, named by their layer, place or key; empty if it is anything else."""
    entries = list(value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ())
    if not all(isinstance(entry, Mapping) for _, entry in entries):
        return {}
    rows = {f"layer {entry['layer']}" if "layer" in entry else str(name): _flat(entry) for name, entry in entries}
    return {name: {key: cell for key, cell in row.items() if key != "layer"} for name, row in rows.items()}


def _flat(value: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested mappings as one, their keys joined by a space."""
    flat: dict[str, object] = {}
    for name, entry in value.items():
        flat |= _flat(entry, f"{prefix}{name} ") if isinstance(entry, Mapping) else {f"{prefix}{name}": entry}
    return flat


def _pairs(title: str, values: Mapping[str, object]) -> Table:
    return Table(title, (), tuple((words(name), number(value, name)) for name, value in values.items()))


def _grid(title: str, rows: Mapping[str, Mapping[str, object]]) -> Table:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    body = tuple((words(name), *(number(row.get(column), column) for column in columns)) for name, row in rows.items())
    return Table(title, ("", *map(words, columns)), body)


def title(name: str) -> str:
    """What a test asks, where it is known; else its key as words."""
    return TITLES.get(name, words(name).capitalize())


def words(name: str) -> str:
    """A key as a reader sees it, without underscores."""
    return name.replace("_", " ")


def number(value: object, name: str = "") -> str:
    """A value for a reader: four significant digits, a p-value (by its name) below 0.001 as such, a missing value as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        is_p = name.split(" ")[-1] in ("p", "p_value") or name.endswith("_p")
        return "< 0.001" if is_p and value < 0.001 else f"{value:.4g}".replace("-", "−")
    if isinstance(value, list):
        return ", ".join(number(entry, name) for entry in value)
    return str(value)


def calibrations_table(adapters: Path, losses: Mapping[str, pl.DataFrame]) -> Table:
    """A row per calibration: what was trained on how much, the losses' ends, and how far the saved adapter is from the trained one."""
    rows: dict[str, Mapping[str, object]] = {}
    for arm, frame in losses.items():
        path = adapters / arm / "calibration.json"
        claims = _flat(read_json(path)) if path.is_file() else {}
        tenth = max(1, len(frame) // 10)
        rows[arm] = {
            **{name: claims.get(name) for name in ("layers", "parameters", "examples")},
            "steps": len(frame),
            "loss, first tenth": _mean(frame.head(tenth)),
            "loss, last tenth": _mean(frame.tail(tenth)),
            "off once loaded": claims.get("proof loaded"),
            "off once merged": claims.get("proof merged"),
        }
    return _grid("What was trained", rows)


def _mean(losses: pl.DataFrame) -> str:
    return f"{losses['loss'].to_numpy().mean():.3f}"


def read_settings(folder: Path) -> Mapping[str, object]:
    """The settings in a folder's manifest; empty where it has none."""
    settings = read_json(folder / MANIFEST).get("settings")
    return settings if isinstance(settings, Mapping) else {}


def manifest_table(data: Path) -> Table | None:
    """A row per folder that a step wrote: its manifest's digest and its settings; None if there is none."""
    folders = sorted(path.parent for path in data.glob(f"**/{MANIFEST}"))
    rows = tuple((folder.relative_to(data).as_posix(), sha256_file(folder / MANIFEST), _settings_text(folder)) for folder in folders)
    ordered = tuple(sorted(rows, key=lambda row: (_stage_place(row[0]), row[0])))
    return Table("The steps' manifests", ("folder", "SHA-256 of the manifest", "settings"), ordered) if rows else None


def _settings_text(folder: Path) -> str:
    return ", ".join(f"{name} = {number(value)}" for name, value in _flat(read_settings(folder)).items()) or "–"


def _stage_place(folder: str) -> int:
    stage = folder.split("/")[0]
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


def bad_examples(data: Path) -> BadExamples | None:
    """Every example that a step left out, and every object without a usable mask; None if there is none."""
    frames = [_reasons(path, data) for path in sorted(data.glob("**/bad.parquet"))]
    if shards := written_shards(data / "masks"):
        unusable = read_masks(shards).filter(pl.col("reason").is_not_null())
        reason = pl.concat_str("phrase", "reason", separator=": ", ignore_nulls=True)
        frames.append(unusable.select(pl.lit("masks").alias("step"), "example_id", reason))
    found = pl.concat([frame.rename({frame.columns[-1]: "reason"}) for frame in frames]) if frames else pl.DataFrame()
    if found.is_empty():
        return None
    counts = found.group_by("step", maintain_order=True).len()
    said = ", ".join(f"{step}: {count}" for step, count in counts.iter_rows())
    shown = f" The first {MAX_BAD_ROWS} are shown." if len(found) > MAX_BAD_ROWS else ""
    rows = tuple((row["example_id"], row["step"], row["reason"]) for row in found.head(MAX_BAD_ROWS).iter_rows(named=True))
    return BadExamples(f"Left out, by step: {said}.{shown}", Table("Which, and why", ("example", "step", "reason"), rows))


def _reasons(path: Path, data: Path) -> pl.DataFrame:
    step = pl.lit(path.parent.relative_to(data).as_posix()).alias("step")
    return read_table(path, BAD).select(step, "example_id", "reason")
