"""The stages of one clone, run one after the other, each recorded in MLflow and shown in Prefect."""

from collections.abc import Callable, Collection, Iterable, Sequence

from prefect import get_run_logger

from flows.artifacts import publish_table
from flows.graph import Outcome, StageFailed, StageRun, read_lock, remove_leftovers
from flows.stage import run_stage
from flows.summaries import stage_metrics, stage_table
from flows.tracking import Record
from flows.workspace import Workspace


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

    def run(self, names: Iterable[str]) -> None:
        """Bring stages up to date, one after the other, and log the parameters, metrics and digests of each.

        Raises StageFailed with the reason of the first one that fails.
        """
        for name in names:
            self._show(name)
            if name not in self._fresh:
                self._fresh = ()  # what DVC found holds only until the first stage changes something
            run = run_stage(name, self.workspace.folder, up_to_date=name in self._fresh)
            self.outcomes[name] = run.outcome
            self._publish(run)

    def attempt(self, names: Sequence[str]) -> str | None:
        """Run stages that the rest can do without; returns the reason, where one failed.

        What an earlier run left of them is put away then, so that nobody takes it for tonight's.
        """
        try:
            self.run(names)
        except StageFailed as error:
            get_run_logger().error("%s: %s", self.workspace.name, error)
            remove_leftovers(self.workspace.folder, read_lock(self.workspace.folder).keys() - set(names))
            return str(error)
        return None

    def _publish(self, run: StageRun) -> None:
        locked = read_lock(self.workspace.folder)[run.name]
        outputs = [self.workspace.folder / path for path in locked.outs]
        tags = {"git.commit": self.workspace.commit, "outcome": run.outcome, "workspace": self.workspace.name}
        self.record.stage(run.name, locked, {**stage_metrics(run.name, outputs), "seconds": run.seconds}, tags)
        publish_table(run.name, stage_table(run.name, outputs))
