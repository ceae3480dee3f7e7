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
    **{f"rah-rank-{rank or 'full'}": {"rank": rank} for rank in (4, 16, 32, 0)},
    **{f"rah-percentiles-{p_isal}-{p_caf}": {"p_isal": p_isal, "p_caf": p_caf} for p_isal, p_caf in PERCENTILES},
    "rah-middle-layers": {"layers": (0.375, 0.75)},
    "rah-upper-layers": {"layers": (0.5, 1.0)},
    "rah-all-layers": {"layers": (0.0, 1.0)},
    **{f"rah-alpha-{alpha:.2f}": {"max_alpha": alpha} for alpha in (0.30, 0.60, 1.00)},
    **{f"rah-greedy-{delta:.2f}": {"mode": "greedy", "delta": delta} for delta in (0.02, 0.05, 0.10)},
    **{f"rah-far-{delta:.2f}": {"mode": "greedy", "delta": delta, "max_alpha": 1.0} for delta in (0.02, 0.05, 0.10)},
}
"""RAH-LoRA, the paper's controls and ablations of it, and our own: what differs from the run's settings."""

ARMS = (*LAYER_ARMS, *HEAD_ARMS)


def known_arm(name: str) -> str:
    """The name itself. Raises ValueError naming the arms there are."""
    if name not in ARMS:
        raise ValueError(f"no arm {name!r}: it is one of {', '.join(ARMS)}")
    return name


Arm = Annotated[str, AfterValidator(known_arm), WithJsonSchema({"type": "string", "enum": list(ARMS)})]
