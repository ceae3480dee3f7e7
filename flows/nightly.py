"""The nightly flow: from images to a promoted adapter."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from prefect import flow
from prefect.runtime import flow_run

from flows.artifacts import publish_heat_map, publish_verdict
from flows.graph import remove_leftovers, stale_stages
from flows.lineage import LINEAGE, write_lineage
from flows.parameters import DEFAULTS, Arms, Parameters
from flows.pipeline import Pipeline
from flows.promotion import Promotion, Verdict, judge, promote
from flows.server import check_reachable
from flows.terminal import stage_bar
from flows.tracking import open_client, recorded, tracking_uri
from flows.workspace import Workspace, open_workspace
from headwise.calibration.settings import Lora
from headwise.data import DataSource
from headwise.evaluation.compare import Comparison, compare
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.table import ANSWERS, ANSWERS_FILE
from headwise.files import read_table
from headwise.masks.quality import MaskQuality
from headwise.observation import Observation
from headwise.scores.head_impact import HeadImpact
from headwise.selection import SELECTION_FILE, Criterion, read_selection

BASE = "base"


@dataclass(frozen=True)
class Result:
    """What a run ended in: its clone, what was recomputed, every arm compared with the base model, the sentence, the report."""

    folder: Path
    recomputed: tuple[str, ...]
    comparisons: Mapping[str, list[Comparison]]
    sentence: str
    report: Path


@flow(name="nightly", persist_result=False)
def nightly(
    images: DataSource = DEFAULTS.images,
    masks: MaskQuality = DEFAULTS.masks,
    attention: Observation = DEFAULTS.attention,
    scores: HeadImpact = DEFAULTS.scores,
    selection: Criterion = DEFAULTS.selection,
    calibration: Lora = DEFAULTS.calibration,
    evaluation: Evaluation = DEFAULTS.evaluation,
    promotion: Promotion = Promotion(),  # noqa: B008  frozen
    arms: Arms = DEFAULTS.arms,
    name: str = "nightly",
) -> Result:
    """Find the layers that look where the question points, recalibrate the model through them, and promote the adapter if it is better.

    Args:
        images: The data: drawn scenes, composed photographs, or a folder of your own.
        masks: Which objects' masks are good enough.
        attention: Which model is observed, and how.
        scores: How attention and masks become a score per head.
        selection: By which score, and how many layers.
        calibration: The LoRA on the chosen layers.
        evaluation: How models are asked, and how sure a comparison has to be.
        promotion: When the adapter becomes the champion.
        arms: Which layers to calibrate; the first arm is the candidate, the others are its controls.
        name: The run's workspace; the same name again recomputes only what changed.
    """
    parameters = Parameters(
        images=images,
        masks=masks,
        attention=attention,
        scores=scores,
        selection=selection,
        calibration=calibration,
        evaluation=evaluation,
        arms=arms,
    )
    with started(name, parameters) as pipeline:
        pipeline.run(shared_stages(parameters))
        for arm in arms:
            pipeline.run(arm_stages(arm))
        return conclude(pipeline, parameters, promotion)


@contextmanager
def started(name: str, parameters: Parameters) -> Iterator[Pipeline]:
    """The run's clone and its MLflow run, open together; outputs of arms that this run does not have are put away."""
    params = parameters.as_params()
    planned = [*shared_stages(parameters), *(stage for arm in parameters.arms for stage in arm_stages(arm))]
    check_reachable(tracking_uri(), "MLFLOW_TRACKING_URI")
    with open_workspace(name, params) as workspace, ThreadPoolExecutor(1) as beside:
        remove_leftovers(workspace.folder, planned)
        stale = beside.submit(stale_stages, workspace.folder)  # DVC looks while MLflow opens its store; each takes seconds
        client = open_client()
        with recorded(client, name, _tags(workspace)) as record, stage_bar(len(planned)) as show:
            yield Pipeline(workspace, record, show, stale.result())


def shared_stages(parameters: Parameters) -> list[str]:
    """Images, masks, the attention on them in shards, the scores, and the answers of the model as it is."""
    return ["images", "masks", *(f"attention@{shard}" for shard in parameters.shards), "scores", "baseline"]


def arm_stages(arm: str) -> list[str]:
    """Select the arm's layers, train a LoRA on them, evaluate the calibrated model."""
    return [f"selection@{arm}", f"calibration@{arm}", f"evaluation@{arm}"]


def read_answers(folder: Path, arm: str) -> pl.DataFrame:
    """What an arm answered, example by example; `base` is the model as it was."""
    return read_table(folder / "data" / "evaluations" / arm / ANSWERS_FILE, ANSWERS)


def compare_arms(folder: Path, parameters: Parameters) -> dict[str, list[Comparison]]:
    """Every arm against the model as it was, on the same examples."""
    base = read_answers(folder, BASE)
    return {arm: compare(base, read_answers(folder, arm), parameters.evaluation) for arm in parameters.arms}


def conclude(pipeline: Pipeline, parameters: Parameters, promotion: Promotion) -> Result:
    """Compare, show, write report and lineage, and at the very end register and promote: an alias never names what is not stored."""
    folder, candidate = pipeline.workspace.folder, parameters.arms[0]
    comparisons = compare_arms(folder, parameters)
    verdict = judge(comparisons[candidate], promotion.margin)
    _show(pipeline, candidate, verdict, comparisons)
    report = _report(pipeline, verdict)
    _write_lineage(pipeline)
    pipeline.record.tags({"verdict": verdict.sentence, "recomputed": ", ".join(pipeline.recomputed) or "nothing"})
    adapter = folder / "data" / "adapters" / candidate
    sentence = promote(pipeline.record, adapter, parameters.attention.model, verdict, promotion, changed=pipeline.changed)
    return Result(folder, tuple(pipeline.recomputed), comparisons, sentence, report)


def _show(pipeline: Pipeline, candidate: str, verdict: Verdict, comparisons: Mapping[str, list[Comparison]]) -> None:
    data = pipeline.workspace.folder / "data"
    selection = read_selection(data / "selections" / candidate / SELECTION_FILE)
    if pipeline.changed:
        publish_heat_map(data / "scores", selection.criterion.statistic, selection.layers)
    publish_verdict(verdict.sentence, comparisons)


def _report(pipeline: Pipeline, verdict: Verdict) -> Path:
    """The HTML report beside the clone's data; drawn again only if there is something new to draw."""
    out = pipeline.workspace.folder / "report"
    if (out / "index.html").is_file() and not pipeline.changed:
        return out / "index.html"
    from headwise.report.page import write_report  # matplotlib is needed here alone

    report = write_report(pipeline.workspace.folder, out, {**_ids(pipeline), "verdict": verdict.sentence})
    pipeline.record.folder(out, "report")
    return report


def _write_lineage(pipeline: Pipeline) -> None:
    """A run that changed nothing leaves the ids of the run that made the outputs."""
    path = pipeline.workspace.folder / LINEAGE
    if pipeline.changed or not path.is_file():
        write_lineage(pipeline.workspace, _ids(pipeline), pipeline.outcomes)
    pipeline.record.file(path)


def _ids(pipeline: Pipeline) -> dict[str, str]:
    return {
        "commit": pipeline.workspace.commit,
        "prefect_flow_run": str(flow_run.id),
        "mlflow_run": pipeline.record.run_id,
    }


def _tags(workspace: Workspace) -> dict[str, str]:
    return {
        "git.commit": workspace.commit,
        "git.dirty": str(bool(workspace.uncommitted)).lower(),
        "workspace": workspace.name,
        "prefect.flow_run": str(flow_run.id),
    }
