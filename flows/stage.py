"""The one Prefect task that runs a stage: never cached by Prefect, since DVC knows what is up to date."""

from pathlib import Path

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from flows.graph import Busy, StageRun, reproduce


def _is_busy(_task: Task[..., object], _run: TaskRun, state: State[object]) -> bool:
    return isinstance(state.result(raise_on_failure=False), Busy)


@task(
    task_run_name="{name}",
    retries=60,
    retry_delay_seconds=5,
    retry_condition_fn=_is_busy,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def run_stage(name: str, folder: Path, up_to_date: bool = False) -> StageRun:
    """Bring one stage of dvc.yaml up to date; its lines go to the run's log as they come.

    Args:
        name: The stage as DVC names it, such as `attention@0`.
        folder: The clone to work in.
        up_to_date: `stale_stages` has just told that nothing changed: do not ask DVC again.
    """
    logger = get_run_logger()
    if up_to_date:
        logger.info("%s: up to date", name)
        return StageRun(name, "up to date", 0.0)
    run = reproduce(name, folder, logger.info)
    logger.info("%s: %s in %.1f s", name, run.outcome, run.seconds)
    return run
