"""How a step ends where something is wrong: one line for what Headwise refuses, a traceback for what nobody foresaw."""

import numpy as np
import pytest

from headwise.masks.rle import runs
from tasks.command import plain_errors


def test_what_headwise_refuses_is_one_line() -> None:
    with pytest.raises(SystemExit) as ended, plain_errors():
        runs("!")
    assert ended.value.code == "'!' is no character of COCO run lengths"


def test_what_nobody_foresaw_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="could not be broadcast"), plain_errors():
        np.ones(3) + np.ones(4)
