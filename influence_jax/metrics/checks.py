"""What the measures accept: arrays of numbers or of flags whose axes agree; values are checked where they are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import tree
from .._typing import Array
from ..batching import check_positive

METHODS = ("spearman", "pearson")


def numbers(value: Any, name: str, *axes: str) -> Array:
    """A floating array, at least float32, of finite numbers.

    Args:
      value: Array, or nested lists.
      name: The argument.
      axes: The layouts it may have, e.g. `"(S, Q)"`; any, if none is given.

    Raises:
      TypeError: If it holds no real numbers, or is float64 while 64-bit mode is off.
      ValueError: If it has another layout or no entries, or an entry is NaN or infinite.
    """
    array = _array(value, name, axes)
    bad = 0 if isinstance(array, jax.core.Tracer) else np.count_nonzero(~np.isfinite(np.asarray(array)))
    if bad:
        raise ValueError(
            f"{name}: got {bad} entries of {array.size} that are NaN or infinite, expected finite numbers; find out "
            "where they come from, e.g. a training that diverged, and leave those rows out"
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(jnp.result_type(float))
    return tree.promote(array)


def flags(value: Any, name: str, *axes: str) -> Array:
    """A boolean array, from booleans or from numbers 0 and 1.

    Raises:
      TypeError, ValueError: As `numbers`, or if an entry is neither 0 nor 1.
    """
    array = _array(value, name, axes)
    if array.dtype == bool:
        return array
    if not isinstance(array, jax.core.Tracer):
        found = np.asarray(array)
        other = found[(found != 0) & (found != 1)]
        if other.size:
            raise ValueError(f"{name}: got entries such as {other[0]}, expected booleans, or 0 and 1; compare it first")
    return array != 0


def _array(value: Any, name: str, axes: Sequence[str]) -> Array:
    expected = " or ".join(axes) or "(S, ...)"
    try:
        array = value if isinstance(value, jax.Array | np.ndarray) else jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: got a {type(value).__name__}, expected an array {expected}") from error
    if not _is_real(array.dtype):
        raise TypeError(f"{name}: got dtype {array.dtype}, expected real numbers or booleans")
    if tree.is_float64_lost(array):
        raise TypeError(
            f"{name}: got float64 but 64-bit mode is off, so JAX would cut it to float32; cast it with "
            ".astype(numpy.float32) or run under jax.enable_x64(True)"
        )
    if isinstance(array, np.ndarray) and array.dtype.kind in "iu":
        array = array.astype(jnp.result_type(float))  # before JAX would wrap what its integers cannot hold
    ranks = [layout.count(",") + (not layout.endswith(",)")) for layout in axes] or range(1, array.ndim + 1)
    if array.ndim not in ranks or array.size == 0:
        raise ValueError(f"{name}: got shape {array.shape}, expected {expected} with no axis empty")
    return jnp.asarray(array)


def _is_real(dtype: Any) -> bool:
    kinds = (jnp.floating, jnp.integer, np.bool_)
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def check_same(name: str, got: tuple[int, ...], expected: tuple[int, ...], why: str) -> None:
    """Raise unless two shapes, or lengths of axes, agree."""
    if got != expected:
        raise ValueError(f"{name}: got shape {got}, expected {expected}, {why}")


def check_least(name: str, got: int, least: int, of_what: str, why: str) -> None:
    """Raise unless there are enough."""
    if got < least:
        raise ValueError(f"{name}: got {got} {of_what}, expected at least {least}; {why}")


def check_k(k: int, count: int) -> None:
    """Raise unless `k` is an int from 1 to the number of examples."""
    check_positive(k, "k")
    if k > count:
        raise ValueError(f"k: got {k}, expected at most {count}, the number of examples; take a smaller k")


def check_method(method: str) -> None:
    """Raise unless there is such a correlation."""
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {list(METHODS)}")


def check_level(level: float) -> None:
    """Raise unless an interval can cover that share."""
    if not isinstance(level, float | np.floating) or not 0 < level < 1:
        raise ValueError(f"level: got {level!r}, expected a float between 0 and 1, e.g. 0.95")
