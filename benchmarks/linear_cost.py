"""Cost grows linearly: the attention and the score step on N and on 4 N examples of drawn scenes, alternating, in processes of their own.

`python benchmarks/linear_cost.py [N]`; prints one JSON line last: per step the median ratio of the times, loading the model included, and
the peak memory of both sides.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from headwise.data import DataSource, write_data
from headwise.masks.settings import Masks
from headwise.observation import Observation
from headwise.scores.head_impact import HeadImpact
from tasks.attention import write_attention
from tasks.masks import write_masks
from tasks.scores import write_scores

ROUNDS = 3


def step(name: str, root: Path, examples: int) -> None:
    """One step in this process; its seconds and its peak memory go to standard output."""
    start = time.perf_counter()
    if name == "attention":
        write_attention(root / "images", root / f"attention-{examples}" / "shard=00", Observation(max_examples=examples), 0, 1)
    else:
        write_scores([root / "masks"], [root / f"attention-{examples}" / "shard=00"], root / f"scores-{examples}", HeadImpact())
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def measured(name: str, root: Path, examples: int) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "step", name, str(root), str(examples)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(number: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "images").mkdir()
        write_data(DataSource(calibration=number, evaluation=2, forgetting=2), root / "images", lambda done, total: None)
        write_masks(root / "images", root / "masks", Masks(source="exact"), 0, 1)
        rows = []
        for name in ("attention", "scores"):
            few, many = [], []
            for _ in range(ROUNDS):
                few.append(measured(name, root, number))
                many.append(measured(name, root, 4 * number))
            ratios = [b["seconds"] / a["seconds"] for a, b in zip(few, many, strict=True)]
            memory = {key: round(max(run["megabytes"] for run in runs)) for key, runs in (("few", few), ("many", many))}
            rows.append(
                {"step": name, "examples": [number, 4 * number], "time_ratio": round(statistics.median(ratios), 3), "megabytes": memory}
            )
            print(rows[-1], flush=True)
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["step"]:
        step(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
