"""The stages of one clone, run one after the other, each recorded in MLflow and shown in Prefect."""

from collections.abc import Callable, Collection, Iterable

from prefect import get_run_logger

from flows.artifacts import publish_table
from flows.graph import Outcome, StageRun, read_lock
from flows.stage import run_stage
from flows.summaries import stage_metrics, stage_table
from flows.tracking import Record
from flows.workspace import Workspace


class Pipeline:
    """Runs the stages of a workspace in the order they are asked for; `outcomes` tells what DVC did with each."""

    def __init__(self, workspace: Workspace, record: Record, show: Callable[[str], object], stale: Collection[str] | None) -> None:
        """`show` hears the name of each stage that starts; `stale` is what `stale_stages` said: a stage that is not in it costs nothing."""
        self.workspace, self.record, self._show, self._stale = workspace, record, show, stale
        self.outcomes: dict[str, Outcome] = {}
        self._untouched = stale is not None
        logger = get_run_logger()
        logger.info("Workspace %s at commit %s", workspace.folder, workspace.commit[:12])
        if workspace.uncommitted:
            names = ", ".join(workspace.uncommitted[:5]) + (", ..." if len(workspace.uncommitted) > 5 else "")
            logger.warning("Only commits run: %d uncommitted files of the checkout are left out (%s)", len(workspace.uncommitted), names)

    @property
    def recomputed(self) -> list[str]:
        """The stages whose command ran."""
        return [name for name, outcome in self.outcomes.items() if outcome == "computed"]

    @property
    def changed(self) -> bool:
        """Whether any stage was computed or restored."""
        return any(outcome != "up to date" for outcome in self.outcomes.values())

    def run(self, names: Iterable[str]) -> None:
        """Bring stages up to date, one after the other, and log the parameters, metrics and digests of each."""
        for name in names:
            self._show(name)
            clean = self._untouched and self._stale is not None and name not in self._stale
            self._untouched = clean  # what `dvc status` said holds only until the first stage changes something
            run = run_stage(name, self.workspace.folder, up_to_date=clean)
            self.outcomes[name] = run.outcome
            self._publish(run)

    def _publish(self, run: StageRun) -> None:
        locked = read_lock(self.workspace.folder)[run.name]
        outputs = [self.workspace.folder / path for path in locked.outs]
        tags = {"git.commit": self.workspace.commit, "outcome": run.outcome, "workspace": self.workspace.name}
        self.record.stage(run.name, locked, {**stage_metrics(outputs), "seconds": run.seconds}, tags)
        publish_table(run.name, stage_table(run.name, outputs))
