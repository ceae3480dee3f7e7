"""Masks a second: Florence-2-base and SAM 2.1 tiny at their true sizes with random weights, batched against one image at a time.

`python benchmarks/masks.py [IMAGES]` prints one JSON line last: images per second of both sides, the median of their ratios over paired
runs, and the peak memory with IMAGES and with four times as many. Images are 1,024 x 768 noise with a question each. Florence-2 writes as
many tokens as it may, since random weights write no boxes, and what SAM 2 gets is four boxes per image in their place. fp32 on a CPU,
bfloat16 on a GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Florence2ForConditionalGeneration, Florence2VisionConfig

from headwise.examples import Example
from headwise.masks.annotation import annotate
from headwise.masks.florence2 import Florence2
from headwise.masks.generated import GeneratedMasks
from headwise.masks.sam2 import Sam2Package, build, package_config
from headwise.masks.settings import Grounding, Masks, Segmentation
from headwise.masks.table import masks_writer
from tests.mask_models import florence_config, florence_processor

IMAGES, RUNS, TOKENS = 8, 3, 40
POSITIONS = 1024
BATCH = {"cpu": 8, "cuda": 16}
BOXES = "".join(f"a thing<loc_{x}><loc_{y}><loc_{x + 300}><loc_{y + 200}>" for x, y in ((50, 80), (400, 300), (600, 100), (200, 700)))


@dataclass(frozen=True)
class Boxed(Florence2):
    """Pays for every token, and then says four boxes."""

    def _write_batch(self, images: list[Image.Image], prompts: list[str]) -> list[str]:
        super()._write_batch(images, prompts)
        return [BOXES] * len(prompts)


def florence_base() -> tuple[Any, Any]:
    config = florence_config(768, 6, 12, Florence2VisionConfig(projection_dim=768), vocab_size=51289, positions=POSITIONS)
    model = Florence2ForConditionalGeneration(config)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    return model.eval(), florence_processor(768, POSITIONS)


def annotators(device: str) -> dict[str, GeneratedMasks]:
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    florence, processor = florence_base()
    florence = florence.to(device, dtype)
    sam2 = Sam2Package(build(package_config("sam2.1_hiera_tiny.pt")).to(device).eval(), dtype)
    found = {}
    for name, size in (("batched", BATCH[device]), ("one by one", 1)):
        grounding = Grounding(batch_size=size, max_new_tokens=TOKENS)
        masks = Masks(source="generated", grounding=grounding, segmentation=Segmentation(batch_size=size))
        found[name] = GeneratedMasks(Boxed(florence, processor, grounding), sam2, masks)
    return found


def write_images(folder: Path, number: int) -> list[Example]:
    rng = np.random.default_rng(0)
    examples = []
    for place in range(number):
        pixels = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((1024, 768)).save(folder / f"{place}.jpg")
        examples.append(
            Example(f"{place:05d}", f"{place}.jpg", None, "What is left of the thing?", ("a thing",), None, "vqa", "calibration")
        )
    return examples


def seconds(annotator: GeneratedMasks, folder: Path, examples: list[Example]) -> float:
    start = time.perf_counter()
    size = annotator.settings.segmentation.batch_size
    with masks_writer(folder / "masks.parquet") as writer:
        for table in annotate(annotator, folder, examples, size, {}, lambda _done, _all: None):
            writer.write_table(table)
    return time.perf_counter() - start


def peak_megabytes(images: int) -> int:
    """Where glibc gives large blocks back at once; else what it keeps of them grows the peak in the second batch."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run([sys.executable, __file__, str(images), "--peak"], check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout.splitlines()[-1])


def print_peak(annotator: GeneratedMasks, folder: Path, examples: list[Example], device: str) -> None:
    seconds(annotator, folder, examples)
    if device == "cuda":
        print(torch.cuda.max_memory_allocated() >> 20)
        return
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    print(int(peak.split()[1]) >> 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="?", type=int, default=IMAGES)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--peak", action="store_true", help="print the batched side's peak of memory in megabytes, nothing else")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        folder, both = Path(temporary), annotators(device)
        examples = write_images(folder, given.images)
        if given.peak:
            print_peak(both["batched"], folder, examples, device)
            return
        times: dict[str, list[float]] = {name: [] for name in both}
        for run in range(given.runs + 1):  # the first warms up
            for name, annotator in both.items():
                took = seconds(annotator, folder, examples)
                if run:
                    times[name].append(took)
                    print(f"{name}: {given.images / took:.3f} images per second", file=sys.stderr, flush=True)
    ratio = statistics.median(one / many for one, many in zip(times["one by one"], times["batched"], strict=True))
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    result = {
        "device": f"{device}, {name}",
        "images_per_second": {name: round(given.images / statistics.median(took), 4) for name, took in times.items()},
        "batched_over_one_by_one": round(ratio, 3),
        "peak_megabytes": {count: peak_megabytes(count) for count in (given.images, 4 * given.images)},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
