"""Progress bars of host loops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], what: str, total: int | None = None, *, show: bool = True) -> Iterator[T]:
    """The items, with a bar that says how many are done and how long the rest will take, in terminals and notebooks."""
    if not show:
        yield from items
        return
    from rich.progress import track as rich_track  # flax brings it; the core does without

    yield from rich_track(items, description=what, total=total)
