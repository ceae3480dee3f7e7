"""The progress that a log shows."""

import pytest

from tasks.progress import progress_bar


def test_every_tenth_is_a_line_and_so_is_the_beginning_of_each_part(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("heads") as progress:
        for total in (20, 3):
            for done in range(total + 1):
                progress(done, total)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [*(f"heads: {done} of 20" for done in range(0, 21, 2)), *(f"heads: {done} of 3" for done in range(4))]
