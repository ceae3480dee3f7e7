"""The profile step: data/images -> data/profile. Run it with `python -m tasks.profile`."""

from pathlib import Path

from headwise.attention.proof import proved
from headwise.examples import INDEX, check_bad_share, read_examples, write_bad
from headwise.files import new_folder, write_json, write_manifest
from headwise.observation import Observation
from headwise.profile.measure import profile_heads
from headwise.profile.saliency import layer_z_scores, rank_correlation, top_overlap
from headwise.profile.sample import draw_sample
from headwise.profile.schema import PROFILE_FILE
from headwise.profile.settings import Profile
from headwise.profile.table import read_profile, write_profile
from headwise.vlm import load_observed, revision
from tasks.command import plain_errors, read_settings
from tasks.progress import progress_bar

IMAGES, PROFILE = Path("data/images"), Path("data/profile")
SPLIT = "calibration"


def write_head_profile(images: Path, output: Path, observed: Observation, settings: Profile) -> None:
    """Profile the heads on unlabelled questions of the calibration split, and write heads.parquet, sample.parquet, cosines.safetensors,
    profile.json, bad.parquet and manifest.json.

    Raises ValueError if the model cannot be proved, no example has an image, a head's attention is not a number, or more than
    `max_bad_share` of the questions is bad.
    """
    questions = draw_sample(read_examples(images, SPLIT), settings)
    vlm, made = load_observed(observed), revision(observed.model)
    figures = proved(vlm, made)
    print("proved:", ", ".join(f"{name} {figure:.1e}" for name, figure in figures.items()), flush=True)
    with progress_bar("profile of the heads") as progress:
        found = profile_heads(vlm, images, questions, settings, observed.batch_size, progress)
    check_bad_share(found.bad, len(questions), observed.max_bad_share)
    with new_folder(output) as folder:
        write_profile(found, folder)
        write_bad(found.bad, folder)
        profile = read_profile(folder)
        flows = {"absolute": profile.caf, "signed": profile.caf_signed}
        correlations = {name: rank_correlation(layer_z_scores(flow), profile.isal) for name, flow in flows.items()}
        summary = {
            "questions": len(profile.sample),
            "forward_equivalents": found.forward_equivalents,
            "isal_caf_rank_correlation": correlations,
            "caf_signed_overlap": top_overlap(profile.caf, profile.caf_signed),
        }
        write_json(summary, folder / PROFILE_FILE)
        extra = {"model": made, "dtype": str(vlm.dtype)}
        write_manifest(folder, stage="profile", settings=settings, inputs={"index": images / INDEX}, extra=extra)


if __name__ == "__main__":
    with plain_errors():
        write_head_profile(IMAGES, PROFILE, read_settings("attention", Observation), read_settings("profile", Profile))
