"""ZeroTuning and what it has to beat, in one table: is it a gain, over a moved threshold too, and does one backward pass do?"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from prefect import flow
from pydantic import AfterValidator, Field

from flows.cells import Cell, Pair, compared, publish, run_cell, table_rows
from flows.nightly import night_stages, run_shared
from flows.parameters import Parameters, data_name, distinct
from flows.steering_page import as_markdown
from flows.workspace import STEERING as WORKSPACE
from flows.workspace import runs_folder
from headwise.arms import STEERING_ARMS
from headwise.data import DataSource
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.statistics import Statistics
from headwise.evaluation.table import BASE
from headwise.observation import EMBEDDED_TEXT, Observation

REVIEWS = Parameters(
    images=DataSource(kind="texts", calibration=1000, evaluation=1200),
    attention=Observation(model=EMBEDDED_TEXT, chat_template=False, dtype="float32"),
    evaluation=Evaluation(closed="labels"),
    statistics=Statistics(margin=0.01),
    arms=tuple(STEERING_ARMS),
)
FIRST_SEED, NUM_SEEDS = 42, 5


@flow(name="steering", persist_result=False)
def steering(
    settings: Parameters = REVIEWS,
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(distinct)] = tuple(
        range(FIRST_SEED, FIRST_SEED + NUM_SEEDS)
    ),
) -> Path:
    """Calibrate every arm with every seed on the same data; compare each with the model as it is, and the first with the others.

    Args:
        settings: The parameters that all cells share; `arms` are the rows of the table, the first is compared with the others.
        seeds: The seeds of the calibration examples, drawn from the calibration split; all are judged on the same evaluation split.
    """
    if others := [arm for arm in settings.arms if arm not in STEERING_ARMS]:
        raise ValueError(f"arms: {others} steer nothing; this table compares {', '.join(STEERING_ARMS)}")
    name = data_name(settings.images)
    cells = {
        seed: _run(f"{WORKSPACE}{name}-{seed}", replace(settings, zerotuning=replace(settings.zerotuning, seed=seed))) for seed in seeds
    }
    first, *controls = settings.arms
    pairs: list[Pair] = [*((BASE, arm) for arm in settings.arms), *((control, first) for control in controls)]
    rows = table_rows(name, pairs, cells, settings.statistics, compared)
    folders = {seed: runs_folder() / f"{WORKSPACE}{name}-{seed}" for seed in seeds}
    return publish("steering", rows, as_markdown(rows, cells, folders, settings.statistics.margin))


def _run(name: str, parameters: Parameters) -> Cell:
    return run_cell(name, parameters, night_stages(parameters), lambda pipeline: run_shared(pipeline, parameters))
