"""Every control and ablation of the RAH-LoRA paper in one table: does it matter which heads are calibrated, from which, and how far?"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from prefect import flow
from pydantic import AfterValidator, Field

from flows.ablations_page import FULL, MAIN, ORDER, as_markdown
from flows.cells import Cell, Pair, Row, answers_or_reason, compared, publish, run_cell, table_rows
from flows.graph import StageFailed
from flows.nightly import arm_stages, evaluation_stages, gain_stages
from flows.parameters import COMPOSED, Kinds, Parameters, distinct
from flows.pipeline import started
from flows.workspace import ABLATIONS as WORKSPACE
from flows.workspace import runs_folder
from headwise.arms import HEAD_ARMS
from headwise.evaluation.table import BASE, FOREIGN, read_answers

CONDITIONS: Mapping[str, Literal["shuffled", "blank"]] = {"rah on shuffled pairs": "shuffled", "rah on blank images": "blank"}
OTHER_DATA = "rah of the other data"
EVERY = Parameters(arms=tuple(HEAD_ARMS), measured=(FULL,))
FIRST_SEED, NUM_SEEDS = 42, 5
SEEDS = tuple(range(FIRST_SEED, FIRST_SEED + NUM_SEEDS))


@flow(name="ablations", persist_result=False)
def ablations(
    settings: Parameters = EVERY,
    data: Kinds = COMPOSED,
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(distinct)] = SEEDS,
) -> Path:
    """Calibrate by RAH-LoRA and by each of its controls: the main ones with every seed on every data set, the rest once on the first.

    Args:
        settings: The parameters that all cells share, and the arms; heads are measured with the first seed.
        data: The data sets, in their drift variant; each is also evaluated with the adapter of the others.
        seeds: The seeds of the calibration set and of the random targets.
    """
    if others := [arm for arm in settings.arms if arm not in HEAD_ARMS]:
        raise ValueError(f"arms: {others} are no arms of RAH-LoRA; the ablations compare {', '.join(HEAD_ARMS)}")
    if not _arms(settings, whole=False):
        raise ValueError(f"arms: none of {', '.join(MAIN)} is among them, and those are what all seeds and data sets are compared by")
    rows: list[Row] = []
    for kind in data:
        main, unmeasured = _arms(settings, whole=False), replace(settings, measured=())
        cells = {seeds[0]: _run(_parameters(kind, seeds[0], settings, _arms(settings, whole=kind == data[0])))}
        cells |= {seed: _run(_parameters(kind, seed, unmeasured, main)) for seed in seeds[1:]}
        if kind == data[0] and FULL in main:
            cells[seeds[0]] = {**cells[seeds[0]], **_conditions(_parameters(kind, seeds[0], settings, [FULL]))}
        rows += table_rows(kind, _pairs(cells[seeds[0]]), cells, settings.statistics, compared)
    folders = {kind: runs_folder() / f"{WORKSPACE}{kind}-{seeds[0]}" for kind in data}
    for kind in data if FULL in settings.arms else ():
        parameters = _parameters(kind, seeds[0], settings, _arms(settings, whole=kind == data[0]))
        for other in data:
            if other != kind:
                cell = _foreign(parameters, folders[other] / "data" / "adapters" / FULL)
                rows += table_rows(kind, [(BASE, OTHER_DATA)], {seeds[0]: cell}, settings.statistics, compared)
    return publish("ablations", rows, as_markdown(rows, folders, settings.statistics.margin))


def _pairs(cell: Cell) -> list[Pair]:
    """Every arm against the model as it was, the main ones against each other, and the full method against the rest."""
    arms = [arm for arm in cell if arm != BASE]
    neighbours = [(worse, better) for worse, better in ORDER.values() if BASE not in (worse, better)]
    others = [(FULL, arm) for arm in arms if arm not in MAIN]
    return [*((BASE, arm) for arm in arms), *neighbours, *others]


def _arms(settings: Parameters, *, whole: bool) -> list[str]:
    """The arms of a cell: all of them, or the main ones."""
    return [arm for arm in settings.arms if whole or arm in MAIN]


def _parameters(kind: str, seed: int, settings: Parameters, arms: Sequence[str]) -> Parameters:
    values: dict[str, Any] = {
        "images": replace(settings.images, kind=kind, variant="drift"),
        "profile": replace(settings.profile, seed=seed),
        "rah_lora": replace(settings.rah_lora, seed=seed),
        "arms": tuple(arms),
    }
    return replace(settings, **values)


def _stages(parameters: Parameters) -> list[str]:
    """Neither masks nor scores: RAH-LoRA needs no labels and no objects."""
    own = [stage for arm in parameters.arms for stage in arm_stages(arm, parameters)]
    return list(dict.fromkeys(["images", *evaluation_stages(BASE, parameters), *own, *gain_stages(parameters)]))


def _name(parameters: Parameters) -> str:
    pairs = parameters.profile.pairs
    return f"{WORKSPACE}{parameters.images.kind}-{parameters.profile.seed}" + (f"-{pairs}" if pairs != "own" else "")


def _run(parameters: Parameters) -> Cell:
    shared = ["images", *evaluation_stages(BASE, parameters)]
    return run_cell(_name(parameters), parameters, _stages(parameters), lambda pipeline: pipeline.run(shared))


def _conditions(parameters: Parameters) -> Cell:
    """The full method on calibration sets whose images are not those of the questions."""
    profiles = {name: replace(parameters.profile, pairs=pairs) for name, pairs in CONDITIONS.items()}
    return {name: _run(replace(parameters, profile=profile, measured=()))[FULL] for name, profile in profiles.items()}


def _foreign(parameters: Parameters, adapter: Path) -> Cell:
    """The answers of a cell that is done with the adapter of other data."""
    if not adapter.is_dir():
        return dict.fromkeys((BASE, OTHER_DATA), f"{adapter}: that data set has no adapter")
    try:
        with started(_name(parameters), parameters, _stages(parameters)) as pipeline:
            folder = pipeline.workspace.folder
            shutil.rmtree(folder / "data" / "adapters" / FOREIGN, ignore_errors=True)
            shutil.copytree(adapter, folder / "data" / "adapters" / FOREIGN)
            pipeline.workspace.write_params({**parameters.as_params(), "evaluated": [*parameters.arms, FOREIGN]})
            pipeline.run(evaluation_stages(FOREIGN, parameters))
            base = read_answers(folder / "data", BASE)
            return {BASE: base, OTHER_DATA: answers_or_reason(folder, FOREIGN, base)}
    except (StageFailed, ValueError) as error:
        return {BASE: str(error), OTHER_DATA: str(error)}
