"""What a person at a terminal sees of a run: Prefect's log lines, and below them a bar that says which stage is going on."""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator

from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def stage_bar(total: int) -> Iterator[Callable[[str], None]]:
    """A bar over `total` stages; call what it yields with the name of each stage that starts. Nothing is drawn where no terminal is."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _name: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress, _log_above(progress):
        bar = progress.add_task("starting", total=total, completed=-1)

        def show(name: str) -> None:
            progress.update(bar, description=name, advance=1)

        yield show


@contextlib.contextmanager
def without_tracebacks() -> Iterator[None]:
    """On the terminal an error is one line; Prefect's own log of the run keeps the whole traceback."""
    handlers = _console_handlers()
    before = [handler.formatter for handler in handlers]
    for handler in handlers:
        handler.setFormatter(_OneLine(handler.formatter))
    try:
        yield
    finally:
        for handler, formatter in zip(handlers, before, strict=True):
            handler.setFormatter(formatter)


class _OneLine(logging.Formatter):
    """The inner formatter's text without the traceback."""

    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self.inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        """A copy is formatted: other handlers still get the traceback."""
        record = copy.copy(record)
        record.exc_info = record.exc_text = None
        return self.inner.format(record)


@contextlib.contextmanager
def _log_above(progress: Progress) -> Iterator[None]:
    """Print the log lines through the bar's console, which moves the bar out of their way."""
    handlers = _console_handlers()
    before = [handler.console for handler in handlers]
    for handler in handlers:
        handler.console = progress.console
    try:
        yield
    finally:
        for handler, console in zip(handlers, before, strict=True):
            handler.console = console


def _console_handlers() -> list[PrefectConsoleHandler]:
    loggers = [logging.getLogger(name) for name in ("", *logging.root.manager.loggerDict)]
    found = {id(handler): handler for logger in loggers for handler in logger.handlers if isinstance(handler, PrefectConsoleHandler)}
    return list(found.values())
