"""What a person sees: log lines above a bar, errors of one line."""

import io
import logging

import pytest
from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console

import flows.terminal
from flows.terminal import stage_bar, without_tracebacks


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def logger(stream: io.StringIO):
    handler = PrefectConsoleHandler(stream)  # pyright: ignore[reportArgumentType]
    handler.setFormatter(logging.Formatter("%(message)s"))
    found = logging.getLogger("terminal-test")
    found.addHandler(handler)
    found.propagate = False
    yield found
    found.removeHandler(handler)


def test_an_error_is_one_line_on_the_terminal_and_whole_elsewhere(logger: logging.Logger, stream: io.StringIO) -> None:
    elsewhere = io.StringIO()
    other = logging.StreamHandler(elsewhere)
    logger.addHandler(other)
    with without_tracebacks():
        try:
            raise ValueError("broken")
        except ValueError:
            logger.exception("it failed")
    logger.removeHandler(other)
    assert stream.getvalue().strip() == "it failed" and "Traceback" in elsewhere.getvalue()


def test_log_lines_go_above_the_bar(logger: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(flows.terminal, "Console", lambda **_: Console(file=shown, force_terminal=True, width=80))
    with stage_bar(2) as show:
        show("images")
        logger.warning("a line of the log")
        show("masks")
    assert "a line of the log" in shown.getvalue() and "masks" in shown.getvalue() and "1/2" in shown.getvalue()


def test_without_a_terminal_nothing_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    with stage_bar(2) as show:
        show("images")
    assert capsys.readouterr() == ("", "")
