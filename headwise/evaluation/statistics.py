"""What a comparison of two models may be told; apart from how they are asked, so that another seed asks no model again."""

from typing import Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class Statistics:
    """How sure a comparison of two models has to be."""

    bootstrap: Annotated[int, Field(ge=200, description="Draws of images behind every 95 % interval")] = 10_000
    sign_flips: Annotated[int, Field(ge=200, description="Draws of the sign-flip test; all of them where the images allow fewer")] = 10_000
    seed: Annotated[int, Field(ge=0, description="Seed of the bootstrap and of the sign flips")] = 0
    margin: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="What counts as not worse, and what the forgetting probe may lose: accuracy, or a share of perplexity",
        ),
    ] = 0.02
