"""The nightly flow: from images to a promoted adapter."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import flow

from flows.artifacts import publish_heat_map, publish_verdict
from flows.leaderboard import record as record_run
from flows.lineage import LINEAGE, judgement_digest, read_lineage, report_ids, write_lineage
from flows.parameters import Night, Parameters, located
from flows.pipeline import Pipeline, annotation_stages, started
from flows.promotion import Verdict, against_base, against_champion, against_idle, against_silent, against_uncommitted, verdict
from flows.registry import (
    BASE_TAG,
    DIGEST_TAG,
    JUDGEMENT_TAG,
    Adapter,
    Judgement,
    fetch_adapter,
    find_champion,
    find_version,
    promote,
    read_adapter,
    registered_name,
)
from headwise.arms import HEAD_ARMS, LAYER_ARMS, STEERING_ARMS
from headwise.calibration.rah_lora.schema import TARGETS, TARGETS_FILE
from headwise.calibration.settings import CALIBRATION
from headwise.calibration.zerotuning.schema import HEADS as STEERED
from headwise.calibration.zerotuning.schema import HEADS_FILE as STEERED_FILE
from headwise.data import check_data
from headwise.evaluation.compare import Comparison, compare
from headwise.evaluation.conditions import check_conditions
from headwise.evaluation.statistics import Statistics
from headwise.evaluation.table import BASE, CHAMPION, answer_folders, read_answers
from headwise.examples import read_examples
from headwise.files import read_json, read_table
from headwise.scores.schema import HEADS, HEADS_FILE
from headwise.selection import SELECTION_FILE, read_selection

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

IMAGES = Path("data/images")
ADAPTERS, REPORT = Path("data/adapters"), Path("report/index.html")
NIGHT = Night()


@dataclass(frozen=True)
class Result:
    """What a run ended in: its clone, what was recomputed, every arm compared with the base model, the controls that failed with their
    reasons, the sentence, the report.
    """

    folder: Path
    recomputed: tuple[str, ...]
    comparisons: Mapping[str, list[Comparison]]
    failed: Mapping[str, str]
    sentence: str
    report: Path


@flow(name="nightly", persist_result=False)
def nightly(settings: Night = NIGHT) -> Result:
    """Find the layers that look where the question points, recalibrate the model through them, and promote the adapter if it is better.

    Args:
        settings: What is computed, when the adapter becomes the champion, and in which workspace.
    """
    candidate, *controls = settings.arms
    with started(settings.name, settings, night_stages(settings)) as pipeline:
        run_shared(pipeline, settings)
        pipeline.run(arm_stages(candidate, settings))
        failed = {arm: reason for arm in controls if (reason := pipeline.attempt(arm_stages(arm, settings)))}
        pipeline.attempt(gain_stages(settings, failed))
        return conclude(pipeline, settings, failed)


def run_shared(pipeline: Pipeline, parameters: Parameters) -> None:
    """Run what all arms stand on. Raises StageFailed, and ValueError as soon as the data or their masks turn out not to do for the rest."""
    pipeline.run(["images"])
    examples, trains = read_examples(pipeline.workspace.folder / IMAGES), scores_layers(parameters)
    check_data(examples, parameters.calibration if trains else None, parameters.scores.min_images if trains else 0)
    if trains:
        pipeline.annotate(parameters.shards)
    pipeline.run(stage for stage in shared_stages(parameters) if stage not in pipeline.outcomes)


def shared_stages(parameters: Parameters) -> list[str]:
    """Images, what layers are chosen by (masks, the attention on them in shards, the scores), and the answers of the model as it is."""
    attention = [f"attention@{shard}" for shard in parameters.shards]
    scored = [*annotation_stages(parameters.shards), *attention, "scores"] if scores_layers(parameters) else ["images"]
    return [*scored, *evaluation_stages(BASE, parameters)]


def scores_layers(parameters: Parameters) -> bool:
    """Whether an arm chooses layers by their heads' scores and trains them; calibrating heads needs neither masks nor labels."""
    return any(arm in LAYER_ARMS for arm in parameters.arms)


def arm_stages(arm: str, parameters: Parameters) -> list[str]:
    """Select the arm's layers and train a LoRA on them, profile heads and calibrate them, or steer them; evaluate the calibrated model."""
    calibration = [f"selection@{arm}", f"calibration@{arm}"]
    if arm in HEAD_ARMS:
        calibration = ["profile", f"rah_lora@{arm}"]
    elif arm in STEERING_ARMS:
        calibration = [f"zerotuning@{arm}"]
    return [*calibration, *evaluation_stages(arm, parameters)]


