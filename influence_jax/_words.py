"""What goes wrong in the functions that users write, told in terms of what these were given."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax

from . import _reprs, tree
from ._typing import PyTree

PACKAGE = str(pathlib.Path(__file__).parent) + os.sep
# Errors that say nothing about what a function was given.
OF_THE_MACHINE = (OSError, MemoryError, RecursionError, Warning, jax.errors.JaxRuntimeError)
# Leaves of a tree that a message lists.
LISTED = 8


class _Note(str):
    """What the library adds to somebody else's exception."""


def ask(role: str, fn: Callable[..., Any], given: Mapping[str, PyTree], hint: str) -> Any:
    """Call a user's function, and if it fails note on its exception which one it was, and what it was given.

    Args:
      role: What the function is to the library, e.g. `"predict"`.
      fn: The function.
      given: Its arguments by name, in order.
      hint: What such functions have to keep to.

    Raises:
      Exception: What the function raised, of its own class.  The note of PEP 678 is left out where it is about the
        machine and not about the arguments, and where the library itself has raised it, in words.
    """
    try:
        return fn(*given.values())
    except Exception as error:
        told = any(isinstance(note, _Note) for note in getattr(error, "__notes__", ()))
        if not (told or isinstance(error, OF_THE_MACHINE) or _raised_here(error)):
            got = "; ".join(f"{name} {_shapes(value)}" for name, value in given.items())
            failed = f"{role}: {name_of(fn)} failed{_place(error)} with {type(error).__name__}"
            error.add_note(_Note(f"{failed}. It got {got}; {hint}{_about_narrow(f'{error} {got}', given)}"))
        raise


def _about_narrow(told: str, given: Mapping[str, PyTree]) -> str:
    """Return why parameters are wider than they were passed, where that may be what failed."""
    narrow = re.search(r"\bb?float16\b", told)
    if narrow is None or "params" not in given:
        return ""
    return (
        f". Parameters passed as {narrow[0]} arrive as float32, in which derivatives are taken; let a model that is "
        f"{narrow[0]} throughout begin with params = jax.tree.map(lambda p: p.astype(jnp.{narrow[0]}), params)"
    )


def name_of(fn: Any) -> str:
    """What to call a function in a message; of a partial one, the function that is in it."""
    if isinstance(fn, functools.partial):
        return f"partial({name_of(fn.func)})"
    told = getattr(fn, "__qualname__", None) or str(fn)
    return told if len(told) <= 60 and "\n" not in told else type(fn).__name__


def levels_inside() -> int:
    """Stack levels between the caller and the first frame outside this package, which a warning is about."""
    level, frame = 1, sys._getframe(1)
    inside = (PACKAGE, contextlib.__file__)  # whose decorators stand between
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level


def _place(error: Exception) -> str:
    """Return the last line of somebody's own code that the error came through."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = frame.f_code.co_filename
        if not file.startswith(PACKAGE) and "site-packages" not in file and os.path.exists(file):
            return f" at {os.path.basename(file)}:{line}"
    return ""


def _raised_here(error: BaseException) -> bool:
    """Return whether the library raised it, within the user's function."""
    own = last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last is not own and last.tb_frame.f_code.co_filename.startswith(PACKAGE)


def _shapes(value: PyTree) -> str:
    """Return name, dtype and shape of the leaves."""
    leaves = [(path or "array", leaf) for path, leaf in tree.named_leaves(value)]
    shown = [f"{path} {_reprs.array(leaf)}" for path, leaf in leaves[:LISTED]]
    more = [f"and {len(leaves) - LISTED} more"] if len(leaves) > LISTED else []
    return f"({', '.join(shown + more)})"
