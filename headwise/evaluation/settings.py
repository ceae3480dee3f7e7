"""What an evaluation may be told, and what two evaluations are compared with."""

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class Evaluation:
    """How answers are generated, and how sure a comparison of two models has to be."""

    batch_size: Annotated[int, Field(ge=1, description="Examples that the model reads or answers together")] = 16
    max_new_tokens: Annotated[int, Field(ge=1, le=1024, description="Longest answer to a closed question, in tokens")] = 12
    bootstrap: Annotated[int, Field(ge=200, description="Draws of images behind every 95 % interval")] = 10_000
    sign_flips: Annotated[int, Field(ge=200, description="Draws of the sign-flip test; all of them where the images allow fewer")] = 10_000
    max_bad_share: Annotated[float, Field(ge=0, lt=1, description="Share of examples that may be unusable before the step fails")] = 0.05
    seed: Annotated[int, Field(ge=0, description="Seed of the bootstrap and of the sign flips")] = 0
