"""Adapters on disk: a PEFT folder, what identifies it, and the proof that it is what was trained."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from headwise.calibration.settings import CALIBRATION
from headwise.calibration.steering import CONFIG, STEERING, is_steering, read_readout, read_steering, steered, wants_template
from headwise.calibration.zerotuning.settings import generates
from headwise.checkpoints import restored_flags
from headwise.files import new_folder, read_json, sha256_file, write_json
from headwise.labels import Readout
from headwise.likelihood import answer_logits
from headwise.vlm import VLM, Batch, load_vlm, with_adapter

WEIGHTS = "adapter_model.safetensors"
HELD = "_headwise_adapter"
"""Where a model keeps what takes its adapter off again."""
LOADED_TOLERANCE = 1e-5
"""Largest difference of a logit between the trained model and the loaded folder; times the largest logit where that is above 1."""
MERGED_TOLERANCE = 1e-4
"""The same between merged and unmerged weights, in fp32. Seen: 1e-5 with logits up to 5 in the tests' small model; with the embedded one
2e-6 of the largest logit."""


@dataclass(frozen=True)
class Proof:
    """Largest differences of the answer's logits: of the loaded folder from the trained model, and of the folder merged from the folder
    unmerged (fp32); beside them the largest logit, as fp32 rounds relative to it. All are absolute values."""

    loaded: float
    merged: float
    largest: float


def write_adapter(config: LoraConfig, weights: Mapping[str, Tensor], model: str, folder: Path) -> None:
    """Write the PEFT folder; the bytes depend on the adapter and the model's name alone, on no path of this machine.

    Of a model in a folder that is the folder's name: PEFT loads the adapter onto the model that it is given, and which one it has to be
    stands in calibration.json (`base_sha256`).
    """
    name = Path(model).resolve().name if Path(model).is_dir() else model
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    content = {**fields, "base_model_name_or_path": name, "inference_mode": True}
    write_json(content, folder / CONFIG)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def load_calibrated(model: str, folder: Path) -> VLM:
    """The base model in the type and with the form of prompts that it was calibrated in, proved to be the one of calibration.json, with the
    adapter on it.

    Raises ValueError with both digests if the model has other weights than the adapter was trained on, or if the adapter only changes how
    labels are told apart, or works in passes without a cache alone.
    """
    if read_readout(folder) != Readout():
        raise ValueError(f"{folder}: changes how labels are told apart and no answer, so there is no model to load")
    calibration: dict[str, Any] = read_json(folder / CALIBRATION)
    if not generates(calibration):
        raise ValueError(f"{folder}: {calibration['operator']} is steered in passes without a cache alone, so the model cannot generate")
    vlm = load_vlm(model, dtype=calibration["dtype"], chat_template=wants_template(folder))
    expected, found = calibration["base_sha256"], weights_digest(vlm.base)
    if found != expected:
        raise ValueError(
            f"{model}: the weights have sha256 {found}, the adapter was trained on {expected}: give the model that it belongs to, or "
            "calibrate this one"
        )
    return load(vlm, folder)


def export_merged(model: str, folder: Path, out: Path) -> None:
    """Write the model with the adapter merged into its weights as a plain transformers folder, for software that knows no adapters.

    Merged in fp32 and rounded once to the type of the calibration. Raises ValueError if the adapter was trained on another model, or
    changes no weights.
    """
    if is_steering(folder):
        raise ValueError(f"{folder}: steers attention and changes no weights, so there is nothing to merge: load it onto the model instead")
    vlm = load_calibrated(model, folder)
    assert isinstance(vlm.model, PeftModel)
    dtype: Any = vlm.dtype
    merged: Any = vlm.model.float().merge_and_unload()
    with new_folder(out) as new:
        merged.to(dtype).save_pretrained(new)
        vlm.processor.save_pretrained(new)


def adapter_digest(folder: Path) -> str:
    """SHA-256 of the adapter: of the digests of its configuration and its weights, whatever else lies in the folder."""
    lines = "".join(f"{sha256_file(folder / name)}  {name}\n" for name in (CONFIG, weights_name(folder)))
    return hashlib.sha256(lines.encode()).hexdigest()


def parameter_count(folder: Path) -> int:
    """How many numbers the adapter's weights hold, from the header alone."""
    with safe_open(folder / weights_name(folder), "pt") as weights:
        return sum(prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118 - no mapping


def weights_name(folder: Path) -> str:
    """The file that holds what the adapter changes."""
    return STEERING if is_steering(folder) else WEIGHTS


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of every parameter and buffer with its name, type and shape."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load(vlm: VLM, folder: Path) -> VLM:
    """The model with the adapter on it, a PEFT folder or one that steers attention, until `unload` takes it off again.

    It works in forward passes and in generation, by Headwise or by plain transformers on `vlm.base`; steering by another operator than
    `first_token` in passes without a cache alone. One thread at a time may run a model that is steered. Raises ValueError if the folder is
    neither, or for another model, or if the model has an adapter already.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder}: no {CONFIG} here, so it is no adapter")
    if HELD in vlm.base.__dict__:
        raise ValueError(f"{folder}: the model has an adapter already: unload it first")
    with ExitStack() as held:
        adapted = vlm
        if is_steering(folder):
            held.enter_context(steered(vlm, read_steering(vlm, folder)))
        else:
            held.enter_context(restored_flags(vlm.base))
            model = with_adapter(vlm.base, folder).eval()
            held.callback(model.unload)  # called by `unload` alone: a process that ends with the adapter on just ends
            adapted = replace(vlm, model=model)
        vlm.base.__dict__[HELD] = held.pop_all()
    return adapted


def unload(vlm: VLM) -> VLM:
    """The model as it was before `load`, to the bit. Raises ValueError if nothing was loaded."""
    if HELD not in vlm.base.__dict__:
        raise ValueError("the model has no adapter that was loaded by headwise.calibration.adapter.load")
    base = vlm.base
    base.__dict__.pop(HELD).close()
    return replace(vlm, model=base)


@contextmanager
def attached(vlm: VLM, folder: Path) -> Iterator[VLM]:
    """The model with the adapter on it inside the block, so merge it on a copy only. Raises ValueError as `load`."""
    adapted = load(vlm, folder)
    try:
        yield adapted
    finally:
        unload(adapted)


def prove_adapter(vlm: VLM, folder: Path, batch: Batch, trained: Float[Tensor, "target vocabulary"]) -> Proof:
    """Prove that the folder, loaded by plain PEFT on the plain model, is the model that was trained and can be merged.

    trained: that model's `answer_logits` on the batch. The merge is tried on a copy of the model in fp32, which needs its memory. Raises
    ValueError naming the folder and the difference where one is above its tolerance.
    """
    with torch.no_grad():
        with attached(vlm, folder) as adapted:
            loaded = _difference(answer_logits(adapted, batch), trained)
        with attached(replace(vlm, model=deepcopy(vlm.base).float()), folder) as precise:
            unmerged = answer_logits(precise, batch)
            assert isinstance(precise.model, PeftModel)
            precise.model.merge_adapter()
            merged = _difference(answer_logits(precise, batch), unmerged)
    largest = float(unmerged.abs().max())
    for what, found, tolerance in (("loaded", loaded, LOADED_TOLERANCE), ("merged", merged, MERGED_TOLERANCE)):
        allowed = tolerance * max(1.0, largest)
        if not found <= allowed:
            raise ValueError(
                f"{folder}: {what}, the adapter's logits are off by {found:.2g}, allowed is {allowed:.2g} (the largest is {largest:.3g})"
            )
    return Proof(loaded, merged, largest)


def _difference(found: Float[Tensor, "target vocabulary"], expected: Float[Tensor, "target vocabulary"]) -> float:
    return float((found.float() - expected.float()).abs().max())
