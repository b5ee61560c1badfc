"""Progress bars of host loops, shown where somebody watches: in a terminal, on stderr, or under a notebook's cell.

Every public function that loops over batches or trainings on the host takes `progress=True`, and shows bars unless told
not to.  Nothing is written where nobody watches, by any but the first of several processes, or for one batch.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import jax

T = TypeVar("T")
REDRAWN = 0.2  # seconds between two pictures of a bar in a notebook, which are messages to a browser
HTML = '<pre style="line-height: normal; margin: 0">{code}</pre>'


def track(items: Iterable[T], what: str, total: int | None, *, show: bool = True) -> Iterator[T]:
    """The items, with a bar that says how many are done and how long the rest will take."""
    with bar(what, total, show=show) as advance:
        for item in items:
            yield item
            advance(1, "")


@contextlib.contextmanager
def bar(what: str, total: int | None, *, show: bool = True) -> Iterator[Callable[[int, str], None]]:
    """A bar as of `track` that is told how many more are done, and what to say of it: `advance(count, note)`."""
    screen = _screen() if show and total != 1 else None
    if screen is None:
        yield lambda count, note: None
        return
    line, ended = screen.begin(what, total), "stopped"
    try:
        yield lambda count, note: screen.advance(line, count, f"{what}, {note}" if note else what)
        ended = ""
    finally:
        screen.end(line, ended)


class _Screen(Protocol):
    """Where bars are, one line for each."""

    def begin(self, what: str, total: int | None) -> Any: ...
    def advance(self, line: Any, count: int, text: str) -> None: ...
    def end(self, line: Any, note: str) -> None: ...


class _Terminal:
    """Bars below the output of the terminal, which goes on above; they go when they end."""

    def __init__(self, console: Any) -> None:
        # What goes to a file goes there undiverted.
        self.progress = _lines(console, transient=True, redirect_stdout=sys.stdout.isatty())

    def begin(self, what: str, total: int | None) -> Any:
        if not self.progress.tasks:
            self.progress.start()
        return self.progress.add_task(what, total=total)

    def advance(self, line: Any, count: int, text: str) -> None:
        self.progress.update(line, advance=count, description=text)

    def end(self, line: Any, note: str) -> None:
        self.progress.remove_task(line)
        if not self.progress.tasks:
            self.progress.stop()


class _Notebook:
    """Bars under a cell; they stay when they end, until one of the same name takes the place.

    Drawn by the loop itself and updated by IPython, which every front end understands: widgets would be one more thing
    to install, and a thread that draws would catch what the cell prints.
    """

    def __init__(self, cell: Any) -> None:
        from rich.console import Console

        self.cell = cell
        self.display: Any = None
        self.console = Console(file=io.StringIO(), record=True, width=100, force_jupyter=False, force_terminal=True)
        self.progress = _lines(self.console, auto_refresh=False)
        self.ended: dict[str, Any] = {}
        self.drawn = 0.0

    def begin(self, what: str, total: int | None) -> Any:
        if what in self.ended:
            self.progress.remove_task(self.ended.pop(what))
        line = self.progress.add_task(what, total=total, what=what)
        self._draw()
        return line

    def advance(self, line: Any, count: int, text: str) -> None:
        self.progress.update(line, advance=count, description=text)
        if time.monotonic() - self.drawn > REDRAWN:
            self._draw()

    def end(self, line: Any, note: str) -> None:
        task = next(task for task in self.progress.tasks if task.id == line)
        self.ended[task.fields["what"]] = line
        if note:
            self.progress.update(line, description=f"{task.description}, {note}")
        else:  # a length that was not known, or a wrong one
            self.progress.update(line, total=task.completed)
        self.progress.stop_task(line)
        self._draw()

    def _draw(self) -> None:
        from IPython.display import display

        self.drawn = time.monotonic()
        self.console.print(self.progress.get_renderable())
        html = self.console.export_html(code_format=HTML, inline_styles=True, clear=False)
        shown = {"text/html": html, "text/plain": self.console.export_text()}
        if self.display is None:
            self.display = display(shown, raw=True, display_id=True)
        else:
            self.display.update(shown, raw=True)


def _lines(console: Any, **options: Any) -> Any:
    """What a bar says."""
    from rich import progress  # flax brings rich; the core does without

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    return progress.Progress(*columns, console=console, **options)


_LOCK = threading.Lock()
_LATEST: list[Any] = [None]


def _screen() -> _Screen | None:
    """Where bars go, if anybody watches: one terminal for all that are open, one place for all of a cell."""
    from rich.console import Console

    console = Console(stderr=True)
    terminal = console.is_interactive and console.file.isatty()  # whatever FORCE_COLOR says
    if not (terminal or console.is_jupyter) or jax.process_index():
        return None
    with _LOCK:
        latest = _LATEST[0]
        if console.is_jupyter:
            import IPython

            cell = IPython.get_ipython().execution_count
            if not isinstance(latest, _Notebook) or latest.cell != cell:
                _LATEST[0] = _Notebook(cell)
        elif not isinstance(latest, _Terminal) or not latest.progress.tasks:
            _LATEST[0] = _Terminal(console)
        return _LATEST[0]
