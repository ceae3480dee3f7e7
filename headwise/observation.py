"""Which model is observed, and how: apart from the code that observes, so that reading a parameter imports no model."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

EMBEDDED, EMBEDDED_TEXT = "headwise-smol", "smollm2-135m-instruct"
"""The models that come with the package: one that sees, and its language model as its makers trained it, for text alone."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class Observation:
    """Which attention is observed."""

    model: Annotated[
        str,
        Field(min_length=1, description="a transformers folder, a model of the Hugging Face Hub, headwise-smol, or smollm2-135m-instruct"),
    ] = EMBEDDED
    chat_template: Annotated[
        bool, Field(description="whether the model's chat template writes the prompts; text alone can also just go on: the answer follows")
    ] = True
    batch_size: Annotated[int, Field(ge=1, le=512, description="examples per forward pass")] = 8
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], Field(description="auto: bfloat16 where the hardware has it")] = "auto"
    max_examples: Annotated[
        int, Field(ge=1, description="how many calibration examples at most: all questions of as many images as fit, drawn by their names")
    ] = 200
    max_bad_share: Annotated[float, Field(ge=0, le=1, description="share of examples that may be left out before the step fails")] = 0.05
