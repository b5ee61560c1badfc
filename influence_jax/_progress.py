"""Progress bars of host loops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], what: str, total: int | None = None, *, show: bool = True) -> Iterator[T]:
    """The items; in terminals and notebooks with a bar that says how many are done and how long the rest will take."""
    if not show:
        yield from items
        return
    from rich.console import Console  # flax brings rich; the core does without
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    watched = console.is_terminal or console.is_jupyter
    yield from rich_track(items, description=what, total=total, console=console, disable=not watched)
