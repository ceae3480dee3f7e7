"""The calibration step: data/images, data/selections/ARM -> data/adapters/ARM. Run it with `python -m tasks.calibration --arm top`."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from headwise.calibration.adapter import adapter_digest, parameter_count, prove_adapter, write_adapter
from headwise.calibration.lora import LOSSES, LoraFit, fit_lora
from headwise.calibration.settings import CALIBRATION, Lora, training_examples
from headwise.examples import INDEX, read_examples, write_bad
from headwise.files import new_folder, write_json, write_manifest, write_table
from headwise.observation import Observation
from headwise.selection import SELECTION_FILE, LayerArm, Selection, read_selection
from headwise.vlm import VLM, load_observed, revision
from tasks.command import plain_errors, read_settings
from tasks.progress import progress_bar

IMAGES, SELECTIONS, ADAPTERS = Path("data/images"), Path("data/selections"), Path("data/adapters")
SPLIT = "calibration"


def calibrate(images: Path, selection: Path, output: Path, observed: Observation, settings: Lora) -> None:
    """Train a LoRA on the selected layers with the calibration split, prove the folder by loading it, and write it.

    Beside the PEFT folder: losses.parquet, bad.parquet, calibration.json and manifest.json. Raises ValueError if the selection was made
    for another model, too many examples are bad, or the written adapter is not the trained one.
    """
    chosen = read_selection(selection)
    vlm = load_observed(observed)
    if chosen.num_layers != vlm.num_layers:
        raise ValueError(f"{selection}: chosen among {chosen.num_layers} layers, {observed.model} has {vlm.num_layers}")
    with progress_bar(f"calibration, arm {chosen.arm}") as progress:
        examples = training_examples(read_examples(images, SPLIT), settings)
        fit = fit_lora(vlm, images, examples, chosen.layers, settings, progress)
    with new_folder(output) as folder:
        write_adapter(fit.config, fit.weights, observed.model, folder)
        write_table(fit.losses, folder / "losses.parquet", LOSSES)
        write_bad(dict(fit.bad), folder)
        write_json(_calibration(vlm, fit, chosen, folder), folder / CALIBRATION)
        extra = {"arm": chosen.arm, "model": revision(observed.model), "dtype": str(vlm.dtype)}
        inputs = {"index": images / INDEX, "selection": selection}
        write_manifest(folder, stage="calibration", settings=settings, inputs=inputs, extra=extra)


def _calibration(vlm: VLM, fit: LoraFit, chosen: Selection, folder: Path) -> dict[str, object]:
    """calibration.json: what was trained, on what, and the differences that `prove_adapter` found."""
    found = parameter_count(folder)
    if found != fit.num_parameters:
        raise ValueError(f"{folder}: the adapter holds {found} parameters, {fit.num_parameters} were trained")
    return {
        "recipe": "lora",
        "layers": list(chosen.layers),
        "parameters": found,
        "examples": fit.num_examples,
        "bad": len(fit.bad),
        "first_loss": fit.losses["loss"][0],
        "last_loss": fit.losses["loss"][-1],
        "base_sha256": fit.base_sha256,
        "dtype": str(vlm.dtype).removeprefix("torch."),
        "adapter_sha256": adapter_digest(folder),
        "proof": asdict(prove_adapter(vlm, folder, fit.probe, fit.logits)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Calibrate the layers of the arm that the command line names."""
    parser = ArgumentParser(prog="python -m tasks.calibration", description=__doc__)
    parser.add_argument("--arm", choices=get_args(LayerArm), required=True, help="which selection to train")
    arm = parser.parse_args(arguments).arm
    selection = SELECTIONS / arm / SELECTION_FILE
    calibrate(IMAGES, selection, ADAPTERS / arm, read_settings("attention", Observation), read_settings("calibration", Lora))


if __name__ == "__main__":
    with plain_errors():
        main()
