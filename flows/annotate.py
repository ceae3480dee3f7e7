"""The masks alone: of a data set's key objects, its own or made by Florence-2 and SAM 2, with a page to look at."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from prefect import flow
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings_class

from flows.artifacts import publish_table
from flows.parameters import DEFAULTS, Name, Parameters, Shards
from flows.pipeline import annotation_stages, started
from flows.summaries import Rows, mask_states
from flows.workspace import MASKS as WORKSPACE
from headwise.data import DataSource
from headwise.masks.agreement import read_agreement
from headwise.masks.settings import Masks


@settings_class(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class Annotation:
    """Which data get masks, how, and where the work lies."""

    images: Annotated[DataSource, Field(description="The data: drawn scenes, composed photographs, or a folder of your own")] = DataSource()
    masks: Annotated[Masks, Field(description="Where the masks of the objects come from, and which are good enough")] = Masks()
    shards: Shards = DEFAULTS.shards
    name: Name = "annotation"


@dataclass(frozen=True)
class Annotations:
    """What an annotation ended in: its clone, what was recomputed, how many masks are in which state, how they agree with the data's own
    where it has any and they were made anew, and the page.
    """

    folder: Path
    recomputed: tuple[str, ...]
    states: Rows
    agreement: Rows
    report: Path


ANNOTATION = Annotation()


@flow(name="annotate", persist_result=False)
def annotate(settings: Annotation = ANNOTATION) -> Annotations:
    """Make the masks of the key objects of a data set's calibration split, and nothing else.

    Args:
        settings: Which data, how masks are made, and in which workspace.
    """
    parameters = Parameters(images=settings.images, masks=settings.masks, shards=settings.shards)
    with started(f"{WORKSPACE}{settings.name}", parameters, annotation_stages(settings.shards)) as pipeline:
        pipeline.annotate(settings.shards)
        from headwise.report.page import write_report  # matplotlib is needed here alone

        folder = pipeline.workspace.folder
        states, found = mask_states(folder / "data" / "masks"), read_agreement(folder / "data")
        agreement: Rows = [asdict(found)] if found else []
        publish_table("masks", states)
        publish_table("agreement", agreement)
        report = write_report(folder, folder / "report", pipeline.ids)
        pipeline.record.folder(report.parent, "report")
        return Annotations(folder, tuple(pipeline.recomputed), states, agreement, report)
