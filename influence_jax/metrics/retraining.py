"""Scores held against what retraining did: linear datamodeling score, its ceiling, counterfactual removal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import tree
from .._mesh import compiled
from .._typing import Array, ArrayLike, Key
from ..batching import check_key, check_positive, map_over
from .checks import check_least, check_method, check_removal, check_same, flags, numbers, score_numbers
from .ranks import check_rows, correlate, measure, nan_where

LARGEST_FIRST = {"helpful": -1, "harmful": 1}


def predicted_changes(scores: ArrayLike, masks: ArrayLike, *, removal: str = "mean") -> Array:
    r"""What scores predict that leaving examples out of the training changes, against training on all N.

    A positive score means that the example lowers what is measured of the query, so that leaving it out raises it.  By
    how much depends on what the training does with what is left.  With m examples left out, $i \in R$:

    * `removal="mean"`: it minimises the mean loss of the N - m that are left, as `retrain.training` and every loop over
      batches do: $\Delta_q = \frac{1}{N - m} \sum_{i \in R} (\tau_{qi} - \bar\tau_q)$ with
      $\bar\tau_q = \frac1N \sum_{i=1}^N \tau_{qi}$.
    * `removal="sum"`: it minimises the sum of their losses and a penalty that stays, as scikit-learn's `Ridge` and
      `LogisticRegression` do: $\Delta_q = \frac1N \sum_{i \in R} \tau_{qi}$, as if N were still divided by.

    With $\tau_{qi} = \nabla f_q^\top P\, g_i$ and P the inverse curvature, one Newton step changes the query by
    $-\nabla f_q^\top P$ times the gradient of the new objective at the parameters of before.  There the mean gradient
    and that of the penalty cancel, $\bar g + \nabla r = 0$, but neither need be 0.  For the mean over the others it is
    $\frac{1}{N - m}(N \bar g - \sum_R g_i) + \nabla r = -\frac{1}{N - m} \sum_R (g_i - \bar g)$, for their sum over N
    $\bar g - \frac1N \sum_R g_i + \nabla r = -\frac1N \sum_R g_i$.  What is neglected is of order $(m / N)^2$.

    Args:
      scores: `(Q, N)` of all training examples, which weigh the same, positive where training on the example lowers
        what is measured, without a factor 1/N.
      masks: `(S, N)`, true where the example is kept.
      removal: `"mean"` or `"sum"`: what the training minimises when examples are left out.

    Returns:
      Predicted changes against training on everything, `(S, Q)`, in the unit of what is measured, to first order;
      positive: it rises.  Under tracing NaN for a query with a NaN among its scores, and for the mean over none.

    Raises:
      ValueError: If the shapes do not fit, a mask is not of 0 and 1 or keeps nothing to take a mean of, a score is NaN
        or infinite, or there is no such removal.

    Example:
      >>> import influence_jax as ij
      >>> scores, masks = jnp.array([[1.0, -3.0]]), jnp.array([[True, False], [False, True]])
      >>> ij.metrics.predicted_changes(scores, masks).tolist()
      [[-2.0], [2.0]]
      >>> ij.metrics.predicted_changes(scores, masks, removal="sum").tolist()
      [[-1.5], [0.5]]

    Reference: Koh & Liang 2017, arXiv:1703.04730, section 2.1; of groups: Koh et al. 2019, arXiv:1905.13289.
    """
    check_removal(removal)
    scores, masks = score_numbers(scores, "scores", "(Q, N)"), flags(masks, "masks", "(S, N)")
    hint = f"one entry for each example of scores {scores.shape}; scores are (Q, N) and masks (S, N)"
    check_same("masks", masks.shape, (masks.shape[0], scores.shape[1]), hint)
    if removal == "mean" and not isinstance(masks, jax.core.Tracer):
        empty = np.flatnonzero(~np.asarray(masks).any(axis=1))
        if empty.size:
            raise ValueError(
                f"masks: got {empty.size} subsets that keep no example, the first of them {empty[0]}, but there is no "
                "mean over none; leave them out, if masks are true where the example is kept, as they should be"
            )
    return _predicted_changes(scores, masks, removal)


@partial(compiled, static_argnames="removal")
def _predicted_changes(scores: Array, masks: Array, removal: str) -> Array:
    removed, count = (~masks).astype(scores.dtype), scores.shape[1]
    if removal == "sum":
        return tree.gram(removed, scores) / count
    # Any number may be taken off a query's scores first, for it cancels: the score nearest to their mean, so that equal
    # scores predict exactly nothing.  N (sum over the removed) - m (sum over all), of whole numbers whole, keeps ties.
    nearest = jnp.argmin(jnp.abs(scores - jnp.mean(scores, axis=1, keepdims=True)), axis=1)
    scores = scores - lax.stop_gradient(jnp.take_along_axis(scores, nearest[:, None], axis=1))
    left_out = jnp.sum(removed, axis=1, keepdims=True)
    difference = count * tree.gram(removed, scores) - left_out * jnp.sum(scores, axis=1)[None]
    divisor = jnp.broadcast_to(count * jnp.maximum(count - left_out, 1), difference.shape)
    # The barrier keeps the compiler from multiplying by a reciprocal, which rounds twice and breaks ties.
    return nan_where(left_out == count, difference / lax.optimization_barrier(divisor))


def lds(
    scores: ArrayLike, masks: ArrayLike, outcomes: ArrayLike, *, method: str = "spearman", removal: str = "mean"
) -> Array:
    r"""Linear datamodeling score of each query: do scores predict what training on subsets gives?

    $\mathrm{LDS}(q) = \rho_s\bigl(\Delta_{sq},\; f_q(\theta(S_s))\bigr)$, the rank correlation over subsets of
    `predicted_changes` with what was measured; 1 is best.  Among subsets of one size both kinds of removal rank as
    $-\sum_{i \in S_s} \tau_{qi}$ does, the sum of the kept examples' scores, with a minus because a positive score
    means that the example *lowers* what is measured.  Where sizes differ, it matters what the training minimises.
    Negate scores of methods for which positive means that it raises it, as TRAK's for a margin.

    With leave-one-out (or leave-k-out) masks and `method="pearson"` this is the leave-one-out (leave-k-out)
    correlation of predicted and actual changes; the outcome without any removal does not matter to it.

    Args:
      scores: `(Q, N)`, positive where training on the example lowers what is measured.
      masks: `(S, N)`, true where the example is kept; at least three subsets.
      outcomes: What was measured of each query after training on each subset, `(S, Q)`, or `(S, K, Q)` with K seeds,
        whose mean is taken first.
      method: `"spearman"` or `"pearson"`.
      removal: `"mean"` or `"sum"`, as for `predicted_changes`.

    Returns:
      `(Q,)`; NaN for a query whose predictions or outcomes are the same for all subsets, to the last bit: it tells
      nothing, and `lds_summary` leaves it out.

    Raises:
      ValueError: If shapes do not fit, there are fewer than three subsets, a mask is not of 0 and 1, or a number is NaN
        or infinite.

    Example:
      >>> import influence_jax as ij
      >>> scores, masks = jnp.array([[3.0, 1.0, 2.0]]), ~jnp.eye(3, dtype=bool)
      >>> loss_without_each = jnp.array([[0.9], [0.2], [0.4]])
      >>> ij.metrics.lds(scores, masks, loss_without_each).round(3).tolist()
      [1.0]

    Reference: Park et al. 2023, arXiv:2303.14186, section 2; leave-one-out: Koh & Liang 2017, arXiv:1703.04730,
    section 4.1.
    """
    check_method(method)
    return correlate(*predicted_and_measured(scores, masks, outcomes, removal), method)


def predicted_and_measured(scores: Any, masks: Any, outcomes: Any, removal: str) -> tuple[Array, Array]:
    """Return checked predictions and outcomes without their axis of seeds, `(S, Q)` each."""
    predicted = predicted_changes(scores, masks, removal=removal)
    outcomes = numbers(outcomes, "outcomes", "(S, Q)", "(S, K, Q)", only="differences")
    hint = f"(S, Q) or (S, K, Q) with S from masks and Q from scores; got {outcomes.shape} in all"
    check_same("outcomes", (outcomes.shape[0], outcomes.shape[-1]), predicted.shape, hint)
    check_rows("masks", len(predicted), "subsets")
    return predicted, over_seeds(outcomes)


def over_seeds(outcomes: Array) -> Array:
    """Mean over the middle axis, if there is one."""
    return outcomes if outcomes.ndim == 2 else jnp.mean(outcomes, axis=1)


def seed_agreement(outcomes: ArrayLike, *, key: Key, splits: int = 20, method: str = "spearman") -> Array:
    r"""How well half of the seeds predict the other half: correlation over subsets of their means.

    Averaged over random splits of the seeds into two disjoint halves of $\lfloor K/2 \rfloor$.

    $\mathrm{corr}_s\bigl(\frac1h \sum_{k \in A} y_{skq}, \frac1h \sum_{k \in B} y_{skq}\bigr)$ with outcomes y of
    halves A and B.

    Args:
      outcomes: `(S, K, Q)`, at least three subsets and two seeds.
      key: Random key of the splits.
      splits: How many.
      method: `"spearman"` or `"pearson"`.

    Returns:
      `(Q,)`; NaN where a half's means are the same for all subsets.

    Raises:
      ValueError: If there are too few subsets or seeds, or a number is NaN or infinite.

    Example:
      >>> import influence_jax as ij
      >>> without_noise = jnp.tile(jnp.arange(5.0)[:, None, None], (1, 4, 2))
      >>> ij.metrics.seed_agreement(without_noise, key=jax.random.key(0)).round(3).tolist()
      [1.0, 1.0]

    Reference: Spearman 1910, Brown 1910, British Journal of Psychology 3.
    """
    check_method(method)
    check_positive(splits, "splits")
    check_key(key, "seeds are split at random; pass key=")
    outcomes = numbers(outcomes, "outcomes", "(S, K, Q)", only="differences")
    check_rows("outcomes", len(outcomes), "subsets")
    check_least("outcomes", outcomes.shape[1], 2, "seeds", "train each subset with more")
    return _seed_agreement(outcomes, key, splits, method)


@partial(measure, static_argnames=("splits", "method"))
def _seed_agreement(outcomes: Array, key: Key, splits: int, method: str) -> Array:
    half = outcomes.shape[1] // 2

    def of_split(key: Key) -> Array:
        mixed = jax.random.permutation(key, outcomes, axis=1)
        return correlate(jnp.mean(mixed[:, :half], axis=1), jnp.mean(mixed[:, half : 2 * half], axis=1), method)

    return jnp.mean(map_over(of_split, jax.random.split(key, splits), chunk=1), axis=0)


def seed_ceiling(outcomes: ArrayLike, *, key: Key, splits: int = 20, method: str = "spearman") -> Array:
    r"""The highest LDS that the noise of the seeds allows: that of a method which predicts the mean over all seeds.

    From the agreement r of two halves of $h = \lfloor K/2 \rfloor$ seeds: $\sqrt{R}$ with
    $R = \frac{(K/h)\,r}{1 + (K/h - 1)\,r}$, which is how well the mean of K seeds would agree with that of K others
    (Spearman-Brown), and $\sqrt{R}$ how well it agrees with the mean over infinitely many.  Exact for Pearson and noise
    that does not depend on the subset, an estimate otherwise, and itself noisy for few subsets.

    Args:
      outcomes: `(S, K, Q)`, at least three subsets and two seeds.
      key: Random key of the splits.
      splits: How many.
      method: `"spearman"` or `"pearson"`, that of the scores to compare.

    Returns:
      `(Q,)`, 0 where the halves do not agree at all; NaN as in `seed_agreement`.

    Raises:
      ValueError: As `seed_agreement`.

    Example:
      >>> import influence_jax as ij
      >>> without_noise = jnp.tile(jnp.arange(5.0)[:, None, None], (1, 4, 2))
      >>> ij.metrics.seed_ceiling(without_noise, key=jax.random.key(0)).round(3).tolist()
      [1.0, 1.0]

    Reference: Spearman 1910, Brown 1910, British Journal of Psychology 3.
    """
    agreement = seed_agreement(outcomes, key=key, splits=splits, method=method)
    seeds = np.shape(outcomes)[1]
    return _of_longer(agreement, seeds / (seeds // 2))


@measure
def _of_longer(agreement: Array, more: Array) -> Array:
    """Return the root of the agreement of means over `more` times as many seeds."""
    agreement = jnp.maximum(agreement, 0)
    return jnp.sqrt(more * agreement / (1 + (more - 1) * agreement))


def removal_masks(scores: ArrayLike, counts: Sequence[int], *, remove: str = "helpful") -> Array:
    """Subsets without the most helpful, or most harmful, examples of each query.

    Train on them, e.g. `masks.reshape(-1, N)` for all queries at once, and look at `own_outcomes`.

    Args:
      scores: `(Q, N)`, positive is helpful; or `(N,)`, such as a mean over queries.
      counts: C numbers of examples to remove, 0 (none) to N - 1 each.
      remove: `"helpful"`, highest scores first, or `"harmful"`, lowest first; of equal scores the lower index.

    Returns:
      `(Q, C, N)`, or `(C, N)`, true where the example is kept.

    Raises:
      ValueError: If a count is out of range, there is no such kind, or a score is NaN or infinite.

    Example:
      >>> import influence_jax as ij
      >>> ij.metrics.removal_masks(jnp.array([0.5, -1.0, 2.0]), [1, 2]).tolist()
      [[True, True, False], [False, True, False]]

    Reference: Ilyas et al. 2022, arXiv:2202.00622, section 4; Bae et al. 2024, arXiv:2405.12186.
    """
    if not isinstance(remove, str) or remove not in LARGEST_FIRST:
        raise ValueError(f"remove: got {remove!r}, expected one of {list(LARGEST_FIRST)}")
    scores = score_numbers(scores, "scores", "(Q, N)", "(N,)", only="order")
    removed = _counts(counts)
    if removed.max() >= scores.shape[-1]:
        raise ValueError(f"counts: got {counts}, expected 0 to {scores.shape[-1] - 1}, for there is nothing beyond")
    order = jnp.argsort(LARGEST_FIRST[remove] * scores, axis=-1, stable=True)
    place = jnp.argsort(order, axis=-1)[..., None, :]
    return place >= jnp.asarray(removed, place.dtype).reshape((1,) * (scores.ndim - 1) + (-1, 1))


def _counts(counts: Any) -> np.ndarray:
    found = np.asarray(counts)
    if found.ndim != 1 or found.size == 0 or found.dtype.kind not in "iu" or found.min() < 0:
        raise ValueError(f"counts: got {counts!r}, expected a list of ints from 0 on, e.g. [10, 20, 40]")
    return found


def own_outcomes(outcomes: ArrayLike) -> Array:
    """What was measured of each query after the removal of *its* examples.

    Less what was measured without removal, it is the counterfactual change: positive where the removal of helpful
    examples did raise the loss.

    Args:
      outcomes: `(Q C, Q)` or, with K seeds whose mean is taken, `(Q C, K, Q)`: of all queries after training on
        `removal_masks(scores, counts).reshape(-1, N)`.

    Returns:
      `(Q, C)`.

    Raises:
      ValueError: If the number of subsets is no multiple of that of the queries, or a number is NaN or infinite.

    Example:
      >>> import influence_jax as ij
      >>> loss = jnp.array([[7, 1], [9, 1], [2, 3], [2, 6]])  # two queries, one and two examples removed
      >>> ij.metrics.own_outcomes(loss).tolist()
      [[7.0, 9.0], [3.0, 6.0]]
    """
    outcomes = over_seeds(numbers(outcomes, "outcomes", "(Q C, Q)", "(Q C, K, Q)"))
    subsets, queries = outcomes.shape
    if subsets % queries:
        raise ValueError(
            f"outcomes: got {subsets} subsets and {queries} queries, expected C subsets for each query, in the order "
            "of removal_masks(scores, counts).reshape(-1, N)"
        )
    return jnp.einsum("qcq->qc", outcomes.reshape(queries, -1, queries))


def brittleness(flipped: ArrayLike, counts: Sequence[int]) -> Array:
    r"""The smallest number of removed examples that flips a query's prediction.

    $\min\{n_c : \mathrm{flipped}_{qc}\}$ over the columns c, with $n_c$ removed examples each.

    Args:
      flipped: `(Q, C)`, whether the prediction differs after removing so many of the query's examples, e.g.
        `own_outcomes(margins) < 0`.
      counts: The C numbers of examples removed, in any order.

    Returns:
      `(Q,)`, infinite where none of them flips it; the median over queries is finite as long as half of them flip.

    Raises:
      ValueError: If the lengths differ, or `flipped` is not of 0 and 1.

    Example:
      >>> import influence_jax as ij
      >>> ij.metrics.brittleness(jnp.array([[False, True], [False, False]]), [10, 20]).tolist()
      [20.0, inf]

    Reference: Ilyas et al. 2022, arXiv:2202.00622, section 4 (size of the data support).
    """
    flipped, removed = flags(flipped, "flipped", "(Q, C)"), _counts(counts)
    check_same("counts", removed.shape, flipped.shape[1:], f"one for each column of flipped {flipped.shape}")
    return jnp.min(jnp.where(flipped, jnp.asarray(removed, jnp.result_type(float)), jnp.inf), axis=1)
