"""On which examples heads are profiled: apart from the code that does it, so that reading a parameter imports no model."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class Profile:
    """The unlabelled calibration set that heads are profiled and edits are bounded on."""

    examples: Annotated[int, Field(ge=1, description="questions of the calibration split, balanced over the tasks")] = 100
    probes: Annotated[int, Field(ge=1, description="of these, how many the causal flow is measured on")] = 32
    pairs: Annotated[
        Literal["own", "shuffled", "blank"],
        Field(description="controls: each question with another question's image, or with a grey one, instead of its own"),
    ] = "own"
    max_new_tokens: Annotated[int, Field(ge=1, description="tokens of the model's own answers, which stand in for labels")] = 16
    curvature: Annotated[float, Field(ge=0, description="lambda: the weight of the squared gradient in the causal flow")] = 0.25
    seed: Annotated[int, Field(ge=0, description="seed of the draw of examples and of the shuffled images")] = 42
