"""How an adapter is trained: apart from the code that trains, so that reading a parameter imports no model."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from headwise.examples import CAPTION, Example

CALIBRATION = "calibration.json"
"""What a calibration says of itself, in the adapter's folder."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class Lora:
    """How the adapter is trained; its targets are the query, key and value projections."""

    examples: Annotated[
        Literal["captions", "all"], Field(description="Train on the captions of the calibration split, as the paper does, or on all of it")
    ] = "captions"
    rank: Annotated[int, Field(ge=1, le=256, description="Rank r of each update")] = 8
    alpha: Annotated[int, Field(ge=1, le=1024, description="An update is scaled by alpha / rank")] = 16
    learning_rate: Annotated[float, Field(gt=0, lt=1, description="Highest learning rate, at the end of the warm-up")] = 2e-3
    steps: Annotated[int, Field(ge=1, description="Optimiser steps")] = 30
    batch_size: Annotated[int, Field(ge=1, le=512, description="Examples per step")] = 8
    warmup_ratio: Annotated[float, Field(ge=0, lt=1, description="Share of the steps in which the learning rate rises")] = 0.1
    max_bad_share: Annotated[float, Field(ge=0, lt=1, description="Share of examples that may be unusable before the step fails")] = 0.05
    seed: Annotated[int, Field(ge=0, description="Seed of the first weights and of the order of the examples")] = 0


def training_examples(examples: Sequence[Example], settings: Lora) -> list[Example]:
    """The examples of the calibration split that the settings choose. Raises ValueError if they choose none."""
    chosen = [example for example in examples if settings.examples == "all" or example.task == CAPTION]
    if not chosen:
        raise ValueError(
            f"no caption among {len(examples)} examples of the calibration split: give descriptions as rows of task {CAPTION!r}, or train "
            "on the other questions by calibration.examples=all (without captions no perplexity is measured, so nothing is promoted)"
        )
    return chosen
