"""One progress bar for every step, on the terminal and, line by line, in a log."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function of (done, total). On a terminal it draws a bar; elsewhere it prints every tenth of the way."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _printer(description)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _printer(description: str) -> Callable[[int, int], None]:
    printed = -1

    def show(done: int, total: int) -> None:
        nonlocal printed
        tenth = 10 * done // max(total, 1)
        if tenth > printed or done == 0:  # another part of the work begins
            printed = tenth
            print(f"{description}: {done} of {total}", flush=True)

    return show
