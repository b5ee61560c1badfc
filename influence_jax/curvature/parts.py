"""Operators on a part of the data, while the rest comes before and after it."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from .._typing import Key

# Place, in the whole data, of the first example of a batch that operators are made of; None if it is the whole.
_FIRST: contextvars.ContextVar[int | None] = contextvars.ContextVar("first", default=None)


@contextlib.contextmanager
def examples_from(start: int) -> Iterator[None]:
    """While a part of the data is at hand: where it starts, for labels depend on an example's place in all data."""
    token = _FIRST.set(start)
    try:
        yield
    finally:
        _FIRST.reset(token)


def is_part() -> bool:
    """Whether the data are a part, whose weights may then all be zero."""
    return _FIRST.get() is not None


def is_first() -> bool:
    """Whether the data are the whole, or the part that it begins with."""
    return not _FIRST.get()


def example_keys(key: Key, start: int, count: int) -> Key:
    """A key for each of the examples from `start` on, which depends on its place in the data only."""
    start = start + (_FIRST.get() or 0)
    return jax.vmap(lambda place: jax.random.fold_in(key, place))(start + jnp.arange(count, dtype=jnp.uint32))
