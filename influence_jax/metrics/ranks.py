"""Ranks, correlations and top-k with ties, on vectors and along the leading axis."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import tree
from .._mesh import compiled
from .._typing import Array, ArrayLike
from .checks import check_least, check_method, check_same, numbers

R = TypeVar("R")


def measure(fn: Callable[..., R], *, static_argnames: str | Sequence[str] = ()) -> Callable[..., R]:
    """Compile a function whose results are NaN where there is no answer.

    `jax_debug_nans` looks at what programs return, and takes any NaN for a mistake.  So the program returns zeros and
    where they stand for no answer, and NaN is put there on the host.
    """

    @functools.wraps(fn)
    def in_parts(*args: object, **kwargs: object) -> tuple[R, R]:
        return without_gaps(fn(*args, **kwargs))

    program = compiled(in_parts, static_argnames=static_argnames)

    @functools.wraps(fn)
    def measured(*args: object, **kwargs: object) -> R:
        return jax.tree.map(with_gaps, *program(*args, **kwargs))

    return measured


def without_gaps(found: R) -> tuple[R, R]:
    """Return arrays with zeros for what is NaN, and where that is."""
    gaps = jax.tree.map(jnp.isnan, found)
    return jax.tree.map(lambda x, gap: jnp.where(gap, 0, x), found, gaps), gaps


def with_gaps(x: Array, gaps: Array) -> Array:
    """Put NaN where there is no answer; on the host, unless traced."""
    if isinstance(x, jax.core.Tracer):
        return nan_where(gaps, x)
    where = np.asarray(gaps)
    return jax.device_put(np.where(where, np.nan, np.asarray(x)).astype(x.dtype), x.sharding) if where.any() else x


def correlation(predicted: ArrayLike, measured: ArrayLike, *, method: str = "spearman") -> Array:
    r"""Correlation along the leading axis, column by column.

    Pearson: $\frac{\sum_s (x_s - \bar x)(y_s - \bar y)}{\|x - \bar x\|\,\|y - \bar y\|}$.  Spearman: the same of ranks,
    where ties share the average of their ranks.  The same numbers as `scipy.stats.pearsonr` and `spearmanr`.

    Args:
      predicted: `(S, ...)`, at least three rows.
      measured: Of the same shape.
      method: `"spearman"` or `"pearson"`.

    Returns:
      One correlation for each column, `(...)`; NaN where a column is constant, for then there is none.

    Raises:
      ValueError: If the shapes differ, there are fewer than three rows, or an entry is NaN or infinite.

    Example:
      >>> import influence_jax as ij
      >>> predicted, measured = jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([1.0, 4.0, 9.0, 9.0])
      >>> round(float(ij.metrics.correlation(predicted, measured)), 3)
      0.949

    Reference: Spearman 1904, doi:10.2307/1412159.
    """
    check_method(method)
    predicted, measured = (
        numbers(values, name, only="differences") for values, name in ((predicted, "predicted"), (measured, "measured"))
    )
    check_same("measured", measured.shape, predicted.shape, "that of predicted")
    check_rows("predicted", len(predicted), "rows")
    return correlate(predicted, measured, method)


def check_rows(name: str, got: int, of_what: str) -> None:
    """Raise unless a correlation means something: that of two points is always 1 or -1."""
    check_least(name, got, 3, of_what, "a correlation of fewer says nothing")


@functools.partial(measure, static_argnames="method")
def correlate(x: Array, y: Array, method: str) -> Array:
    """`correlation` of checked arrays."""
    if method == "spearman":
        x, y = ranks(x), ranks(y)
    return weighted_pearson(x, y, jnp.ones_like(x, tree.widest(x.dtype, y.dtype)))


def ranks(x: Array) -> Array:
    """Ranks from 1 along the leading axis; ties share the average of theirs; all NaN if an entry is."""
    columns = jax.vmap(_ranks, in_axes=1, out_axes=1)(x.reshape(x.shape[0], -1))
    return columns.reshape(x.shape)


def _ranks(x: Array) -> Array:
    below, up_to = places(x)
    return nan_where(jnp.any(jnp.isnan(x)), ((below + up_to + 1) / 2).astype(x.dtype))


def places(x: Array) -> tuple[Array, Array]:
    """How many entries of a vector are below each entry, and how many are not above it."""
    ordered = jnp.sort(x)
    return jnp.searchsorted(ordered, x, side="left"), jnp.searchsorted(ordered, x, side="right")


def nan_where(undefined: Array, x: Array) -> Array:
    """NaN where there is no answer."""
    return jnp.where(undefined, jnp.nan, x).astype(x.dtype)


def weighted_pearson(x: Array, y: Array, weights: Array) -> Array:
    """Pearson correlation along the leading axis, rows weighted; NaN if those that weigh anything are constant."""
    return jnp.clip(jnp.sum(weights * _standard(x, weights) * _standard(y, weights), axis=0), -1, 1)


def _standard(x: Array, weights: Array) -> Array:
    """With weighted mean 0 and weighted sum of squares 1."""
    x = x.astype(weights.dtype)
    constant = is_constant(x, weights)[None]
    largest = jnp.max(jnp.abs(x), axis=0, keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1)  # so that squares of tiny or huge numbers stay in range
    x = x - jnp.sum(weights * x, axis=0, keepdims=True) / jnp.sum(weights, axis=0, keepdims=True)
    return nan_where(constant, x / jnp.sqrt(jnp.sum(weights * x**2, axis=0, keepdims=True)))


def is_constant(x: Array, weights: Array | int = 1) -> Array:
    """Say of each column whether the rows that weigh anything are all alike, and finite."""
    counted = lambda otherwise: jnp.where(weights > 0, x, otherwise)
    largest = jnp.max(counted(-jnp.inf), axis=0)
    return (largest == jnp.min(counted(jnp.inf), axis=0)) & jnp.isfinite(largest)


def resampled_correlation(x: Array, y: Array, counts: Array, method: str) -> Array:
    """Correlations of vectors in resamples `(R,)`, from how often each has each row, `counts (S, R)`.

    Nothing is sorted anew: the rank of a row in a resample follows from how many rows are drawn below it.
    """
    x, y = x.astype(counts.dtype), y.astype(counts.dtype)
    if method == "spearman":
        x, y = _resampled_ranks(x, counts), _resampled_ranks(y, counts)
    else:
        x, y = x[:, None], y[:, None]
    return weighted_pearson(*jnp.broadcast_arrays(x, y, counts))


def _resampled_ranks(x: Array, counts: Array) -> Array:
    below, up_to = places(x)
    drawn = jnp.cumsum(jnp.take(counts, jnp.argsort(x), axis=0), axis=0)
    drawn = jnp.concatenate([jnp.zeros_like(drawn[:1]), drawn])
    return (jnp.take(drawn, below, axis=0) + jnp.take(drawn, up_to, axis=0) + 1) / 2


def share_in_top(scores: Array, k: int) -> Array:
    """Of each entry of a vector, how often it is among the k highest over random orders of ties, in [0, 1]."""
    lowest = lax.top_k(scores, k)[0][k - 1]
    above, tied = scores > lowest, scores == lowest
    share = (k - jnp.sum(above)) / jnp.sum(tied)
    chosen = jnp.where(above, 1, jnp.where(tied, share, 0)).astype(scores.dtype)
    return nan_where(jnp.any(jnp.isnan(scores)), chosen)
