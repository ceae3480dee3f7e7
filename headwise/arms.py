"""The arms of a run: by which method the model is calibrated, the candidate and the controls that it has to beat."""

from collections.abc import Mapping
from typing import Annotated, get_args

from pydantic import AfterValidator, WithJsonSchema

from headwise.selection import LayerArm

LAYER_ARMS: tuple[str, ...] = get_args(LayerArm)
"""A LoRA on the layers that score highest, lowest, on as many at random, or on all."""

PERCENTILES = [(p_isal, p_caf) for p_isal in (10, 15, 20) for p_caf in (60, 70, 80) if (p_isal, p_caf) != (15, 70)]
HEAD_ARMS: Mapping[str, Mapping[str, object]] = {
    "rah": {},
    "rah-without-caf": {"caf": "none"},
    "rah-random": {"targets": "random"},
    "rah-inverse": {"targets": "high"},
    "rah-signed-caf": {"caf": "signed"},
    "rah-one-anchor": {"anchors": 1},
    "rah-without-maps": {"rho": 0.0},
    "rah-without-weights": {"rho": 1.0},
    "rah-output-only": {"grouped": "output_only"},
    "rah-aligned-weights": {"grouped": "aligned_weights"},
    "rah-damped": {"learned": "nothing"},
    **{f"rah-rank-{rank or 'full'}": {"rank": rank} for rank in (4, 16, 32, 0)},
    **{f"rah-percentiles-{p_isal}-{p_caf}": {"p_isal": p_isal, "p_caf": p_caf} for p_isal, p_caf in PERCENTILES},
    "rah-middle-layers": {"layers": (0.375, 0.75)},
    "rah-upper-layers": {"layers": (0.5, 1.0)},
    "rah-all-layers": {"layers": (0.0, 1.0)},
    **{f"rah-alpha-{percent}": {"max_alpha": percent / 100} for percent in (30, 60, 100)},
    **{f"rah-greedy-{percent}": {"mode": "greedy", "delta": percent / 100} for percent in (2, 5, 10)},
    **{f"rah-far-{percent}": {"mode": "greedy", "delta": percent / 100, "max_alpha": 1.0} for percent in (2, 5, 10)},
}
"""RAH-LoRA, the paper's controls and ablations of it, and our own: what differs from the run's settings. Numbers in names are ranks,
percentiles, and hundredths of a step or of a nat; a dot would divide the name where parameters are looked up.
"""

STEERING_ARMS: Mapping[str, Mapping[str, object]] = {
    "zero": {},
    "zero-exact": {"profile": "exact"},
    "zero-entropy": {"objective": "entropy"},
    "zero-transductive": {"objective": "entropy", "queries": "evaluation"},
    "zero-shallow": {"layers": (0.0, 1 / 3)},
    "zero-middle": {"layers": (1 / 3, 2 / 3)},
    "zero-deep": {"layers": (2 / 3, 1.0)},
    "zero-second-token": {"operator": "second_token"},
    "zero-key": {"operator": "key", "up": (1.02, 1.05, 1.1, 1.2), "down": (0.98, 0.95, 0.9, 0.8)},
    "act": {"operator": "sinks", "up": (), "down": (0.8, 0.6, 0.4, 0.2)},
    "auto-pasta": {"operator": "quotation", "up": (2.0, 5.0, 20.0, 100.0), "down": ()},
    "label-bias": {"readout": "bias"},
    "temperature": {"readout": "temperature"},
}
"""ZeroTuning, what it is compared with, and the controls that it has to beat: what differs from the run's settings."""

ARMS = (*LAYER_ARMS, *HEAD_ARMS, *STEERING_ARMS)


def known_arm(name: str) -> str:
    """The name itself. Raises ValueError naming the arms there are."""
    if name not in ARMS:
        raise ValueError(f"no arm {name!r}: it is one of {', '.join(ARMS)}")
    return name


def known_head_arm(name: str) -> str:
    """The name itself. Raises ValueError naming the arms of RAH-LoRA."""
    if name not in HEAD_ARMS:
        raise ValueError(f"{name!r} is no arm of RAH-LoRA: those are {', '.join(HEAD_ARMS)}")
    return name


HeadArm = Annotated[str, AfterValidator(known_head_arm), WithJsonSchema({"type": "string", "enum": list(HEAD_ARMS)})]
Arm = Annotated[str, AfterValidator(known_arm), WithJsonSchema({"type": "string", "enum": list(ARMS)})]
