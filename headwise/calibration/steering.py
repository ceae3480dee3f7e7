"""Calibrations that change no weight: a number per head and what is done with it, and how labels are read, in a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from headwise.attention.edits import Edits, steering
from headwise.attention.operators import OPERATORS, reweighting
from headwise.calibration.zerotuning.settings import FIRST_TOKEN, OperatorName
from headwise.files import read_json, write_json
from headwise.labels import Readout
from headwise.vlm import VLM

CONFIG, STEERING = "adapter_config.json", "steering.safetensors"
KIND = "HEADWISE_STEERING"
"""In the place of PEFT's type: plain PEFT refuses the folder by its name instead of reading it as something else."""
NAMES: tuple[OperatorName, ...] = get_args(OperatorName)
STRENGTH = "strength"


@dataclass(frozen=True)
class Steering:
    """What is done to attention. strength: `log gamma` of every head; 0 leaves it alone.

    operator: `first_token` adds it to the first token's score (ZeroTuning), in any pass; the others are what that is compared with, in
    passes without a cache: `second_token`, `key` (the first token's key is scaled), `sinks` (ACT: what other tokens get far too much of),
    `quotation` (Auto-PASTA: what the model itself finds important).
    """

    operator: OperatorName
    strength: Float[Tensor, "layer head"]


@contextmanager
def steered(vlm: VLM, applied: Steering) -> Iterator[None]:
    """The model steered so inside the block."""
    if applied.operator == FIRST_TOKEN:
        with steering(vlm, Edits(first_bias=applied.strength)):
            yield
    else:
        with reweighting(vlm, OPERATORS[applied.operator], applied.strength):
            yield


def write_steering(applied: Steering, readout: Readout, vlm: VLM, model: str, folder: Path) -> None:
    """Write the folder; the bytes depend on these and on the model's name alone, on no path of this machine."""
    name = Path(model).resolve().name if Path(model).is_dir() else model
    about = {"peft_type": KIND, "base_model_name_or_path": name, "inference_mode": True}
    how = {"operator": applied.operator, "readout": TypeAdapter(Readout).dump_python(readout), "chat_template": vlm.has_template}
    write_json({**about, **how}, folder / CONFIG)
    save_file({STRENGTH: applied.strength.detach().float().cpu().contiguous()}, folder / STEERING)


def wants_template(folder: Path) -> bool:
    """Whether the adapter belongs on a model whose chat template writes the prompts; all do that change weights."""
    return not is_steering(folder) or bool(read_json(folder / CONFIG).get("chat_template"))


def is_steering(folder: Path) -> bool:
    """Whether the folder steers attention or reads labels otherwise, and is no PEFT adapter."""
    return (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("peft_type") == KIND


def read_steering(vlm: VLM, folder: Path) -> Steering:
    """What the folder does to attention, on the model's device. Raises ValueError if it cannot be read, is not known, is of another shape,
    holds what is no finite number, or was calibrated on prompts of another form.
    """
    config = read_json(folder / CONFIG)
    operator: Any = config.get("operator")
    if config.get("chat_template") is not vlm.has_template:
        raise ValueError(f"{folder}: calibrated with chat_template = {config.get('chat_template')}, the model has {vlm.has_template}")
    if operator not in NAMES:
        raise ValueError(f"{folder / CONFIG}: the operator {operator!r} is unknown; there are {', '.join(NAMES)}")
    try:
        tensors = load_file(folder / STEERING, str(vlm.device))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / STEERING}: cannot be read ({str(error).splitlines()[0]})") from error
    if set(tensors) != {STRENGTH}:
        raise ValueError(f"{folder / STEERING}: holds {sorted(tensors)}, and {STRENGTH} is needed")
    strength = tensors[STRENGTH]
    if strength.shape != (vlm.num_layers, vlm.num_heads):
        expected = f"{vlm.num_layers} layers of {vlm.num_heads} heads"
        raise ValueError(f"{folder / STEERING}: {STRENGTH} is of shape {tuple(strength.shape)}, the model has {expected}")
    if not bool(torch.isfinite(strength).all()):
        raise ValueError(f"{folder / STEERING}: {STRENGTH} has values that are not finite numbers")
    return Steering(operator, strength)


def read_readout(folder: Path | None) -> Readout:
    """How labels are read under an adapter: as they are, unless it is a folder that says otherwise. Raises ValueError if it is unclear."""
    if folder is None or not is_steering(folder):
        return Readout()
    try:
        return TypeAdapter(Readout).validate_python(read_json(folder / CONFIG).get("readout", {}))
    except ValidationError as error:
        raise ValueError(f"{folder / CONFIG}: readout: {error.errors()[0]['msg']}") from error
