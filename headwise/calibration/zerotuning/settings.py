"""How ZeroTuning calibrates: apart from the code that does, so that reading a parameter imports no model."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

OperatorName = Literal["first_token", "second_token", "key", "sinks", "quotation"]
FIRST_TOKEN: OperatorName = "first_token"

Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Depth = Annotated[float, Field(ge=0, le=1)]
More = Annotated[float, Field(gt=1, allow_inf_nan=False)]
Less = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class ZeroTuning:
    """Which heads' attention to the first token is scaled, and by how much; all of it is chosen on the calibration examples."""

    objective: Annotated[
        Literal["labels", "entropy"],
        Field(description="what is searched for: right labels, or, unsupervised, a low entropy of the next token"),
    ] = "labels"
    queries: Annotated[
        Literal["calibration", "evaluation"],
        Field(description="whose prompts; evaluation: some of the very ones to be judged, without their answers (transductive)"),
    ] = "calibration"
    readout: Annotated[
        Literal["as_is", "bias", "temperature"],
        Field(description="controls: no head is touched, labels' likelihoods are shifted (a threshold moved), or divided (a temperature)"),
    ] = "as_is"
    examples: Annotated[int, Field(ge=1, description="how many of them, drawn by the seed, as many of each label as can be")] = 100
    seed: Annotated[int, Field(ge=0, description="seed of the examples")] = 42
    operator: Annotated[
        OperatorName,
        Field(
            description="what is scaled: attention to the first token; compared with it: to the second, to other sinks (ACT), to what "
            "the model itself quotes (Auto-PASTA), or the first one's key"
        ),
    ] = FIRST_TOKEN
    profile: Annotated[
        Literal["gradient", "exact"],
        Field(description="how heads are profiled: one backward pass for all, or a forward pass for each (first_token alone)"),
    ] = "gradient"
    step: Annotated[More, Field(description="profile=exact: the gamma that each head is tried with")] = 1.5
    layers: Annotated[tuple[Depth, Depth], Field(description="from and up to which share of the depth heads are chosen")] = (0.0, 1.0)
    shares: Annotated[tuple[Share, ...], Field(min_length=1, description="candidates: which share of the heads is scaled")] = (
        0.1,
        0.2,
        0.4,
    )
    up: Annotated[tuple[More, ...], Field(description="candidates: gammas for heads that should attend more to the first token")] = (
        *(1.25, 1.5, 2.0, 3.0),
    )
    down: Annotated[tuple[Less, ...], Field(description="candidates: gammas for heads that should attend less to it")] = (
        0.8,
        0.6,
        0.4,
        0.2,
    )

    def __post_init__(self) -> None:
        """Raises ValueError where there is nothing to choose from, or labels of the evaluation would be read."""
        if not self.up and not self.down:
            raise ValueError("up and down are both empty: give gammas to choose from")
        if self.layers[0] >= self.layers[1]:
            raise ValueError(f"layers = {self.layers}: the first share has to be below the second")
        if self.readout != "as_is" and self.objective != "labels":
            raise ValueError("a readout is fitted to labels: set objective = labels")
        if self.profile == "exact" and self.operator != FIRST_TOKEN:
            raise ValueError(f"profile = exact is for operator = {FIRST_TOKEN}; {self.operator} has a gradient")
        if self.objective == "labels" and self.queries == "evaluation":
            raise ValueError("queries = evaluation would read the answers that are judged: set objective = entropy")


def generates(claims: Mapping[str, object]) -> bool:
    """Whether a model can generate under an adapter, and not just read whole prompts. claims: its calibration.json."""
    return claims.get("operator", FIRST_TOKEN) == FIRST_TOKEN