def gain_stages(parameters: Parameters, failed: Collection[str] = ()) -> list[str]:
    """Measure what every calibrated head brings alone, of the arms that did not fail; nothing stands on it."""
    return [f"head_gains@{arm}" for arm in parameters.measured if arm in parameters.arms and arm not in failed]


def evaluation_stages(arm: str, parameters: Parameters) -> list[str]:
    """Ask a model all there is to ask: the run's own data, and the benchmarks in shards."""
    own, stage, of_arm = ("baseline", "benchmark_base", "") if arm == BASE else (f"evaluation@{arm}", "benchmark", f"{arm}-")
    return [own, *(f"{stage}@{source.name}-{of_arm}{shard}" for source in parameters.benchmarks for shard in parameters.shards)]


def night_stages(parameters: Parameters) -> list[str]:
    """Every stage of a night."""
    of_arms = (stage for arm in parameters.arms for stage in arm_stages(arm, parameters))
    return list(dict.fromkeys([*shared_stages(parameters), *of_arms, *gain_stages(parameters)]))


def compare_arms(folder: Path, before: str, after: str, settings: Statistics) -> list[Comparison]:
    """One arm against another, on the same examples. Raises ValueError where they were not evaluated under the same conditions."""
    check_arms(folder, before, after)
    return compare(read_answers(folder / "data", before), read_answers(folder / "data", after), settings)


def check_arms(folder: Path, before: str, after: str) -> None:
    """Raises ValueError naming the first condition under which one was not evaluated as the other."""
    first, second = (answer_folders(folder / "data", arm) for arm in (before, after))
    for asked in first.keys() & second.keys():
        check_conditions([first[asked], second[asked]])


def conclude(pipeline: Pipeline, settings: Night, failed: Mapping[str, str]) -> Result:
    """Compare, and unless this very judgement is recorded: judge, show, write report and lineage, and at the very end promote.

    An alias therefore never names what is not stored, and a run that was cut short anywhere is concluded by the next one.
    """
    folder, client, name = pipeline.workspace.folder, pipeline.record.client, registered_name(settings)
    candidate, *controls = (arm for arm in settings.arms if arm not in failed)
    adapter = read_adapter(folder / ADAPTERS / candidate)
    comparisons = {candidate: compare_arms(folder, BASE, candidate, settings.statistics)}
    failed = dict(failed)
    for arm in controls:
        try:
            comparisons[arm] = compare_arms(folder, BASE, arm, settings.statistics)
        except ValueError as error:  # such as an example that this arm alone could not answer
            failed[arm] = str(error)
    rules = {"statistics": asdict(settings.statistics)}
    digest, lineage = judgement_digest(pipeline.workspace, pipeline.outcomes, rules), read_lineage(folder)
    version, champion = find_version(client, name, adapter), find_champion(client, name)
    recorded_digest = version.tags.get(JUDGEMENT_TAG) if version else None
    if version and recorded_digest == lineage.get("judgement") == digest and (folder / REPORT).is_file():
        now = f"{CHAMPION} is version {champion.version}" if champion else f"no version is {CHAMPION}"
        sentence = f"Nothing changed: the adapter is version {version.version} of {name!r} already, {now}. {lineage['verdict']}"
        _record(pipeline, comparisons, str(lineage["verdict"]))
    else:
        rival = _against_champion(pipeline, settings, adapter, champion)
        comparisons |= rival.comparisons
        code = pipeline.workspace.uncommitted_code
        claims = read_json(folder / ADAPTERS / candidate / CALIBRATION)
        base = against_base(comparisons[candidate], settings.statistics.margin)
        found = verdict([*against_idle(claims), *against_silent(claims), base, *rival.verdicts, *against_uncommitted(code)])
        judged = {"judgement": digest, "rules": rules, "verdict": found.sentence, "failed": failed}
        write_lineage(pipeline.workspace, pipeline.outcomes, pipeline.ids, judged)
        record_run(pipeline, settings, comparisons)
        _publish_heat_map(folder, candidate)
        _write_report(pipeline)
        _record(pipeline, comparisons, found.sentence)
        judgement = Judgement(found, digest if rival.asked else None, str(champion.version) if champion else None)
        sentence = promote(pipeline.record, name, adapter, located(settings.attention.model), judgement)
    return Result(folder, tuple(pipeline.recomputed), comparisons, failed, sentence, folder / REPORT)


