"""How sure a measure is: intervals by the percentile bootstrap."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _reprs, tree
from .._mesh import compiled
from .._typing import Array, ArrayLike, Key, PyTree
from ..batching import as_batch, check_key, check_positive, chunk_for, map_over
from .checks import check_least, check_level, check_method
from .ranks import correlate, is_constant, measure, resampled_correlation, with_gaps, without_gaps
from .retraining import predicted_and_measured


class Interval(NamedTuple):
    """Where a number is likely to be.

    Attributes:
      low: Lower end, shaped like the number, `(...)`.
      high: Upper end, `(...)`.

    Example:
      >>> Interval(jnp.array(0.25), jnp.array(0.5))
      Interval(low 0.25, high 0.5)
    """

    low: Array
    high: Array

    def __repr__(self) -> str:
        return _reprs.call(self, f"low {_reprs.span(self.low, 3)}", f"high {_reprs.span(self.high, 3)}")


class Summary(NamedTuple):
    """A mean over queries, and how sure it is.

    Attributes:
      mean: Over the queries that tell something; scalar.
      over_queries: What other queries would have given, with the same subsets; NaN for a single query.
      over_subsets: What other subsets would have given, for the same queries.

    Example:
      >>> ends = Interval(jnp.array(0.25), jnp.array(0.5))
      >>> Summary(jnp.array(0.375), over_queries=ends, over_subsets=ends).mean.item()
      0.375
    """

    mean: Array
    over_queries: Interval
    over_subsets: Interval

    def __repr__(self) -> str:
        intervals = (f"{name} {getattr(self, name)!r}" for name in ("over_queries", "over_subsets"))
        return _reprs.call(self, f"mean {_reprs.span(self.mean, 3)}", *intervals)


def mean(values: Array) -> Array:
    """Over the leading axis."""
    return jnp.mean(values, axis=0)


def bootstrap(
    values: PyTree,
    *,
    key: Key,
    statistic: Callable[[PyTree], Array] = mean,
    resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    r"""An interval for a statistic of independent rows, by the percentile bootstrap.

    The statistic is taken of as many rows as there are, drawn with replacement, again and again; the interval holds the
    middle share `level` of what it was.

    $[\hat F^{-1}(\tfrac{1 - c}{2}), \hat F^{-1}(\tfrac{1 + c}{2})]$ with $\hat F$ the distribution of the statistic
    over resamples and c the level.

    Args:
      values: Rows, leaves `(n, ...)` with at least two: measures of queries, or e.g. a pair `(suspicion, flipped)`.
      key: Random key; the same key gives the same interval.
      statistic: Function of rows to an array, e.g. `lambda rows: auc(*rows)`, defined once, for each compiles anew;
        `jnp.nanmean` leaves out rows that are NaN, which otherwise make the interval NaN.
      resamples: How many.
      level: Share that the interval is to cover.

    Returns:
      An Interval of arrays shaped like the statistic.

    Raises:
      TypeError: If the statistic is no function, or values are no arrays.
      ValueError: If there are fewer than two rows, or a setting is out of range.

    Example:
      >>> import influence_jax as ij
      >>> low, high = ij.metrics.bootstrap(jnp.arange(100.0), key=jax.random.key(0))
      >>> bool(low < 49.5 < high), bool(10 < high - low < 13)
      (True, True)

    Reference: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    values = jax.tree.map(_wide, as_batch(jax.tree.map(_held, values), "values"))
    check_least("values", tree.count(values), 2, "rows", "one row says nothing about others")
    if not callable(statistic):
        raise TypeError(f"statistic: got {statistic!r}, expected a function of rows, e.g. jnp.median")
    _check_settings(key, resamples, level)
    shape = jax.eval_shape(statistic, values)
    if not isinstance(shape, jax.ShapeDtypeStruct):
        raise TypeError(f"statistic: returned a {type(shape).__name__}, expected a function of rows to one array")
    return _bootstrap(values, key, statistic, resamples, level)


