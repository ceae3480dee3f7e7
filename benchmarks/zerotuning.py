"""ZeroTuning's profile of SmolLM2-135M-Instruct on movie reviews (`make reviews`): one backward pass for all heads beside a pass for each.

`python benchmarks/zerotuning.py [EXAMPLES]` prints one JSON line last: the seconds of both on the same prompts, the median over paired
rounds for the backward pass, its share of the exact profile's time, and how the two agree.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr

from headwise.calibration.zerotuning.fit import draw_prompts
from headwise.calibration.zerotuning.settings import FIRST_TOKEN, ZeroTuning
from headwise.checkpoints import frozen
from headwise.data import DataSource, write_data
from headwise.examples import read_examples
from headwise.labels import label_sets
from headwise.observation import EMBEDDED_TEXT, Observation
from headwise.vlm import load_observed

ROUNDS = 3
Effect = Float[np.ndarray, "layer head"]


def timed(what: str, run: Callable[[], Effect]) -> tuple[Effect, float]:
    start = time.perf_counter()
    found = run()
    took = time.perf_counter() - start
    print(f"{what}: {took:.1f} s", file=sys.stderr, flush=True)
    return found, took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("examples", type=int, nargs="?", default=24)
    number = parser.parse_args().examples
    settings, observed = ZeroTuning(examples=number), Observation(model=EMBEDDED_TEXT, chat_template=False, dtype="float32")
    vlm = load_observed(observed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        write_data(DataSource(kind="texts", prompt="\nSentiment:", calibration=max(number, 200), evaluation=2), folder, lambda _, __: None)
        examples = read_examples(folder)
        asked = [example for example in examples if example.split == "calibration"]
        prompts = draw_prompts(vlm, folder, asked, label_sets(examples), settings, observed.batch_size).prompts
    with frozen(vlm.base):
        prompts.gradient("labels", FIRST_TOKEN)  # what is done once, such as the masks
        rounds = [timed("one backward pass", lambda: prompts.gradient("labels", FIRST_TOKEN)) for _ in range(ROUNDS)]
        exact, exact_s = timed("a pass for each head", lambda: prompts.exact("labels", settings.step, lambda _: None))
    gradient, gradient_s = rounds[0][0], statistics.median(took for _, took in rounds)
    correlation: Any = spearmanr(gradient.ravel(), exact.ravel())
    print(
        json.dumps(
            {
                "examples": number,
                "heads": exact.size,
                "gradient_s": round(gradient_s, 2),
                "exact_s": round(exact_s, 1),
                "share_percent": round(100 * gradient_s / exact_s, 2),
                "same_sign_percent": round(100 * float((np.sign(gradient) == np.sign(exact)).mean()), 1),
                "rank_correlation": round(float(correlation.statistic), 3),
                "dtype": str(vlm.dtype),
                "torch_threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
