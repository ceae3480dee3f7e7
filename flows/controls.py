"""The paper's controls: does it matter which layers are calibrated? Every arm, seed and data set at equal steps and examples."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
from prefect import flow
from pydantic import AfterValidator, Field

from flows.cells import Cell, Pair, Row, as_markdown, means, one_direction, publish, run_cell, table_rows
from flows.nightly import night_stages, run_shared
from flows.parameters import COMPOSED, DEFAULTS, Kinds, Parameters, distinct
from flows.workspace import CONTROLS as WORKSPACE
from headwise.evaluation.paired import holm
from headwise.evaluation.table import BASE
from headwise.intervals import LEVEL

ARMS = replace(DEFAULTS, arms=("top", "bottom", "random", "all"))


@flow(name="controls", persist_result=False)
def controls(
    settings: Parameters = ARMS,
    data: Kinds = COMPOSED,
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(distinct)] = (0, 1, 2),
) -> Path:
    """Calibrate every arm with every seed on every data set; compare each with the base model, and the first with the others, in one table.

    Args:
        settings: The parameters that all cells share; `arms` are the rows of the table, the first is compared with the others.
        data: The data sets, in their drift variant.
        seeds: The seeds of the random layers, the LoRA's first weights and the order of the examples.
    """
    rows: list[Row] = []
    images = {kind: replace(settings.images, kind=kind, variant="drift") for kind in data}  # refused here if one has no use for a field
    for kind in data:
        cells = {seed: run_seed(seed, replace(settings, images=images[kind])) for seed in seeds}
        rows += table_rows(kind, pairs_of(settings.arms), cells, settings.statistics)
    return publish("controls", rows, as_markdown(rows, answers(rows)))


def pairs_of(arms: Sequence[str]) -> list[Pair]:
    """Every arm against the model as it was, then the first arm against every other one."""
    first, *others = arms
    return [*((BASE, arm) for arm in arms), *((other, first) for other in others)]


def run_seed(seed: int, settings: Parameters) -> Cell:
    """All arms of one data set and seed."""
    parameters = replace(
        settings,
        selection=replace(settings.selection, seed=seed),
        calibration=replace(settings.calibration, seed=seed),
    )
    name = f"{WORKSPACE}{settings.images.kind}-{seed}"
    return run_cell(name, parameters, night_stages(parameters), lambda pipeline: run_shared(pipeline, parameters))


def answers(rows: Sequence[Row]) -> list[str]:
    """For each data set the paper's question in one sentence, answered by the caption perplexity of the first arm against the others'.

    It matters where the first arm differs from another one: by the p-values of the sign flips over images, adjusted over the arms (Holm,
    5 %), and in the same direction with every seed, of which there must be `LEAST_SEEDS`; else it was not shown. `all` is compared but
    does not decide: it differs in how many layers, too.
    """
    decisive = [row for row in means(rows) if row["against"] != BASE and (row["split"], row["metric"]) == ("evaluation", "perplexity")]
    sentences = []
    for kind in dict.fromkeys(row["data"] for row in decisive):
        found = [row for row in decisive if row["data"] == kind]
        others = [row for row in found if row["against"] != "all"]
        p_values = holm(np.array([row["p_value"] for row in others], dtype=np.float64))
        agreeing = np.array([one_direction(row, rows) for row in others])
        answer = "yes" if (agreeing & (p_values < 1 - LEVEL)).any() else "not shown"
        sentences.append(
            f"Does it matter on {kind} which layers are calibrated? By the captions, {answer}: {'; '.join(map(_words, found))}."
        )
    return sentences


def _words(row: Row) -> str:
    relation = {"gain": "is better than", "loss": "is worse than"}.get(str(row["verdict"]), "is not shown to differ from")
    return f"{row['arm']} {relation} {row['against']} (ratio {row['effect']:.4f}, 95 % interval {row['low']:.4f} to {row['high']:.4f})"
