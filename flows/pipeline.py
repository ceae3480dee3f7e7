"""The stages of one clone, run one after the other, each recorded in MLflow and shown in Prefect."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from prefect import get_run_logger
from prefect.runtime import flow_run

from flows.artifacts import publish_table
from flows.graph import Outcome, StageFailed, StageRun, read_lock, remove_leftovers, stale_stages
from flows.parameters import Parameters
from flows.stage import run_stage
from flows.summaries import stage_metrics, stage_table
from flows.terminal import stage_bar
from flows.tracking import Record, open_client, recorded
from flows.workspace import Workspace, open_workspace
from headwise.masks.table import check_found, read_masks, written_shards


class Pipeline:
    """Runs the stages of a workspace in the order they are asked for; `outcomes` tells what DVC did with each."""

    def __init__(self, workspace: Workspace, record: Record, show: Callable[[str], object], fresh: Collection[str]) -> None:
        """`show` hears the name of each stage that starts; `fresh` are those that DVC has just found up to date: they cost nothing."""
        self.workspace, self.record, self._show, self._fresh = workspace, record, show, fresh
        self.outcomes: dict[str, Outcome] = {}
        logger = get_run_logger()
        logger.info("Workspace %s at commit %s", workspace.folder, workspace.commit[:12])
        if workspace.uncommitted:
            names = ", ".join(workspace.uncommitted[:5]) + (", ..." if len(workspace.uncommitted) > 5 else "")
            logger.warning("The stages run commits only: %d uncommitted files are unknown to them (%s)", len(workspace.uncommitted), names)

    @property
    def recomputed(self) -> list[str]:
        """The stages whose command ran."""
        return [name for name, outcome in self.outcomes.items() if outcome == "computed"]

    @property
    def ids(self) -> dict[str, str]:
        """By what the run is known: to git, Prefect and MLflow."""
        return {"commit": self.workspace.commit, "prefect_flow_run": str(flow_run.id), "mlflow_run": self.record.run_id}

    def run(self, names: Iterable[str]) -> None:
        """Bring stages up to date, one after the other, and log the parameters, metrics and digests of each.

        Raises StageFailed with the reason of the first one that fails.
        """
        for name in names:
            self._show(name)
            if name not in self._fresh:
                self._fresh = ()  # what DVC found holds only until the first stage changes something
            run = run_stage(name, self.workspace.folder, up_to_date=name in self._fresh)
            if self.outcomes.get(name) != "computed":  # what several arms stand on is asked for again
                self.outcomes[name] = run.outcome
            self._publish(run)

    def annotate(self, shards: Iterable[int]) -> None:
        """Images, and the masks of their objects. Raises ValueError if not one mask of all shards can be used, with the likely cause."""
        self.run(stage for stage in annotation_stages(shards) if stage not in self.outcomes)
        check_found(read_masks(written_shards(self.workspace.folder / "data" / "masks")))

    def attempt(self, names: Sequence[str]) -> str | None:
        """Run stages that the rest can do without; returns the reason, where one failed.

        What an earlier run left of it and of those after it is put away then, so that nobody takes it for tonight's; those before it stay,
        as others may stand on them.
        """
        for place, name in enumerate(names):
            try:
                self.run([name])
            except StageFailed as error:
                get_run_logger().error("%s: %s", self.workspace.name, error)
                remove_leftovers(self.workspace.folder, read_lock(self.workspace.folder).keys() - set(names[place:]))
                return str(error)
        return None

    def _publish(self, run: StageRun) -> None:
        locked = read_lock(self.workspace.folder)[run.name]
        outputs = [self.workspace.folder / path for path in locked.outs]
        tags = {"git.commit": self.workspace.commit, "outcome": run.outcome, "workspace": self.workspace.name}
        self.record.stage(run.name, locked, {**stage_metrics(run.name, outputs), "seconds": run.seconds}, tags)
        publish_table(run.name, stage_table(run.name, outputs))


@contextmanager
def started(name: str, parameters: Parameters, planned: Sequence[str]) -> Iterator[Pipeline]:
    """The run's clone and its MLflow run, open together; outputs of stages that this run does not have are put away."""
    params = parameters.as_params()
    with open_workspace(name, params) as workspace, ThreadPoolExecutor(1) as beside:
        remove_leftovers(workspace.folder, planned)
        stale = beside.submit(stale_stages, workspace.folder)  # DVC looks while MLflow opens its store; each takes seconds
        client = open_client()
        with recorded(client, name, _tags(workspace)) as record, stage_bar(len(planned)) as show:
            found = stale.result()
            yield Pipeline(workspace, record, show, frozenset() if found is None else frozenset(planned) - found)


def annotation_stages(shards: Iterable[int]) -> list[str]:
    """Images, and the masks of their objects in shards."""
    return ["images", *(f"masks@{shard}" for shard in shards)]


def _tags(workspace: Workspace) -> dict[str, str]:
    return {
        "git.commit": workspace.commit,
        "git.dirty": str(bool(workspace.uncommitted)).lower(),
        "workspace": workspace.name,
        "prefect.flow_run": str(flow_run.id),
    }
