"""The ZeroTuning step: data/images -> data/adapters/ARM. Run it with `python -m tasks.zerotuning --arm zero`."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from headwise.calibration.adapter import CALIBRATION, adapter_digest, attached, parameter_count, weights_digest
from headwise.calibration.steering import write_steering
from headwise.calibration.zerotuning.fit import ZeroFit, draw_prompts, first_token, fit_zerotuning
from headwise.calibration.zerotuning.measure import Prompts
from headwise.calibration.zerotuning.schema import HEADS, HEADS_FILE, TRIALS, TRIALS_FILE
from headwise.calibration.zerotuning.settings import FIRST_TOKEN, ZeroTuning
from headwise.examples import CAPTION, INDEX, check_bad_share, read_examples, write_bad
from headwise.files import new_folder, write_json, write_manifest, write_table
from headwise.labels import MOST_LABELS, label_sets
from headwise.observation import Observation
from headwise.vlm import load_observed, revision
from tasks.command import plain_errors, read_settings
from tasks.progress import progress_bar

IMAGES, ADAPTERS = Path("data/images"), Path("data/adapters")
PROBED = 8
"""Prompts by which a written folder is proved."""


def calibrate(images: Path, output: Path, observed: Observation, settings: ZeroTuning) -> None:
    """Find out which heads to steer, or how to read labels, on closed questions, prove the folder by loading it, and write it.

    Beside the steering: heads.parquet, trials.parquet, bad.parquet, calibration.json and manifest.json. A task's labels are all answers
    that the data have for it. Raises ValueError as `draw_prompts`, if the operator cannot generate and a task is answered freely, or if
    more than `max_bad_share` of the prompts is bad.
    """
    every = [example for example in read_examples(images) if example.task != CAPTION]
    labels = label_sets(every)
    if settings.operator != FIRST_TOKEN and (free := sorted({example.task for example in every} - labels.keys())):
        raise ValueError(
            f"the operator {settings.operator!r} works in passes without a cache alone, and task {free[0]!r} is answered freely: it has "
            f"one answer, or more than {MOST_LABELS}"
        )
    vlm, made = load_observed(observed), revision(observed.model)
    asked = [example for example in every if example.split == settings.queries]
    drawn = draw_prompts(vlm, images, asked, labels, settings, observed.batch_size)
    prompts = drawn.prompts
    check_bad_share(drawn.bad, len(drawn.bad) + len(prompts.examples), observed.max_bad_share)
    for reason in drawn.left_out.values():
        print(f"left out: {reason}", flush=True)
    with progress_bar(f"ZeroTuning, arm {output.name}") as progress:
        fit = fit_zerotuning(prompts, settings, progress)
    with new_folder(output) as folder:
        write_steering(fit.applied, fit.readout, vlm, observed.model, folder)
        write_table(fit.heads, folder / HEADS_FILE, HEADS)
        write_table(fit.trials, folder / TRIALS_FILE, TRIALS)
        write_bad(drawn.bad, folder)
        how = {"objective": settings.objective, "queries": settings.queries, "readout": settings.readout}
        write_json({**_calibration(prompts, fit, folder), **how, "left_out": dict(drawn.left_out)}, folder / CALIBRATION)
        extra = {"arm": output.name, "model": made, "dtype": str(vlm.dtype)}
        write_manifest(folder, stage="zerotuning", settings=settings, inputs={"index": images / INDEX}, extra=extra)


def _calibration(prompts: Prompts, fit: ZeroFit, folder: Path) -> dict[str, object]:
    """calibration.json: what was chosen, what it cost, and that the folder, loaded, does to the first prompts what was calibrated."""
    vlm, probe = prompts.vlm, prompts.first(PROBED)
    with attached(vlm, folder):
        loaded = probe.measure(None).entropy
    off = float(np.abs(loaded - probe.measure(fit.applied).entropy).max())
    if not off == 0:  # NaN is none either
        raise ValueError(f"{folder}: loaded, the entropies of the first prompts are off by {off:.2g} from what was calibrated")
    return {
        "recipe": "zerotuning",
        "operator": fit.applied.operator,
        **(asdict(fit.chosen) if fit.chosen else {"direction": None, "share": 0.0, "gamma": 1.0}),
        "heads": int((fit.applied.strength != 0).sum()),
        "first_token": first_token(prompts),
        "forward_equivalents": dict(fit.forward_equivalents),
        "parameters": parameter_count(folder),
        "examples": len(prompts.examples),
        "base_sha256": weights_digest(vlm.base),
        "dtype": str(vlm.dtype).removeprefix("torch."),
        "adapter_sha256": adapter_digest(folder),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Calibrate the arm that the command line names."""
    parser = ArgumentParser(prog="python -m tasks.zerotuning", description=__doc__)
    parser.add_argument("--arm", required=True, help="one of params.yaml's `steering_arms`; `steering_changes` has what is different in it")
    arm = parser.parse_args(arguments).arm
    settings = replace(read_settings("zerotuning", ZeroTuning), **read_settings(f"steering_changes.{arm}", dict[str, Any]))
    calibrate(IMAGES, ADAPTERS / arm, read_settings("attention", Observation), settings)


if __name__ == "__main__":
    with plain_errors():
        main()
