r"""Unrolled differentiation: what a training does with every example's weight, differentiated step by step.

Exact for this training, with its start, its order and its number of steps, where influence functions speak of the
optimum that a training may never reach.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from . import _steps
from ._memory import memory_errors
from ._mesh import compiled
from ._typing import Array, ArrayLike, Key, LossFunction, PyTree
from .batching import as_batch, check_chunk, check_key, map_rows
from .objective import LossOnly, Objective, as_objective
from .training import WHY_KEY, Training, about_losses, check_query

__all__ = ["influences"]

KNOBS = "fewer queries at once (rhs_chunk=), or smaller batches (batch_size= of training)"


def influences(
    training: Training,
    query: PyTree,
    weights: ArrayLike | None = None,
    *,
    key: Key,
    measurement: Objective | LossFunction | None = None,
    rhs_chunk: int | None = None,
) -> Array:
    r"""Influence of every training example on every query, by differentiating the training itself.

    $s_{qi} = -W\, \partial f_q(\theta_T(w)) / \partial w_i$ with $W = \sum_j w_j$ and $\theta_T(w)$ what the training
    returns.  Positive: training on example i lowers the loss of query q.  One more unit of weight on example i
    changes the query's loss by $-s_{qi}/W$.  A step minimises a mean over the weights, so every row sums to zero with
    them, and near the optimum it is the row that influence functions give, less its mean.  With weights of one, leaving
    example i out changes the query's loss by about $s_{qi}/(N - 1)$, in which the other examples of its batches count
    more; `metrics.predicted_changes` says so for any subset, with the default `removal="mean"`.

    Takes about twice the time of the training for each query, and memory that grows with the square root of the number
    of steps, beside four bytes for each example and epoch.  What a training returns is a pure function: for derivatives
    in anything else, `jax.grad` does.

    Args:
      training: Made by `training(..., batches="shared")`, or without batches.
      query: Leaves `(Q, ...)`.
      weights: Where to differentiate, `(N,)`; ones if None.
      key: The random key of the training.
      measurement: What is asked of a query, `f(params, example) -> scalar`, if not its loss.
      rhs_chunk: Queries at once, of which each group runs the training again; four on CPU if None.

    Returns:
      Scores `(Q, N)`, float32 or wider.

    Raises:
      TypeError, ValueError: If an argument is not of that form, the batches of the training depend on the weights,
        class numbers of queries are out of range, or the training or its derivative is not finite; the last is not
        noticed under tracing.

    Example:
      >>> import influence_jax as ij
      >>> import optax
      >>> from influence_jax import unrolled
      >>> from influence_jax.training import training
      >>> f = lambda params, z: 0.5 * (params["mean"] - z) ** 2
      >>> data = jnp.array([1.0, 2.0, 6.0])
      >>> train = training(f, optax.sgd(0.5), {"mean": jnp.array(0.0)}, data, epochs=40)
      >>> unrolled.influences(train, jnp.array([4.0]), key=jax.random.key(0)).round(4).tolist()
      [[-2.0, -1.0, 3.0]]

    Reference: Maclaurin et al. 2015, arXiv:1502.03492; Hara et al. 2019, arXiv:1906.08473; Ilyas & Engstrom 2025,
    arXiv:2504.16430.
    """
    if not isinstance(training, Training):
        raise TypeError(f"training: got a {type(training).__name__}, expected what influence_jax.training returns")
    if not training.is_differentiable:
        raise ValueError(
            f"training: got {training!r}, whose batches depend on the weights, so that there is no derivative; make it "
            'with batches="shared"'
        )
    if training.batch_size == 1 and training.count > 1:
        raise ValueError(
            f"training: got {training!r}, but the mean over a batch of one does not depend on its weight, so that "
            "every score would be 0; use batch_size=2 or more"
        )
    check_chunk(rhs_chunk, "rhs_chunk")
    query = as_batch(query, "query")
    weights = jnp.ones(training.count) if weights is None else _steps.check_weights(weights, training.count)
    if not isinstance(weights, jax.core.Tracer) and not np.any(np.asarray(weights)):
        raise ValueError("weights: all are 0, expected some above: without any the training makes no step")
    asked = training.objective if measurement is None else as_objective(measurement, "measurement")
    check_query(training, asked, query)
    key = check_key(key, WHY_KEY)
    with memory_errors("unrolled.influences", KNOBS):
        weights = weights.astype(jnp.result_type(float))  # a mask, too, is a place to differentiate at
        scores, trained, differentiated = _influences(training, query, weights, key, asked, rhs_chunk)
        if not isinstance(scores, jax.core.Tracer):
            about = lambda *of: about_losses(training, weights, *of)
            _check_finite(bool(trained), bool(differentiated), training, lambda: about() or about(asked, query))
    return scores


@partial(compiled, static_argnames="rhs_chunk")
def _influences(
    training: Training, query: PyTree, weights: Array, key: Key, asked: Objective | LossOnly, rhs_chunk: int | None
) -> tuple[Array, Array, Array]:
    """Scores, and whether the trained parameters and the scores are finite."""
    params, pull = jax.vjp(lambda w: training(w, key), weights)
    of_one = lambda example: pull(jax.grad(asked)(params, example))[0]
    scores = -jnp.sum(weights) * map_rows(of_one, query, rhs_chunk)
    trained = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)])
    known = False if training.lost is None else training.lost
    return scores, jnp.all(trained), jnp.all(jnp.where(known, True, jnp.isfinite(scores)))


def _check_finite(trained: bool, differentiated: bool, training: Training, why: Callable[[], str]) -> None:
    if trained and differentiated:
        return
    told = why()
    if told:
        raise ValueError(f"training: what comes of {training!r} is NaN or infinite; {told}")
    if not trained:
        raise ValueError(
            f"training: the parameters are NaN or infinite after the last step of {training!r}; take smaller steps, or "
            "look for numbers in the data that are not finite"
        )
    if not differentiated:
        raise ValueError(
            f"training: the derivative of {training!r} is NaN or infinite, though the trained parameters are finite. "
            "Adam and its kind divide by the root of a second moment, which has no derivative at zero, where a "
            "parameter without gradient has it: pass eps_root, e.g. optax.adam(1e-3, eps_root=1e-8)"
        )
