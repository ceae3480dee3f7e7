"""What the `headwise` command prints, and how it ends. Nothing heavy is imported before it is needed."""

import contextlib
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from flows.nightly import Result

WIDTH = 120
BAD_INPUT, FAILED, INTERRUPTED, TERMINATED = 2, 1, 128 + signal.SIGINT, 128 + signal.SIGTERM


def show_result(result: "Result") -> None:
    """A night's end: before and after, the sentence, what was recomputed, and where the report is."""
    from flows.artifacts import RESULT_COLUMNS, before_after_rows

    print_table("Before and after", RESULT_COLUMNS, before_after_rows(result.comparisons))
    out = console()
    out.print(result.sentence, markup=False, highlight=False)
    for arm, reason in result.failed.items():
        out.print(f"{arm} was left out: {reason}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"recomputed: {', '.join(result.recomputed) or 'nothing'}", markup=False, highlight=False)
    out.print(f"report: {result.report}", markup=False, highlight=False, soft_wrap=True)


def console() -> Console:
    """Standard output; in a file or a log, wide enough for the tables."""
    out = Console()
    return out if out.is_terminal else Console(width=WIDTH)


def print_table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A row per tuple, the title above."""
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*row)
    console().print(table)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Whatever ends a command early is one line on stderr and an exit code.

    2 for bad input, 1 for a step that failed, 130 for Ctrl-C, 143 for SIGTERM; every process group of a stage has ended by then, and the
    MLflow run is closed.
    """
    from flows.graph import Busy, StageFailed

    try:
        with _stoppable():
            yield
    except (StageFailed, Busy) as error:
        _fail(str(error), FAILED)
    except (ValueError, OSError) as error:
        _fail(str(error), BAD_INPUT)
    except KeyboardInterrupt:
        _fail("stopped by Ctrl-C; the same command goes on with the stage that it stopped in", INTERRUPTED)
    except SystemExit as stop:
        if stop.code != TERMINATED:
            raise
        _fail("stopped by SIGTERM; the same command goes on with the stage that it stopped in", TERMINATED)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM unwinds the block as SystemExit."""

    def stop(_number: int, _frame: object) -> NoReturn:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int) -> NoReturn:
    Console(stderr=True).print(f"headwise: {' '.join(message.split())}", style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)