@dataclass(frozen=True)
class Rival:
    """What the champion so far says of the candidate: the verdict on the two, and its own comparison with the base model.

    asked: False where it ought to have been compared and could not be.
    """

    verdicts: Sequence[Verdict] = ()
    comparisons: Mapping[str, list[Comparison]] = field(default_factory=dict)
    asked: bool = True


def _against_champion(pipeline: Pipeline, settings: Night, candidate: Adapter, champion: "ModelVersion | None") -> Rival:
    """Ask the champion so far what the candidate was asked; nothing where there is none, or where the candidate is it.

    A champion that cannot be asked is not replaced; one of another revision of the model is, as nothing can be said about the two.
    """
    if champion is None or champion.tags.get(DIGEST_TAG) == candidate.sha256:
        return Rival()
    so_far = f"version {champion.version}, the champion so far,"
    if champion.tags.get(BASE_TAG) not in (None, candidate.base_revision):
        return Rival([Verdict(True, f"{so_far} is for another revision of the model, so they were not compared")])
    folder, arm = pipeline.workspace.folder, settings.arms[0]
    try:
        fetch_adapter(pipeline.record.client, champion, folder / ADAPTERS / CHAMPION)
        pipeline.workspace.write_params({**settings.as_params(), "evaluated": [*settings.arms, CHAMPION]})
        reason = pipeline.attempt(evaluation_stages(CHAMPION, settings))
    except ValueError as error:
        reason = str(error)
    if reason:
        return Rival([Verdict(False, f"{so_far} could not be asked ({reason})")], asked=False)
    try:
        against = compare_arms(folder, CHAMPION, arm, settings.statistics)
        return Rival(
            [against_champion(against, str(champion.version))], {CHAMPION: compare_arms(folder, BASE, CHAMPION, settings.statistics)}
        )
    except ValueError as error:
        return Rival([Verdict(False, f"{so_far} cannot be compared ({error})")], asked=False)


def _figures(arm: str, comparisons: Sequence[Comparison]) -> Iterator[tuple[str, float]]:
    """What MLflow draws over the nights: of each headline the level and its change from the uncalibrated model."""
    for each in comparisons:
        if each.task is None:
            yield f"{arm}.{each.split}.{each.metric}", each.after
            yield f"{arm}.{each.split}.{each.metric}.effect", each.effect


def _publish_heat_map(folder: Path, arm: str) -> None:
    data = folder / "data"
    if arm in STEERING_ARMS:
        from headwise.report.steered_heads import EFFECT, effect_scores, scaled_heads

        heads = read_table(data / "adapters" / arm / STEERED_FILE, STEERED)
        if heads[EFFECT].null_count() < len(heads):  # a control looks at no head
            publish_heat_map(effect_scores(heads), EFFECT, (), scaled_heads(heads))
    elif arm in HEAD_ARMS:
        targets = read_table(data / "adapters" / arm / TARGETS_FILE, TARGETS, ["layer", "head"])
        publish_heat_map(read_table(data / "profile" / HEADS_FILE, HEADS), "isal", (), targets.rows())
    else:
        selection = read_selection(data / "selections" / arm / SELECTION_FILE)
        publish_heat_map(read_table(data / "scores" / HEADS_FILE, HEADS), selection.criterion.statistic, selection.layers)


def _write_report(pipeline: Pipeline) -> None:
    """The HTML report beside the clone's data."""
    from headwise.report.page import write_report  # matplotlib is needed here alone

    folder = pipeline.workspace.folder
    write_report(folder, (folder / REPORT).parent, report_ids(read_lineage(folder)))
    pipeline.record.folder((folder / REPORT).parent, "report")


def _record(pipeline: Pipeline, comparisons: Mapping[str, Sequence[Comparison]], sentence: str) -> None:
    """The verdict in Prefect and MLflow with every arm's figures, and the lineage that it stands in."""
    pipeline.record.metrics({name: value for arm, own in comparisons.items() for name, value in _figures(arm, own)})
    publish_verdict(sentence, comparisons)
    pipeline.record.file(pipeline.workspace.folder / LINEAGE)
    pipeline.record.tags({"verdict": sentence, "recomputed": ", ".join(pipeline.recomputed) or "nothing"})
