"""Boxes in answers, as RefCOCO's comprehension asks for them (Yu et al. 2016; Kazemzadeh et al. 2014): IoU, right from one half on."""

import re

from headwise.evaluation.judgement import Judgement
from headwise.examples import Example
from headwise.masks.quality import Bounds, box_iou

MATCH = 0.5
BINS, THOUSAND = 1024, 1000
OVERHANG = 0.05
PLACES = re.compile(r"<loc(\d{4})>" * 4)
FOUR = re.compile(r"(-?\d+(?:\.\d+)?)[^\d.-]+" * 3 + r"(-?\d+(?:\.\d+)?)")


def parse_box(answer: str) -> Bounds | None:
    """The first box of an answer, as fractions of the image's sides (x0, y0, x1, y1); None where there is none or it has no area.

    Four numbers in a row: fractions, of which what overhangs the image by little is cut off; thousandths where all are whole and one is
    above 1 (Qwen2-VL, InternVL; pixels, which Qwen2.5-VL gives, cannot be told from them); four places of PaliGemma (`<loc0123>`: y before
    x, of 1,024).
    """
    if places := PLACES.search(answer):
        y0, x0, y1, x1 = (int(place) / BINS for place in places.groups())
    elif numbers := FOUR.search(answer):
        given = [float(number) for number in numbers.groups()]
        if max(given) > 1 and not any("." in number for number in numbers.groups()):
            given = [number / THOUSAND for number in given]
        elif max(given) <= 1 + OVERHANG:
            given = [min(number, 1.0) for number in given]
        x0, y0, x1, y1 = given
    else:
        return None
    return (x0, y0, x1, y1) if 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 else None


def format_box(box: Bounds) -> str:
    """Four fractions, as the reference of an example."""
    return f"[{', '.join(f'{side:.4f}' for side in box)}]"


def box_rule(answer: str, example: Example) -> Judgement:
    """Right from an IoU of one half on; the IoU itself as a part of 1; without a box 0 and invalid."""
    reference, box = parse_box(example.answers[0]), parse_box(answer)
    if reference is None:
        raise ValueError(f"example {example.id}: the reference {example.answers[0]!r} is no box")
    overlap = box_iou(box, reference) if box else 0.0
    return Judgement(float(overlap >= MATCH), box is not None, part=overlap, whole=1.0)
