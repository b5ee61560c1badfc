"""Running out of memory, told in words: what was computed, how much was asked for, and which arguments make it less."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

_T = TypeVar("_T")

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")

PLAN = "influence_jax.planning.plan(influence, query, train, budget=...) finds numbers that fit a budget"
SCORE_KNOBS = (
    "fewer examples at once (chunk= of Influence and of the curvature operator), fewer vectors at once (rhs_chunk= of "
    f"both), fewer queries in one call, or a smaller batch_size= of influence_jax.stream; {PLAN}"
)
SOLVE_KNOBS = (
    "fewer examples at once (chunk= of the curvature operator), fewer vectors at once (rhs_chunk= of the operator, or "
    "fewer right-hand sides in one call), or a solver that holds less, such as BlockCG or CG where Direct and Eigh "
    "form a matrix; with an Influence, influence_jax.planning.plan(influence, query, train, budget=...) tells "
    "beforehand what fits"
)

# As the allocators of CPU, GPU and TPU, the TPU compiler and numpy word it.
_EXHAUSTED = re.compile(r"RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)
_REQUESTED = re.compile(
    r"(?:allocat\w*|reserve|Used)\s+(?:request for\s+)?(\d+(?:\.\d+)?)\s?(bytes|[KMGTP]i?B?\b|B\b)", re.IGNORECASE
)


class OutOfMemory(MemoryError):
    """Memory ran out; the message says which arguments make it less."""


def readable(count: float) -> str:
    """A number of bytes for people.

    Example:
      >>> readable(1536), readable(2**45)
      ('1.50 KiB', '32.00 TiB')
    """
    power = 0
    while count >= 1024 and power < len(UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.0f} bytes" if power == 0 else f"{count:.2f} {UNITS[power]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out: of the host, of a device, or foreseen by a compiler."""
    return isinstance(error, MemoryError) or _EXHAUSTED.search(str(error)) is not None


def requested(message: str) -> str | None:
    """How much was asked for at once, if the message tells.

    Example:
      >>> requested("RESOURCE_EXHAUSTED: Out of memory allocating 2147483648 bytes.")
      '2.00 GiB'
    """
    found = _REQUESTED.search(message)
    if found is None:
        return None
    number, unit = found.groups()
    return readable(float(number)) if unit.lower() in ("bytes", "b") else f"{number} {unit}"


@contextlib.contextmanager
def memory_errors(what: str, knobs: str | Callable[[], str] = SCORE_KNOBS) -> Iterator[None]:
    """Raise a `MemoryError` that says what to change, from any error that says that memory ran out.

    Covers whatever is raised while the host runs the block: reading arrays in, compiling, dispatch, and waiting for
    results that the block itself reads, such as how solves went.  Programs run asynchronously: where a backend
    allocates while a program runs, as on CPU, an error that nothing in the block waits for is raised, unchanged, where
    the result is first read.  Waiting here instead would keep the host from preparing the next call.

    Args:
      what: What was computed, e.g. `"Influence.influences"`.
      knobs: What takes less memory; a function is asked only when memory ran out.

    Example:
      >>> with memory_errors("Influence.influences"):
      ...     raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1099511627776 bytes.")
      Traceback (most recent call last):
      influence_jax._memory.OutOfMemory: Influence.influences: ran out of memory, asking for 1.00 TiB at once. ...
    """
    try:
        yield
    except OutOfMemory:
        raise
    except (RuntimeError, ValueError, MemoryError) as error:  # jax.errors.JaxRuntimeError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        size = requested(str(error))
        asked = "" if size is None else f", asking for {size} at once"
        less = knobs() if callable(knobs) else f"Less is taken by {knobs}"
        raise OutOfMemory(f"{what}: ran out of memory{asked}. {less}") from error


def explain_memory_errors(*methods: str) -> Callable[[type[_T]], type[_T]]:
    """Wrap the named methods of a class in `memory_errors`."""

    def wrapped(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            # Programs run on while the host goes on: a matrix that does not fit may fail where it is first used.
            with memory_errors(name, lambda: f"{getattr(args[0], 'holds', '')}Less is taken by {SCORE_KNOBS}"):
                return method(*args, **kwargs)

        return run

    def wrap(cls: type[_T]) -> type[_T]:
        for name in methods:
            setattr(cls, name, wrapped(f"{cls.__name__}.{name}", getattr(cls, name)))
        return cls

    return wrap