def _held(leaf: Any) -> Any:
    """Cast float64 of the host to what JAX holds, for the statistic compares it."""
    return leaf.astype(np.float32) if isinstance(leaf, np.ndarray) and tree.is_float64_lost(leaf) else leaf


def _check_settings(key: Key, resamples: int, level: float) -> None:
    check_key(key, "rows are resampled at random; pass key=")
    check_positive(resamples, "resamples")
    check_level(level)


@partial(measure, static_argnames=("statistic", "resamples", "level"))
def _bootstrap(
    values: PyTree, key: Key, statistic: Callable[[PyTree], Array], resamples: int, level: float
) -> Interval:
    rows = tree.count(values)

    def resampled(key: Key) -> Array:
        drawn = jax.random.randint(key, (rows,), 0, rows)
        return statistic(jax.tree.map(lambda x: jnp.take(x, drawn, axis=0), values))

    found = map_over(resampled, jax.random.split(key, resamples), chunk=chunk_for(tree.size(values)))
    found = _wide(found) if jnp.issubdtype(found.dtype, jnp.floating) else found.astype(jnp.result_type(float))
    return Interval(*jnp.quantile(found, _ends(level, found), axis=0))


def _wide(x: Array) -> Array:
    """Float32 or wider, if it is floating."""
    return tree.promote(x) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _ends(level: float, found: Array) -> Array:
    return jnp.asarray([(1 - level) / 2, (1 + level) / 2], found.dtype)


def lds_summary(
    scores: ArrayLike,
    masks: ArrayLike,
    outcomes: ArrayLike,
    *,
    key: Key,
    method: str = "spearman",
    removal: str = "mean",
    resamples: int = 1000,
    level: float = 0.95,
) -> Summary:
    r"""Mean of `lds` over queries, with what it owes to the choice of queries, and to that of subsets.

    $\frac1{|D|} \sum_{q \in D} \mathrm{LDS}(q)$ over the queries D of which there is a rank correlation.  The others
    tell nothing about any scores: their loss is the same after every training, such as a float32 0 of a confident
    model; or nothing is predicted of them, as all their scores are equal.  They are left out, and counted in a
    warning.

    The arguments are those of `lds`, and those of `bootstrap`.  Subsets are drawn for all queries together, for a
    subset that is easy to predict is so for many of them.

    Args:
      scores: `(Q, N)`, positive where training on the example lowers what is measured.
      masks: `(S, N)`, true where the example is kept; at least three subsets.
      outcomes: `(S, Q)`, or `(S, K, Q)` with K seeds.
      key: Random key; the same key gives the same intervals.
      method: `"spearman"` or `"pearson"`.
      removal: `"mean"` or `"sum"`, as for `predicted_changes`.
      resamples: How many, of queries and of subsets.
      level: Share that the intervals are to cover.

    Returns:
      A Summary.  NaN if every query is left out; under tracing also if a number is NaN.  A query that is the same for
      all subsets of a resample is left out of that, and a resample in which all are is left out.

    Raises:
      ValueError: As `lds` and `bootstrap`.

    Warns:
      UserWarning: If queries are left out, with their number and the first of them; not under tracing.

    Example:
      >>> import influence_jax as ij
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> scores, masks = jax.random.normal(keys[0], (5, 20)), jax.random.bernoulli(keys[1], 0.5, (30, 20))
      >>> outcomes = ij.metrics.predicted_changes(scores, masks)
      >>> mean, over_queries, over_subsets = ij.metrics.lds_summary(scores, masks, outcomes, key=keys[2])
      >>> round(float(mean), 3), round(float(over_subsets.low), 3)
      (1.0, 1.0)

    Reference: Park et al. 2023, arXiv:2303.14186, section 2; Efron & Tibshirani 1993, An Introduction to the Bootstrap,
    chapter 13.
    """
    check_method(method)
    _check_settings(key, resamples, level)
    predicted, measured = predicted_and_measured(scores, masks, outcomes, removal)
    _warn_of_constants(predicted, measured)
    parts = _lds_summary(predicted, measured, key, method, resamples, level)
    return jax.tree.map(with_gaps, *parts)


