import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headwise.examples import Example
from headwise.masks.annotation import LONGEST_SIDE, Pictured, Row, annotate, as_frame
from tests.flows.project import ROOT
from tests.masks.dataset import question, write_dataset


def sizes(window: list[Pictured], bad: dict[str, str]) -> list[Row]:
    return [shown.row(example, source=f"{shown.image.width} x {shown.image.height}") for shown in window for example in shown.examples]


def annotated(
    folder: Path, examples: list[Example], at_once: int = 2
) -> tuple[list[tuple[object, ...]], dict[str, str], list[tuple[int, int]]]:
    bad: dict[str, str] = {}
    heard: list[tuple[int, int]] = []
    frame = as_frame(annotate(sizes, folder, examples, at_once, bad, lambda done, total: heard.append((done, total))))
    return frame.select("example_id", "width", "height", "source").rows(), bad, heard


def test_images_come_in_order_a_few_at_a_time(tmp_path: Path) -> None:
    examples = write_dataset(tmp_path, 5)
    rows, bad, heard = annotated(tmp_path, examples[::-1])
    assert [row[0] for row in rows] == sorted(example.id for example in examples) and not bad
    assert heard == [(0, 5), (2, 5), (4, 5), (5, 5)]


def test_an_image_that_cannot_be_read_makes_its_examples_bad(tmp_path: Path) -> None:
    examples = write_dataset(tmp_path, 2)
    (tmp_path / "images/001.png").write_bytes(b"no picture")
    rows, bad, _ = annotated(tmp_path, [*examples, question("text", None, None)])
    assert {row[0] for row in rows} == {"000-q", "000-c"}
    assert set(bad) == {"001-q", "001-c", "text"} and "sha256" in bad["001-q"] and "no image" in bad["text"]


def megabytes(name: str) -> int:
    """Of this process: resident now (VmRSS), or at most (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) >> 10


SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
from tests.masks.test_annotation import annotated, megabytes, question
before = megabytes("VmRSS")
rows, bad, _ = annotated(Path(sys.argv[1]), [question(f"q{n}", "large.png", "cat") for n in range(3)])
opened = megabytes("VmHWM") - before
import torch
from headwise.masks.sam2 import segment
from tests.masks.test_sam2 import Fixed, pictured
before = megabytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
large = replace(pictured(9, 12), height=9000, width=12000)
found = segment(Fixed(torch.ones(2, 4, 4), [1.0, 1.0]), [large], [[(0, 0, 1, 1), (0, 0, 0.5, 1)]], 1)[0]
areas = [mask.area for mask in found.values()]
print(rows, bad, opened, areas, megabytes("VmHWM") - before, sep="|")
"""


def test_an_image_of_108_megapixels_takes_bounded_memory(tmp_path: Path) -> None:
    """Its pixels take 309 MB; they lie there twice while they are decoded."""
    width, height = 12_000, 9_000
    Image.new("L", (width, height), 7).save(tmp_path / "large.png")
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True)
    rows, bad, opened, areas, segmented = done.stdout.strip().split("|")
    assert rows == str([(f"q{n}", width, height, f"{LONGEST_SIDE} x {LONGEST_SIDE * 3 // 4}") for n in range(3)]) and bad == "{}"
    assert areas == "[1.0, 1.0]"
    assert 300 < int(opened) < 1000 and 300 < int(segmented) < 1500, "the second: logits, a mask, and its bytes, one mask at a time"


@pytest.mark.parametrize(("size", "shown"), [((1, 1), (1, 1)), ((2048, 3), (2048, 3)), ((20_000, 2), (2048, 1))])
def test_only_what_is_longer_is_made_smaller(tmp_path: Path, size: tuple[int, int], shown: tuple[int, int]) -> None:
    Image.fromarray(np.zeros(size[::-1], dtype=np.uint8)).save(tmp_path / "image.png")
    rows, _, _ = annotated(tmp_path, [question("q", "image.png", "cat")])
    assert rows == [("q", *size, f"{shown[0]} x {shown[1]}")]
