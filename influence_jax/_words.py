"""What goes wrong in the functions that users write, told in terms of what these were given."""

from __future__ import annotations

import functools
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax

from . import _reprs, tree
from ._typing import PyTree

PACKAGE = str(pathlib.Path(__file__).parent) + os.sep
# Whose errors are told in words; those of anybody else's classes may be waited for by whoever wrote them.
KNOWN = ("builtins", "jax", "jaxlib", "flax", "numpy")
# Leaves of a tree that a message lists.
LISTED = 8


def ask(role: str, fn: Callable[..., Any], given: Mapping[str, PyTree], hint: str) -> Any:
    """Call a user's function, and if it fails say which one it was, and what it was given.

    Args:
      role: What the function is to the library, e.g. `"predict"`.
      fn: The function.
      given: Its arguments by name, in order.
      hint: What such functions have to keep to.

    Raises:
      TypeError, ValueError: From what the function raised; errors of the system, and of classes that are not Python's,
        NumPy's, JAX's or flax's, pass unchanged.
    """
    try:
        return fn(*given.values())
    except Exception as error:
        if not _is_ordinary(error) or _raised_here(error):  # not about the arguments, or in words already
            raise
        kind = TypeError if isinstance(error, TypeError | AttributeError) else ValueError
        got = "; ".join(f"{name} {_shapes(value)}" for name, value in given.items())
        said = next(iter(str(error).strip().splitlines()), "").rstrip(".")
        raise kind(
            f"{role}: {name_of(fn)} failed{_place(error)} with {type(error).__name__}: {said}. It got {got}; {hint}"
        ) from error


def name_of(fn: Any) -> str:
    """What to call a function in a message; of a partial one, the function that is in it."""
    if isinstance(fn, functools.partial):
        return f"partial({name_of(fn.func)})"
    told = getattr(fn, "__qualname__", None) or str(fn)
    return told if len(told) <= 60 and "\n" not in told else type(fn).__name__


def levels_inside() -> int:
    """Stack levels between the caller and the first frame outside this package, which a warning is about."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        level, frame = level + 1, frame.f_back
    return level


def _is_ordinary(error: Exception) -> bool:
    """Whether it may come from what the function was given, rather than from the machine or the system."""
    told = (OSError, MemoryError, RecursionError, Warning, jax.errors.JaxRuntimeError)
    return type(error).__module__.split(".")[0] in KNOWN and not isinstance(error, told)


def _place(error: Exception) -> str:
    """The last line of somebody's own code that the error came through."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = frame.f_code.co_filename
        if not file.startswith(PACKAGE) and "site-packages" not in file and os.path.exists(file):
            return f" at {os.path.basename(file)}:{line}"
    return ""


def _raised_here(error: BaseException) -> bool:
    """Whether the library raised it, within the user's function."""
    own = last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last is not own and last.tb_frame.f_code.co_filename.startswith(PACKAGE)


def _shapes(value: PyTree) -> str:
    """Name, dtype and shape of the leaves."""
    leaves = [(path or "array", leaf) for path, leaf in tree.named_leaves(value)]
    shown = [f"{path} {_reprs.array(leaf)}" for path, leaf in leaves[:LISTED]]
    more = [f"and {len(leaves) - LISTED} more"] if len(leaves) > LISTED else []
    return f"({', '.join(shown + more)})"
