"""What an evaluation may be told."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class Evaluation:
    """How models are asked."""

    batch_size: Annotated[int, Field(ge=1, description="Examples that the model reads or answers together")] = 16
    max_new_tokens: Annotated[int, Field(ge=1, le=1024, description="Longest answer to a closed question, in tokens")] = 12
    closed: Annotated[
        Literal["generated", "labels"],
        Field(
            description="how closed questions are answered: freely, or by the likeliest of their task's labels, as classifiers are judged"
        ),
    ] = "generated"
    max_bad_share: Annotated[float, Field(ge=0, lt=1, description="Share of examples that may be unusable before the step fails")] = 0.05
