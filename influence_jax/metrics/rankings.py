"""Measures of rankings: mislabelled examples found, relevant examples retrieved, agreement of runs."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import _reprs
from .._typing import Array, ArrayLike
from .checks import check_k, check_least, check_same, flags, score_numbers
from .ranks import measure, nan_where, places, ranks, share_in_top


class DiscoveryCurve(NamedTuple):
    """What inspecting the most suspicious examples first finds.

    Attributes:
      inspected: Share of all examples that are inspected, `(N + 1,)` from 0 to 1.
      found: Share of the mislabelled ones that are among them, `(N + 1,)` from 0 to 1.

    Example:
      >>> DiscoveryCurve(jnp.array([0.0, 0.5, 1.0]), jnp.array([0.0, 1.0, 1.0])).found.tolist()
      [0.0, 1.0, 1.0]
    """

    inspected: Array
    found: Array

    def __repr__(self) -> str:
        return _reprs.call(self, f"{_reprs.array(self.found)}, found {_reprs.span(self.found)}")


def auc(suspicion: ArrayLike, flipped: ArrayLike) -> Array:
    r"""Area under the receiver operating characteristic of a search for mislabelled examples.

    $\Pr(s_i > s_j) + \tfrac12 \Pr(s_i = s_j)$ for a mislabelled i and another j (Mann-Whitney); 1/2 is chance.

    Args:
      suspicion: `(N,)`, high where a label is likely to be wrong: the self-influence, which is high for examples that
        the model had to remember; or minus the mean of the scores over queries with labels that are known to be right,
        `-scores.mean(0)`, which is high for examples that harm them.
      flipped: `(N,)`, true where the label is wrong.

    Returns:
      A scalar; NaN if all or none are flipped.

    Raises:
      ValueError: If the lengths differ, `flipped` is not of 0 and 1, or a number is NaN or infinite.

    Example:
      >>> import influence_jax as ij
      >>> float(ij.metrics.auc(jnp.array([0.9, 0.4, 0.4, 0.1]), jnp.array([True, True, False, False])))
      0.875

    Reference: Koh & Liang 2017, arXiv:1703.04730, section 5.4; Pruthi et al. 2020, arXiv:2002.08484, section 4.
    """
    return _auc(*_suspects(suspicion, flipped))


def _suspects(suspicion: ArrayLike, flipped: ArrayLike) -> tuple[Array, Array]:
    suspicion, flipped = score_numbers(suspicion, "suspicion", "(N,)", only="order"), flags(flipped, "flipped", "(N,)")
    check_same("flipped", flipped.shape, suspicion.shape, "one entry for each example of suspicion")
    return suspicion, flipped


@measure
def _auc(suspicion: Array, flipped: Array) -> Array:
    wrong = jnp.sum(flipped).astype(suspicion.dtype)
    right = suspicion.size - wrong
    mean_rank = jnp.sum(jnp.where(flipped, ranks(suspicion), 0)) / wrong
    return nan_where(wrong * right == 0, (mean_rank - (wrong + 1) / 2) / right)


def precision_at_k(suspicion: ArrayLike, flipped: ArrayLike, k: int) -> Array:
    r"""Share of mislabelled examples among the k most suspicious.

    $\frac1k \sum_{i \in \mathrm{top}_k} f_i$ with $f_i$ one where the label is wrong.

    Args:
      suspicion: `(N,)`, high where a label is likely to be wrong, as for `auc`.
      flipped: `(N,)`, true where the label is wrong.
      k: How many are inspected; static.

    Returns:
      A scalar.  Of examples tied for the last places, the mean over their orders.

    Raises:
      TypeError: If `k` is no int.
      ValueError: As `auc`, or if `k` is out of range.

    Example:
      >>> import influence_jax as ij
      >>> float(ij.metrics.precision_at_k(jnp.array([0.9, 0.4, 0.4, 0.1]), jnp.array([True, True, False, False]), 2))
      0.75

    Reference: Manning, Raghavan & Schütze 2008, Introduction to Information Retrieval, section 8.4.
    """
    suspicion, flipped = _suspects(suspicion, flipped)
    check_k(k, suspicion.size)
    return _precision_at_k(suspicion, flipped, k)


@partial(measure, static_argnames="k")
def _precision_at_k(suspicion: Array, flipped: Array, k: int) -> Array:
    return jnp.sum(share_in_top(suspicion, k) * flipped.astype(suspicion.dtype)) / k


def discovery_curve(suspicion: ArrayLike, flipped: ArrayLike) -> DiscoveryCurve:
    r"""Share of the mislabelled examples found against the share of all that are inspected, most suspicious first.

    At the share $k/N$ inspected: $\frac{1}{M} \sum_{i \in \mathrm{top}_k} f_i$ of the M mislabelled ones.

    Args:
      suspicion: `(N,)`, high where a label is likely to be wrong, as for `auc`.
      flipped: `(N,)`, true where the label is wrong.

    Returns:
      A DiscoveryCurve; straight between the ends of a group of ties; `found` is NaN if none are flipped.

    Raises:
      ValueError: As `auc`.

    Example:
      >>> import influence_jax as ij
      >>> curve = ij.metrics.discovery_curve(jnp.array([0.9, 0.1, 0.5, 0.3]), jnp.array([True, True, False, False]))
      >>> curve.inspected.tolist(), curve.found.tolist()
      ([0.0, 0.25, 0.5, 0.75, 1.0], [0.0, 0.5, 0.5, 0.5, 1.0])

    Reference: Koh & Liang 2017, arXiv:1703.04730, section 5.4; Pruthi et al. 2020, arXiv:2002.08484, section 4.
    """
    return _discovery_curve(*_suspects(suspicion, flipped))


@measure
def _discovery_curve(suspicion: Array, flipped: Array) -> DiscoveryCurve:
    dtype, count = suspicion.dtype, suspicion.size
    order = jnp.argsort(-suspicion)
    start, end = places(-suspicion[order])
    found = jnp.concatenate([jnp.zeros(1, dtype), jnp.cumsum(flipped[order].astype(dtype))])
    number = jnp.arange(1, count + 1, dtype=start.dtype)
    into_ties = (number - start).astype(dtype) / (end - start).astype(dtype)
    found = jnp.concatenate([found[:1], found[start] + into_ties * (found[end] - found[start])]) / found[-1]
    inspected = jnp.arange(count + 1).astype(dtype) / count
    return DiscoveryCurve(inspected, nan_where(jnp.any(jnp.isnan(suspicion)), found))


def recall_at_k(scores: ArrayLike, relevant: ArrayLike, k: int) -> Array:
    r"""Share of a query's relevant examples that are among its k highest scores.

    $|\mathrm{top}_k(q) \cap \mathrm{relevant}(q)| \,/\, |\mathrm{relevant}(q)|$.

    Args:
      scores: `(Q, N)`, high is relevant.
      relevant: `(Q, N)`, true where the example is, e.g. states the fact that is asked for.
      k: How many are looked at; static.

    Returns:
      `(Q,)`.  Of examples tied for the last places, the mean over their orders; NaN for a query with none relevant.

    Raises:
      TypeError: If `k` is no int.
      ValueError: If the shapes differ, `k` is out of range, `relevant` is not of 0 and 1, or a score is NaN or
        infinite.

    Example:
      >>> import influence_jax as ij
      >>> scores, relevant = jnp.array([[0.9, 0.5, 0.1]]), jnp.array([[True, False, True]])
      >>> ij.metrics.recall_at_k(scores, relevant, 2).tolist()
      [0.5]

    Reference: Akyürek et al. 2022, arXiv:2205.11482.
    """
    scores, relevant = _retrieved(scores, relevant)
    check_k(k, scores.shape[1])
    return _recall_at_k(scores, relevant, k)


def _retrieved(scores: ArrayLike, relevant: ArrayLike) -> tuple[Array, Array]:
    scores, relevant = score_numbers(scores, "scores", "(Q, N)", only="order"), flags(relevant, "relevant", "(Q, N)")
    check_same("relevant", relevant.shape, scores.shape, "that of scores")
    return scores, relevant


@partial(measure, static_argnames="k")
def _recall_at_k(scores: Array, relevant: Array, k: int) -> Array:
    shares = jax.vmap(lambda row: share_in_top(row, k))(scores)
    wanted = relevant.astype(scores.dtype)
    return jnp.sum(shares * wanted, axis=1) / jnp.sum(wanted, axis=1)


def reciprocal_rank(scores: ArrayLike, relevant: ArrayLike) -> Array:
    r"""One over the place of a query's first relevant example; the mean over queries is the MRR.

    $1 / \min\{\mathrm{rank}_q(i) : i \in \mathrm{relevant}(q)\}$, ranks from 1.

    Args:
      scores: `(Q, N)`, high is relevant.
      relevant: `(Q, N)`, true where the example is.

    Returns:
      `(Q,)`.  Examples that are not relevant come first among ties, so that constant scores find nothing; NaN for a
      query with none relevant.

    Raises:
      ValueError: If the shapes differ, `relevant` is not of 0 and 1, or a score is NaN or infinite.

    Example:
      >>> import influence_jax as ij
      >>> scores = jnp.array([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
      >>> ij.metrics.reciprocal_rank(scores, jnp.array([[True, False, True], [False, True, True]])).tolist()
      [1.0, 0.5]

    Reference: Akyürek et al. 2022, arXiv:2205.11482.
    """
    return _reciprocal_rank(*_retrieved(scores, relevant))


@measure
def _reciprocal_rank(scores: Array, relevant: Array) -> Array:
    best = jnp.max(jnp.where(relevant, scores, -jnp.inf), axis=1, keepdims=True)
    before = jnp.sum(~relevant & (scores >= best), axis=1)
    undefined = ~jnp.any(relevant, axis=1) | jnp.any(jnp.isnan(scores), axis=1)
    return nan_where(undefined, 1 / (1 + before).astype(scores.dtype))


def top_k_overlap(a: ArrayLike, b: ArrayLike, k: int) -> Array:
    r"""Share of a query's k highest scores that two methods, or two runs, have in common.

    $\frac1k |\mathrm{top}_k(a_q) \cap \mathrm{top}_k(b_q)|$.

    Args:
      a: `(Q, N)`.
      b: `(Q, N)`.
      k: How many; static.

    Returns:
      `(Q,)`, about k / N by chance.  Ties for the last places are broken at random in each, and the mean over that is
      taken, so that methods which leave most scores at zero do not agree by leaving them.

    Raises:
      TypeError: If `k` is no int.
      ValueError: If the shapes differ, `k` is out of range, or a score is NaN or infinite.

    Example:
      >>> import influence_jax as ij
      >>> ij.metrics.top_k_overlap(jnp.array([[3.0, 2.0, 1.0, 0.0]]), jnp.array([[3.0, 0.0, 1.0, 2.0]]), 2).tolist()
      [0.5]

    Reference: Fagin, Kumar & Sivakumar 2003, doi:10.1137/S0895480102412856.
    """
    a, b = score_numbers(a, "a", "(Q, N)", only="order"), score_numbers(b, "b", "(Q, N)", only="order")
    check_same("b", b.shape, a.shape, "that of a")
    check_k(k, a.shape[1])
    return _top_k_overlap(a, b, k)


@partial(measure, static_argnames="k")
def _top_k_overlap(a: Array, b: Array, k: int) -> Array:
    in_a, in_b = (jax.vmap(lambda row: share_in_top(row, k))(x) for x in (a, b))
    return jnp.sum(in_a * in_b.astype(in_a.dtype), axis=1) / k


def rank_stability(scores: ArrayLike) -> Array:
    r"""How alike runs rank the examples: mean Spearman correlation over pairs of runs, for each query.

    $\binom{R}{2}^{-1} \sum_{r < r'} \rho_s(s_{rq}, s_{r'q})$ with Spearman's $\rho_s$ over examples.

    Args:
      scores: `(R, Q, N)` of at least two runs, e.g. with other seeds, and at least three examples.

    Returns:
      `(Q,)`; NaN where the scores of a run are constant.

    Raises:
      ValueError: If there are too few runs or examples, or a score is NaN or infinite.

    Example:
      >>> import influence_jax as ij
      >>> ij.metrics.rank_stability(jnp.array([[[1.0, 2.0, 3.0]], [[1.0, 4.0, 9.0]]])).round(3).tolist()
      [1.0]

    Reference: Spearman 1904, doi:10.2307/1412159.
    """
    scores = score_numbers(scores, "scores", "(R, Q, N)", only="order")
    check_least("scores", scores.shape[0], 2, "runs", "stability is between runs")
    check_least("scores", scores.shape[2], 3, "examples", "a correlation of fewer says nothing")
    return _rank_stability(scores)


@measure
def _rank_stability(scores: Array) -> Array:
    runs = scores.shape[0]
    placed = ranks(jnp.moveaxis(scores, -1, 0))  # (N, R, Q)
    centred = placed - jnp.mean(placed, axis=0, keepdims=True)
    length = jnp.sqrt(jnp.sum(centred**2, axis=0, keepdims=True))
    unit = centred / jnp.where(length > 0, length, jnp.nan)
    together = jnp.sum(jnp.sum(unit, axis=1) ** 2, axis=0)  # of all pairs, a run with itself included
    return (together - runs) / (runs * (runs - 1))
