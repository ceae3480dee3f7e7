"""The head gains step: data/images, data/adapters/ARM -> data/gains/ARM. Run it with `python -m tasks.head_gains --arm rah`."""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from headwise.calibration.rah_lora.gains import head_gains
from headwise.calibration.rah_lora.schema import GAINS, GAINS_FILE
from headwise.evaluation.statistics import Statistics
from headwise.examples import INDEX, check_bad_share, read_examples, write_bad
from headwise.files import MANIFEST, new_folder, read_json, write_manifest, write_table
from headwise.observation import Observation
from headwise.profile.sample import draw_sample
from headwise.profile.settings import Profile
from headwise.vlm import load_vlm, revision
from tasks.command import plain_errors, read_settings
from tasks.progress import progress_bar

IMAGES, ADAPTERS, GAINS_FOLDER = Path("data/images"), Path("data/adapters"), Path("data/gains")
SPLIT = "evaluation"


def write_gains(images: Path, adapter: Path, output: Path, observed: Observation, drawn: Profile) -> None:
    """Measure what every accepted head of a RAH-LoRA adapter brings alone, and write gains.parquet, bad.parquet and manifest.json.

    On as many questions of the evaluation split as the profile has, drawn as those are, with their own images. Nothing is chosen by it.
    The model is read in float32, whatever the run has, which takes four bytes a weight: in bfloat16 an answer's nats vary by more than a
    head brings. Raises ValueError if the adapter is of another revision of the model, or more than `max_bad_share` of the questions is bad.
    """
    questions = draw_sample(read_examples(images, SPLIT), replace(drawn, pairs="own"))
    made = revision(observed.model)
    if (calibrated := read_json(adapter / MANIFEST)["model"]) != made:
        raise ValueError(f"{adapter}: calibrated revision {calibrated} of the model, {observed.model} has {made}: calibrate it again")
    vlm = load_vlm(observed.model, dtype="float32")
    with progress_bar(f"gains of the heads, arm {output.name}") as progress:
        gains, bad = head_gains(vlm, images, adapter, questions, observed.batch_size, Statistics(), progress)
    check_bad_share(bad, len(questions), observed.max_bad_share)
    with new_folder(output) as folder:
        write_table(gains, folder / GAINS_FILE, GAINS)
        write_bad(bad, folder)
        inputs = {"index": images / INDEX, "adapter": adapter}
        write_manifest(folder, stage="head_gains", settings=drawn, inputs=inputs, extra={"model": made})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the heads of the arm that the command line names."""
    parser = ArgumentParser(prog="python -m tasks.head_gains", description=__doc__)
    parser.add_argument("--arm", required=True, help="whose adapter")
    arm = parser.parse_args(arguments).arm
    observed, profile = read_settings("attention", Observation), read_settings("profile", Profile)
    write_gains(IMAGES, ADAPTERS / arm, GAINS_FOLDER / arm, observed, profile)


if __name__ == "__main__":
    with plain_errors():
        main()