def _warn_of_constants(predicted: Array, measured: Array) -> None:
    """Say how many queries tell nothing, unless traced."""
    if isinstance(predicted, jax.core.Tracer) or isinstance(measured, jax.core.Tracer):
        return
    for name, values, what in (
        ("outcomes", measured, "was measured the same after every training, e.g. a loss that float32 rounds to 0"),
        ("scores", predicted, "is predicted the same for all subsets, e.g. because all its scores are equal"),
    ):
        values = np.asarray(values)
        places = np.flatnonzero(values.max(axis=0) == values.min(axis=0))
        if places.size:
            first = _reprs.some([str(place) for place in places])
            warnings.warn(
                f"{name}: of {places.size} of {values.shape[1]} queries ({first}) what {what}, so that they tell "
                "nothing and are left out of the mean",
                UserWarning,
                stacklevel=3,
            )


@partial(compiled, static_argnames=("method", "resamples", "level"))
def _lds_summary(
    predicted: Array, measured: Array, key: Key, method: str, resamples: int, level: float
) -> tuple[Summary, Summary]:
    """Return the summary with zeros for what there is no answer to, and where those are."""
    of_queries, of_subsets = jax.random.split(key)
    by_query, told = correlate(predicted, measured, method), ~(is_constant(predicted) | is_constant(measured))
    by_query, dtype, number = jnp.where(told, by_query, 0), by_query.dtype, jnp.sum(told)
    count = number.astype(dtype)
    average = jnp.sum(by_query) / count
    first = by_query[jnp.argsort(~told, stable=True)]  # those that tell something, of which alone are drawn
    drawn = _drawn(of_queries, first.size, number, resamples, dtype)
    queries = jnp.matmul(first, drawn, precision=tree.HIGHEST) / count
    queries = jnp.where(number > 1, queries, jnp.nan)  # one query says nothing about others
    counts = _drawn(of_subsets, len(predicted), len(predicted), resamples, dtype)
    subsets = _means_over_queries(predicted, measured, told, counts, method)
    low, high = jnp.nanquantile(jnp.stack([queries, subsets]), _ends(level, subsets), axis=1)
    return without_gaps(Summary(average, Interval(low[0], high[0]), Interval(low[1], high[1])))


def _drawn(key: Key, rows: int, most: int | Array, resamples: int, dtype: np.dtype) -> Array:
    """Return how often each row is in each resample, `(rows, R)`: of as many as are drawn from, the first `most`."""
    drawn = jax.random.randint(key, (rows, resamples), 0, jnp.maximum(most, 1))
    ones = jnp.broadcast_to((jnp.arange(rows) < most).astype(dtype)[:, None], drawn.shape)
    return jnp.zeros((rows, resamples), dtype).at[drawn, jnp.arange(resamples)].add(ones)


def _means_over_queries(predicted: Array, measured: Array, told: Array, counts: Array, method: str) -> Array:
    """Return the mean correlation in each resample of subsets, `(R,)`, query by query so that little is held at once.

    A query that does not vary within a resample is left out of it, as one that never varies is left out of all.
    """

    def add(carry: tuple[Array, Array], query: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        x, y, told = query
        found = resampled_correlation(x, y, counts, method)
        used = told & ~(is_constant(x[:, None], counts) | is_constant(y[:, None], counts))
        total, number = carry
        return (total + jnp.where(used, found, 0), number + used.astype(number.dtype)), None

    zeros = jnp.zeros(counts.shape[1], counts.dtype)
    total, number = lax.scan(add, (zeros, zeros), (predicted.T, measured.T, told))[0]
    return total / number
