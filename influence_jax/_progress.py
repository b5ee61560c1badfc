"""Progress bars of host loops."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def track(items: Iterable[T], what: str, total: int | None = None, *, show: bool = True) -> Iterator[T]:
    """The items; in terminals and notebooks with a bar that says how many are done and how long the rest will take."""
    if not show:
        yield from items
        return
    from rich.progress import track as rich_track  # flax brings rich; the core does without

    yield from rich_track(items, description=what, total=total, **_place())


@contextlib.contextmanager
def bar(what: str, total: int, *, show: bool = True) -> Iterator[Callable[[int, str], None]]:
    """A bar as of `track` that is told how many more are done, and what to say: `advance(count, what)`."""
    if not show:
        yield lambda count, what: None
        return
    from rich.progress import Progress

    with Progress(**_place()) as shown:
        task = shown.add_task(what, total=total)
        yield lambda count, what: shown.update(task, advance=count, description=what)


def _place() -> dict[str, Any]:
    """Where bars go: to stderr, if anybody watches."""
    from rich.console import Console

    console = Console(stderr=True)
    return {"console": console, "disable": not (console.is_terminal or console.is_jupyter)}
