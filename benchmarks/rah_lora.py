"""RAH-LoRA on the embedded model and 100 drawn scenes' questions: what each part costs, and what a divergence costs beside the obvious way.

`python benchmarks/rah_lora.py [EXAMPLES]` prints one JSON line last: seconds and forward equivalents of the profile and of both searches,
and for changes that begin in several layers the median ratio of the obvious way (edit the weights, run the whole model, put them back) to a
replay from the streams that are kept, over paired runs.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from headwise.calibration.rah_lora.fit import calibration_batches, fit_rah_lora
from headwise.calibration.rah_lora.settings import RahLora
from headwise.calibration.rah_lora.trust_region import TrustRegion, divergences
from headwise.calibration.rah_lora.updates import Factors
from headwise.checkpoints import frozen
from headwise.data import DataSource, write_data
from headwise.examples import read_examples
from headwise.likelihood import answer_logits, answer_targets
from headwise.observation import EMBEDDED, Observation
from headwise.profile.measure import profile_heads
from headwise.profile.sample import draw_sample
from headwise.profile.settings import Profile
from headwise.profile.table import read_profile, write_profile
from headwise.vlm import VLM, Batch, load_vlm

STARTS, RUNS = (0, 8, 14), 3
BATCH_SIZE = Observation().batch_size
T = TypeVar("T")


def timed(what: str, run: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    found = run()
    took = time.perf_counter() - start
    print(f"{what}: {took:.1f} s", file=sys.stderr, flush=True)
    return found, took


def quiet(_done: int, _total: int) -> None:
    pass


def whole_divergence(vlm: VLM, batches: Sequence[Batch], before: Sequence[torch.Tensor], path: str, factors: Factors) -> float:
    """The obvious way: the change in the weights, a pass of the whole model over every batch, and the weights as they were."""
    weight = vlm.base.get_submodule(path).weight
    assert isinstance(weight, torch.Tensor)
    kept = weight.clone()
    weight += (factors.up @ factors.down).to(weight.dtype)
    means = []
    for batch, own in zip(batches, before, strict=True):
        means.append(divergences(own, answer_logits(vlm, batch), answer_targets(batch).nonzero()[:, 0]))
    weight.copy_(kept)
    return float(torch.cat(means).mean())


def ratios(vlm: VLM, batches: Sequence[Batch], runs: int) -> dict[str, float]:
    """Per starting layer the median of the obvious way's time over a replay's."""
    region, found = TrustRegion(vlm, batches, STARTS, nullcontext, lambda _read: None), {}
    before = [answer_logits(vlm, batch) for batch in batches]
    for layer in STARTS:
        path = f"{vlm.family.decoder}.layers.{layer}.self_attn.o_proj"
        width = vlm.base.get_submodule(path).weight.shape[0]
        factors = Factors(*(0.01 * torch.randn(*shape, device=vlm.device) for shape in ((width, 8), (8, width))))
        pairs = []
        for _ in range(runs):
            _, replayed = timed(f"replay from layer {layer}", lambda: region.divergence({path: factors}, layer))  # noqa: B023
            _, whole = timed("whole model", lambda: whole_divergence(vlm, batches, before, path, factors))  # noqa: B023
            pairs.append(whole / replayed)
        found[str(layer)] = round(statistics.median(pairs), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", nargs="?", type=int, default=Profile().examples)
    parser.add_argument("--runs", type=int, default=RUNS)
    given = parser.parse_args()
    vlm, settings = load_vlm(EMBEDDED), replace(Profile(), examples=given.examples)
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = Path(temporary)
        write_data(DataSource(), folder / "images", quiet)
        questions = draw_sample(read_examples(folder / "images", "calibration"), settings)
        profiled, profile_s = timed("profile", lambda: profile_heads(vlm, folder / "images", questions, settings, BATCH_SIZE, quiet))
        write_profile(profiled, folder)
        profile = read_profile(folder)
        spent = {"profile": (profile_s, sum(profiled.forward_equivalents.values()))}
        for mode in ("joint", "greedy"):
            rah = RahLora(mode=mode)
            fit, took = timed(mode, lambda: fit_rah_lora(vlm, folder / "images", profile, rah, BATCH_SIZE, quiet))  # noqa: B023
            spent[mode] = (took, fit.forward_equivalents)
        batches = list(calibration_batches(vlm, folder / "images", profile.sample, BATCH_SIZE))
        with frozen(vlm.base):
            over = ratios(vlm, batches, given.runs)
    result = {
        "examples": len(profile.sample),
        "dtype": str(vlm.dtype),
        "seconds": {name: round(seconds, 1) for name, (seconds, _) in spent.items()},
        "forward_equivalents": {name: round(passes, 2) for name, (_, passes) in spent.items()},
        "whole_model_over_replay_from_layer": over,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
