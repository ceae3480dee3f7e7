"""How a step ends where something is wrong: one line for what Headwise refuses, a traceback for what nobody foresaw."""

import pytest

from headwise.masks.rle import runs
from headwise.vlm import encode
from tasks.command import plain_errors
from tests.tiny import tiny_lm


def test_what_headwise_refuses_is_one_line() -> None:
    with pytest.raises(SystemExit) as ended, plain_errors():
        runs("!")
    assert ended.value.code == "'!' is no character of COCO run lengths"


def test_what_nobody_foresaw_keeps_its_traceback_though_it_happens_on_our_line() -> None:
    with pytest.raises(IndexError, match="out of range"), plain_errors():
        encode(tiny_lm(), [], [])
