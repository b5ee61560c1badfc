"""Functions of users as jaxprs, traced once for the shapes of their arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from ._typing import PyTree


def described(value: PyTree) -> tuple | None:
    """Return structure, shapes and dtypes, hashable; None if a leaf is no array."""
    leaves, structure = jax.tree.flatten(value)
    if not all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves):
        return None
    return structure, tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves)


def shaped(description: tuple) -> PyTree:
    """Return what was described, of shapes alone."""
    structure, leaves = description
    return structure.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in leaves])


@functools.lru_cache(maxsize=8)
def traced(fn: Callable[..., Any], *descriptions: tuple) -> tuple[Any, PyTree] | None:
    """Return the jaxpr of a function of arguments so described, and the shapes it returns; None if it fails.

    Why it fails is told where it is called.
    """
    try:
        return jax.make_jaxpr(fn, return_shape=True)(*map(shaped, descriptions))
    except Exception:
        return None
