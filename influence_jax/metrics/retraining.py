"""Scores held against what retraining did: linear datamodeling score, its ceiling, counterfactual removal."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import tree
from .._mesh import compiled
from .._typing import Array, ArrayLike, Key
from ..batching import check_key, check_positive, map_over
from .checks import check_least, check_method, check_same, flags, numbers
from .ranks import check_rows, correlate

LARGEST_FIRST = {"helpful": -1, "harmful": 1}


def predicted_changes(scores: ArrayLike, masks: ArrayLike) -> Array:
    r"""What scores predict that training on a subset changes: $\frac1N \sum_{i \notin S_s} \tau_{qi}$.

    A positive score means that the example lowers what is measured of the query, so that leaving it out raises it.
    It is $-\frac1N \sum_{i \in S_s} \tau_{qi}$ up to a number that is the same for all subsets, and exact where few
    examples are left out, as a sum over those that are kept is not.

    Args:
      scores: `(Q, N)`, positive where training on the example lowers what is measured.
      masks: `(S, N)`, true where the example is kept.

    Returns:
      Predicted changes against training on everything, `(S, Q)`, to first order.

    Raises:
      ValueError: If the shapes do not fit, a mask is not of 0 and 1, or a score is NaN or infinite.

    Example:
      >>> import influence_jax as ij
      >>> ij.metrics.predicted_changes(jnp.array([[1.0, -3.0]]), jnp.array([[True, False], [False, True]])).tolist()
      [[-1.5], [0.5]]

    Reference: Koh & Liang 2017, arXiv:1703.04730, section 2.1; of groups: Koh et al. 2019, arXiv:1905.13289.
    """
    scores, masks = numbers(scores, "scores", "(Q, N)"), flags(masks, "masks", "(S, N)")
    hint = f"one entry for each example of scores {scores.shape}; scores are (Q, N) and masks (S, N)"
    check_same("masks", masks.shape, (masks.shape[0], scores.shape[1]), hint)
    return _predicted_changes(scores, masks)


@compiled
def _predicted_changes(scores: Array, masks: Array) -> Array:
    return tree.gram((~masks).astype(scores.dtype), scores) / scores.shape[1]


def lds(scores: ArrayLike, masks: ArrayLike, outcomes: ArrayLike, *, method: str = "spearman") -> Array:
    r"""Linear datamodeling score of each query: do scores predict what training on subsets gives?

    $\mathrm{LDS}(q) = \rho_s\bigl(-\sum_{i \in S_s} \tau_{qi},\; f_q(\theta(S_s))\bigr)$, the rank correlation over
    subsets of the sum of the kept examples' scores with what was measured; 1 is best.  The minus is there because a
    positive score means that the example *lowers* what is measured.  Negate scores of methods for which positive means
    that it raises it, as TRAK's for a margin.

    With leave-one-out (or leave-k-out) masks and `method="pearson"` this is the leave-one-out (leave-k-out)
    correlation of predicted and actual changes; the outcome without any removal does not matter to it.

    Args:
      scores: `(Q, N)`, positive where training on the example lowers what is measured.
      masks: `(S, N)`, true where the example is kept; at least three subsets.
      outcomes: What was measured of each query after training on each subset, `(S, Q)`, or `(S, K, Q)` with K seeds,
        whose mean is taken first.
      method: `"spearman"` or `"pearson"`.

    Returns:
      `(Q,)`; NaN for a query whose predictions or outcomes are the same for all subsets, to the last bit.

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
    return correlate(*predicted_and_measured(scores, masks, outcomes), method)


def predicted_and_measured(scores: Any, masks: Any, outcomes: Any) -> tuple[Array, Array]:
    """Checked predictions and outcomes without their axis of seeds, `(S, Q)` each."""
    predicted = predicted_changes(scores, masks)
    outcomes = numbers(outcomes, "outcomes", "(S, Q)", "(S, K, Q)")
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
    outcomes = numbers(outcomes, "outcomes", "(S, K, Q)")
    check_rows("outcomes", len(outcomes), "subsets")
    check_least("outcomes", outcomes.shape[1], 2, "seeds", "train each subset with more")
    return _seed_agreement(outcomes, key, splits, method)


@partial(compiled, static_argnames=("splits", "method"))
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
    more = seeds / (seeds // 2)
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
    scores = numbers(scores, "scores", "(Q, N)", "(N,)")
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
