"""Boxes in answers, by hand."""

import pytest

from headwise.evaluation.boxes import box_rule, format_box, parse_box
from headwise.examples import Example


@pytest.mark.parametrize(
    ("answer", "box"),
    [
        ("[0.1, 0.2, 0.5, 0.6]", (0.1, 0.2, 0.5, 0.6)),
        ("It is at [0, 0, 1, 1].", (0, 0, 1, 1)),
        ("(100,200),(500,600)", (0.1, 0.2, 0.5, 0.6)),  # Qwen2-VL's thousandths
        ("<ref>dog</ref><box>[[100, 200, 500, 600]]</box>", (0.1, 0.2, 0.5, 0.6)),  # InternVL's
        ("<loc0256><loc0128><loc0768><loc0512> dog", (0.125, 0.25, 0.5, 0.75)),  # PaliGemma's: y first, of 1,024
        ("0.1 0.2 0.5 0.6 and 0.3 0.3 0.4 0.4", (0.1, 0.2, 0.5, 0.6)),  # the first
        ("[0.12, 0.33, 0.98, 1.01]", (0.12, 0.33, 0.98, 1)),  # overhangs by little
        ("[0.5000, 0.2000, 1.0008, 0.9000]", (0.5, 0.2, 1, 0.9)),
        ("[12.5, 20.0, 300.5, 400.0]", None),  # pixels, with fractions: of what size nobody knows
        ("[0.5, 0.2, 0.1, 0.6]", None),  # no area
        ("[0.1, 0.2, 0.1, 0.6]", None),
        ("[0.1, 0.2, 0.5]", None),
        ("[-0.1, 0.2, 0.5, 0.6]", None),
        ("[100, 200, 1500, 600]", None),  # beyond thousandths
        ("on the left", None),
        ("", None),
    ],
)
def test_which_box_an_answer_gives(answer: str, box: tuple[float, ...] | None) -> None:
    assert parse_box(answer) == (None if box is None else pytest.approx(box))


@pytest.mark.parametrize(
    ("answer", "iou"),
    [
        ("[0, 0, 0.5, 1]", 1.0),
        ("[0, 0, 1, 1]", 0.5),  # exactly one half is right
        ("[0, 0, 0.25, 1]", 0.5),
        ("[0.25, 0, 0.75, 1]", 1 / 3),
        ("[0.5, 0, 1, 1]", 0.0),
        ("nowhere", 0.0),
    ],
)
def test_iou_by_hand(answer: str, iou: float) -> None:
    example = Example("q", "a.jpg", None, "where?", (format_box((0, 0, 0.5, 1)),), "dog", "val", "refcoco")
    judged = box_rule(answer, example)
    assert (judged.part, judged.whole, judged.right) == (pytest.approx(iou), 1, float(iou >= 0.5))
    assert judged.valid is (answer != "nowhere")


def test_a_reference_that_is_no_box_is_named() -> None:
    with pytest.raises(ValueError, match="example q: the reference 'left' is no box"):
        box_rule("[0, 0, 1, 1]", Example("q", None, None, "where?", ("left",), None, "val", "refcoco"))
