"""The RAH-LoRA step: data/images, data/profile -> data/adapters/ARM. Run it with `python -m tasks.rah_lora --arm rah`."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import polars as pl

from headwise.calibration.adapter import adapter_digest, parameter_count, prove_adapter, write_adapter
from headwise.calibration.rah_lora.fit import RahFit, fit_rah_lora
from headwise.calibration.rah_lora.schema import CURVE, CURVE_FILE, TARGETS, TARGETS_FILE, TRIALS, TRIALS_FILE
from headwise.calibration.rah_lora.settings import RahLora
from headwise.calibration.settings import CALIBRATION
from headwise.examples import INDEX
from headwise.files import MANIFEST, new_folder, read_json, write_json, write_manifest, write_table
from headwise.observation import Observation
from headwise.profile.schema import PROFILE_FILE
from headwise.profile.table import read_profile
from headwise.vlm import VLM, load_observed, revision
from tasks.command import plain_errors, read_settings
from tasks.progress import progress_bar

IMAGES, PROFILE, ADAPTERS = Path("data/images"), Path("data/profile"), Path("data/adapters")


def calibrate(images: Path, profile: Path, output: Path, observed: Observation, settings: RahLora) -> None:
    """Calibrate the heads that the profile gives, prove the folder by loading it, and write it.

    Beside the PEFT folder: targets.parquet, trials.parquet, curve.parquet, calibration.json and manifest.json. Raises ValueError if the
    profile is of another model, the model is quantised, or the written adapter is not what was accepted.
    """
    vlm, made = load_observed(observed), revision(observed.model)
    if (profiled := read_json(profile / MANIFEST)["model"]) != made:
        raise ValueError(f"{profile}: made with revision {profiled} of the model, {observed.model} has {made}: make it again")
    with progress_bar(f"RAH-LoRA, arm {output.name}") as progress:
        fit = fit_rah_lora(vlm, images, read_profile(profile), settings, observed.batch_size, progress)
    with new_folder(output) as folder:
        write_adapter(fit.config, fit.weights, observed.model, folder)
        write_table(fit.targets, folder / TARGETS_FILE, TARGETS)
        write_table(fit.trials, folder / TRIALS_FILE, TRIALS)
        write_table(fit.curve, folder / CURVE_FILE, CURVE)
        write_json(_calibration(vlm, fit, settings, read_json(profile / PROFILE_FILE), folder), folder / CALIBRATION)
        extra = {"arm": output.name, "model": made, "dtype": str(vlm.dtype)}
        write_manifest(folder, stage="rah_lora", settings=settings, inputs={"index": images / INDEX, "profile": profile}, extra=extra)


def _calibration(vlm: VLM, fit: RahFit, settings: RahLora, profiled: dict[str, object], folder: Path) -> dict[str, object]:
    """calibration.json: what became of the targets, how far the model went, what it cost, and what `prove_adapter` found."""
    outcomes = {name: int((fit.targets["outcome"] == name).sum()) for name in ("accepted", "rolled back", "skipped")}
    tried = outcomes["accepted"] + outcomes["rolled back"]
    spent: Any = profiled["forward_equivalents"]
    return {
        "recipe": "rah_lora",
        "trimmed_at_each_end": int(settings.tau * settings.anchors),
        "targets": len(fit.targets),
        **{name.replace(" ", "_"): number for name, number in outcomes.items()},
        "rollback_rate": outcomes["rolled back"] / tried if tried else None,
        "kl": fit.kl,
        **{name: fit.targets[name].mean() for name in ("effective_rank", "damping")},
        "forward_equivalents": {"profile": sum(spent.values()), "trust_region": fit.forward_equivalents},
        "layers": fit.targets.filter(pl.col("outcome") == "accepted")["layer"].unique().sort().to_list(),
        "parameters": parameter_count(folder),
        "examples": profiled["questions"],
        "base_sha256": fit.base_sha256,
        "dtype": str(vlm.dtype).removeprefix("torch."),
        "adapter_sha256": adapter_digest(folder),
        "proof": asdict(prove_adapter(vlm, folder, fit.probe, fit.logits)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Calibrate the heads of the arm that the command line names."""
    parser = ArgumentParser(prog="python -m tasks.rah_lora", description=__doc__)
    parser.add_argument("--arm", required=True, help="one of params.yaml's `head_arms`; `head_changes` says what is different in it")
    arm = parser.parse_args(arguments).arm
    settings = replace(read_settings("rah_lora", RahLora), **read_settings(f"head_changes.{arm}", dict[str, Any]))
    calibrate(IMAGES, PROFILE, ADAPTERS / arm, read_settings("attention", Observation), settings)


if __name__ == "__main__":
    with plain_errors():
        main()
