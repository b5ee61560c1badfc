"""How sure a measure is: intervals by the percentile bootstrap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _reprs, tree
from .._mesh import compiled
from .._typing import Array, ArrayLike, Key, PyTree
from ..batching import as_batch, check_key, check_positive, chunk_for, map_over
from .checks import check_least, check_level, check_method
from .ranks import correlate, resampled_correlation
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
      mean: Over queries; scalar.
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
    values = jax.tree.map(_wide, as_batch(values, "values"))
    check_least("values", tree.count(values), 2, "rows", "one row says nothing about others")
    if not callable(statistic):
        raise TypeError(f"statistic: got {statistic!r}, expected a function of rows, e.g. jnp.median")
    _check_settings(key, resamples, level)
    shape = jax.eval_shape(statistic, values)
    if not isinstance(shape, jax.ShapeDtypeStruct):
        raise TypeError(f"statistic: returned a {type(shape).__name__}, expected a function of rows to one array")
    return _bootstrap(values, key, statistic, resamples, level)


def _check_settings(key: Key, resamples: int, level: float) -> None:
    check_key(key, "rows are resampled at random; pass key=")
    check_positive(resamples, "resamples")
    check_level(level)


@partial(compiled, static_argnames=("statistic", "resamples", "level"))
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
    resamples: int = 1000,
    level: float = 0.95,
) -> Summary:
    """Mean of `lds` over queries, with what it owes to the choice of queries, and to that of subsets.

    The arguments are those of `lds`, and those of `bootstrap`.  Subsets are drawn for all queries together, for a
    subset that is easy to predict is so for many of them.

    Args:
      scores: `(Q, N)`, positive where training on the example lowers what is measured.
      masks: `(S, N)`, true where the example is kept; at least three subsets.
      outcomes: `(S, Q)`, or `(S, K, Q)` with K seeds.
      key: Random key; the same key gives the same intervals.
      method: `"spearman"` or `"pearson"`.
      resamples: How many, of queries and of subsets.
      level: Share that the intervals are to cover.

    Returns:
      A Summary.  NaN if `lds` is NaN for a query; resamples of few subsets that are all alike are left out.

    Raises:
      ValueError: As `lds` and `bootstrap`.

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
    return _lds_summary(*predicted_and_measured(scores, masks, outcomes), key, method, resamples, level)


@partial(compiled, static_argnames=("method", "resamples", "level"))
def _lds_summary(predicted: Array, measured: Array, key: Key, method: str, resamples: int, level: float) -> Summary:
    of_queries, of_subsets = jax.random.split(key)
    by_query = correlate(predicted, measured, method)
    count, dtype = by_query.size, by_query.dtype
    queries = jnp.matmul(by_query, _drawn(of_queries, count, resamples, dtype), precision=tree.HIGHEST) / count
    if count == 1:
        queries = queries + jnp.nan  # one query says nothing about others
    counts = _drawn(of_subsets, predicted.shape[0], resamples, dtype)
    subsets = _means_over_queries(predicted, measured, counts, method)
    low, high = jnp.nanquantile(jnp.stack([queries, subsets]), _ends(level, subsets), axis=1)
    return Summary(jnp.mean(by_query), Interval(low[0], high[0]), Interval(low[1], high[1]))


def _drawn(key: Key, rows: int, resamples: int, dtype: np.dtype) -> Array:
    """How often each row is in each resample, `(rows, R)`."""
    drawn = jax.random.randint(key, (rows, resamples), 0, rows)
    return jnp.zeros((rows, resamples), dtype).at[drawn, jnp.arange(resamples)].add(1)


def _means_over_queries(predicted: Array, measured: Array, counts: Array, method: str) -> Array:
    """Mean correlation in each resample of subsets, `(R,)`, query by query so that little is held at once."""

    def add(total: Array, query: tuple[Array, Array]) -> tuple[Array, None]:
        return total + resampled_correlation(*query, counts, method), None

    zeros = jnp.zeros(counts.shape[1], counts.dtype)
    return lax.scan(add, zeros, (predicted.T, measured.T))[0] / predicted.shape[1]
