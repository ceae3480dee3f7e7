"""How RAH-LoRA calibrates: apart from the code that does, so that reading a parameter imports no model."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class RahLora:
    """Which heads are calibrated, from which others, and how far. Defaults are the paper's; it does not give beta."""

    targets: Annotated[
        Literal["low", "high", "random"],
        Field(description="heads with a low I-SAL; the controls take as many at random, or those with a high one"),
    ] = "low"
    caf: Annotated[
        Literal["absolute", "signed", "none"],
        Field(description="which causal flow has to be high: its strength, eq. 5 with its sign, or none (a control)"),
    ] = "absolute"
    p_isal: Annotated[float, Field(gt=0, lt=100, description="targets are below this percentile of their layer's I-SAL")] = 15.0
    p_caf: Annotated[float, Field(ge=0, lt=100, description="and above this percentile of its causal flow")] = 70.0
    layers: Annotated[tuple[Share, Share], Field(description="from and up to which share of the depth heads are calibrated")] = (0.0, 0.5)
    beta: Annotated[float, Field(description="anchors have an I-SAL (a z-score) above this")] = 0.5
    anchors: Annotated[int, Field(ge=1, description="k: how many of the most similar anchors a target learns from")] = 3
    rho: Annotated[float, Field(ge=0, le=1, description="weight of alike maps in the similarity; the rest is alike weights")] = 0.6
    w_v: Annotated[float, Field(ge=0, le=1, description="weight of the value projection in alike weights; the rest is the output's")] = 0.7
    tau: Annotated[float, Field(ge=0, lt=0.5, description="share of the anchors trimmed at each end of the mean")] = 0.1
    rank: Annotated[int, Field(ge=0, le=1024, description="singular values that are kept of a head's change; 0: all of them")] = 8
    grouped: Annotated[
        Literal["aligned", "aligned_weights", "output_only"],
        Field(
            description="how an output projection is taken over by a part of the heads that share values: in the target's value basis on "
            "what the layer reads, on all inputs alike, or as it is"
        ),
    ] = "aligned"
    learned: Annotated[
        Literal["anchors", "nothing"], Field(description="what targets take over; nothing: they are only turned down (a control)")
    ] = "anchors"
    queries_and_keys: Annotated[
        bool, Field(description="change the query and key projections too, where all heads that share values are targets")
    ] = False
    mode: Annotated[
        Literal["joint", "greedy"], Field(description="one step size for all targets, or one for each, one after the other")
    ] = "joint"
    order: Annotated[Literal["deepest", "caf"], Field(description="greedy: the deepest target first, or that with the highest flow")] = (
        "deepest"
    )
    delta: Annotated[float, Field(gt=0, description="largest mean KL divergence from the uncalibrated model, in nats")] = 0.05
    max_alpha: Annotated[float, Field(gt=0, le=1, description="first step size, halved while the divergence is above delta")] = 0.15
    halvings: Annotated[int, Field(ge=0, le=20, description="after so many a target is left as it was")] = 6
    seed: Annotated[int, Field(ge=0, description="seed of the random targets")] = 42

    def __post_init__(self) -> None:
        """Raises ValueError where the layers end before they begin."""
        if self.layers[0] >= self.layers[1]:
            raise ValueError(f"layers = {list(self.layers)}: the first share of the depth has to be below the second")
