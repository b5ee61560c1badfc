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
REMOVALS = {
    "mean": "of training on the mean over the examples that are left, as retrain.training does",
    "sum": "of training on the sum of their losses, still divided by the N of before",
}


def numbers(value: Any, name: str, *axes: str, only: str | None = None) -> Array:
    """Return a floating array, at least float32, of finite numbers.

    Where 64-bit mode is off, float64 is cast: what is measured is compared here, not computed with.  So that nothing of
    the comparison is lost by it, `only` says what will be looked at: `"order"`, of all entries, of which ranks are then
    kept, or `"differences"` along the leading axis, of which the first row is then taken off.

    Args:
      value: Array, or nested lists.
      name: The argument.
      axes: The layouts it may have, e.g. `"(S, Q)"`; any, if none is given.
      only: What of the numbers decides; everything, if None.

    Raises:
      TypeError: If it holds no real numbers.
      ValueError: If it has another layout or no entries, or an entry is NaN, infinite or beyond float32.
    """
    array = _array(value, name, axes)
    bad = 0 if isinstance(array, jax.core.Tracer) else np.count_nonzero(~np.isfinite(np.asarray(array)))
    if bad:
        raise ValueError(
            f"{name}: got {bad} entries of {array.size} that are NaN or infinite, expected finite numbers; find out "
            "where they come from, e.g. a training that diverged, and leave those rows out"
        )
    if isinstance(array, np.ndarray):
        array = jnp.asarray(_narrow(array, name, only))
    return tree.promote(array) if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.result_type(float))


def score_numbers(value: Any, name: str, *axes: str, only: str | None = None) -> Array:
    """Return scores, as `numbers` but for integers, which say where examples are.

    Raises:
      TypeError: If they are integers, as `TopK.indices` and what `argsort` gives.
      TypeError, ValueError: As `numbers`.
    """
    array = _array(value, name, axes)
    if jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"{name}: got {array.dtype}{list(array.shape)}, expected scores; integers are places of examples, as in "
            "TopK.indices or what argsort gives: pass the scores themselves, of all examples; if these are scores, "
            "cast them to float, .astype(float)"
        )
    return numbers(array, name, *axes, only=only)


def _narrow(array: np.ndarray, name: str, only: str | None) -> np.ndarray:
    """Cast on the host what JAX would cut: float64 where 64-bit mode is off, and integers."""
    wanted = np.dtype(jnp.result_type(float))
    if array.dtype.kind not in "iu" and not (array.dtype.kind == "f" and array.dtype.itemsize > wanted.itemsize):
        return array
    if array.dtype.itemsize >= wanted.itemsize:
        if only == "order":
            array = np.unique(array, return_inverse=True)[1].reshape(array.shape)
        elif only == "differences":
            array = array.astype(np.float64) - array[:1]
    with np.errstate(over="ignore"):
        cast = array.astype(wanted)
    if not np.isfinite(cast).all():
        raise ValueError(
            f"{name}: got numbers up to {np.max(np.abs(array)):.3g}, which {wanted} cannot hold; divide them by a "
            "constant, or run under jax.enable_x64(True)"
        )
    return cast


def flags(value: Any, name: str, *axes: str) -> Array:
    """Return a boolean array, from booleans or from numbers 0 and 1.

    Raises:
      TypeError, ValueError: As `numbers`, or if an entry is neither 0 nor 1.
    """
    array = _array(value, name, axes)
    if array.dtype == bool:
        return jnp.asarray(array)
    if isinstance(array, jax.core.Tracer):
        return array != 0
    found = np.asarray(array)
    other = found[(found != 0) & (found != 1)]
    if other.size:
        raise ValueError(f"{name}: got entries such as {other[0]}, expected booleans, or 0 and 1; compare it first")
    return jnp.asarray(found != 0)


def _array(value: Any, name: str, axes: Sequence[str]) -> Array | np.ndarray:
    """Return real numbers of one of the layouts, on the host unless they are an array of JAX's already."""
    expected = " or ".join(axes) or "(S, ...)"
    tree.check_unmasked(value, name)
    try:
        of_jax = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))
        array = value if isinstance(value, jax.Array) else (jnp.asarray if of_jax else np.asarray)(value)
        if not isinstance(array, jax.core.Tracer) and tree.is_float64_lost(array):
            array = np.asarray(array)  # made where 64-bit mode was on
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: got a {type(value).__name__}, expected an array {expected}") from error
    if not isinstance(array, jax.Array) and array.ndim == 0 and array.dtype.kind in "OSU":
        raise TypeError(f"{name}: got a {type(value).__name__}, expected an array {expected}")
    if not _is_real(array.dtype):
        raise TypeError(f"{name}: got dtype {array.dtype}, expected real numbers or booleans")
    ranks = [layout.count(",") + (not layout.endswith(",)")) for layout in axes] or range(1, array.ndim + 1)
    if array.ndim not in ranks or array.size == 0:
        raise ValueError(f"{name}: got shape {array.shape}, expected {expected} with no axis empty")
    return array


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


def check_removal(removal: str) -> None:
    """Raise unless it is known what a training minimises when examples are left out."""
    if not isinstance(removal, str) or removal not in REMOVALS:
        told = ", or ".join(f"{name!r}, {what}" for name, what in REMOVALS.items())
        raise ValueError(f"removal: got {removal!r}, expected {told}")


def check_level(level: float) -> None:
    """Raise unless an interval can cover that share."""
    if not isinstance(level, float | np.floating) or not 0 < level < 1:
        raise ValueError(f"level: got {level!r}, expected a float between 0 and 1, e.g. 0.95")
