r"""Simple attributions, made of the same parts: gradient similarity, TracIn, RelatIF, TRAK.

The gradient dot product is `Influence(objective, params, Identity(params))`; the others are a few lines each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import tree
from ._mesh import compiled
from ._sound import Watch, look
from ._typing import Array, LossFunction, PyTree
from .batching import as_batch, check_finite
from .curvature import Identity
from .curvature.projected import Projected
from .influence import Influence
from .objective import Objective, as_objective
from .projections import Projection
from .projections.base import check_projection
from .solvers.damping import check_number

__all__ = ["cosine", "negative_margin", "over_checkpoints", "relative", "tracin", "trak"]


def cosine(influence: Influence, query: PyTree, train: PyTree) -> Array:
    r"""Scores of gradients of unit length, $s_{qi} / \sqrt{s_{qq}\,s_{ii}}$ with lengths measured by P.

    Of an influence with `Identity` the cosine of the two gradients.

    Args:
      influence: Objective, parameters and P.
      query: Leaves `(Q, ...)`.
      train: Leaves `(N, ...)`.

    Returns:
      `(Q, N)`, in [-1, 1]; NaN where a self-influence is not positive.

    Raises:
      TypeError, ValueError: As `Influence.influences`.

    Example:
      >>> import influence_jax as ij
      >>> f, params = lambda params, z: params["w"] @ z, {"w": jnp.ones(2)}
      >>> influence = ij.Influence(f, params, ij.Identity(params))
      >>> ij.baselines.cosine(influence, jnp.array([[2.0, 0.0]]), jnp.array([[5.0, 0.0], [-1.0, 0.0]])).tolist()
      [[1.0, -1.0]]

    Reference: Charpiat et al. 2019, "Input similarity from the neural network perspective".
    """
    _check_influence(influence)
    asked = dataclasses.replace(influence, objective=influence.asked, measurement=None)
    return relative(influence, query, train) / _lengths(asked, query)[:, None]


def relative(influence: Influence, query: PyTree, train: PyTree) -> Array:
    r"""l-RelatIF: scores relative to how much an example's own loss is affected, $s_{qi} / \sqrt{s_{ii}}$.

    Args:
      influence: Objective, parameters and P.
      query: Leaves `(Q, ...)`.
      train: Leaves `(N, ...)`.

    Returns:
      `(Q, N)`; NaN where a self-influence is not positive.

    Raises:
      TypeError, ValueError: As `Influence.influences`.

    Example:
      >>> import influence_jax as ij
      >>> f, params = lambda params, z: params["w"] * z, {"w": jnp.array(1.0)}
      >>> influence = ij.Influence(f, params, ij.Identity(params))
      >>> ij.baselines.relative(influence, jnp.array([2.0]), jnp.array([1.0, 10.0])).tolist()
      [[2.0, 2.0]]

    Reference: Barshan et al. 2020, arXiv:2003.11630, whose other, theta-RelatIF, divides by the length of P g_i.
    """
    _check_influence(influence)
    return influence.influences(query, train) / _lengths(influence, train)[None]


def _check_influence(influence: Any) -> None:
    if not isinstance(influence, Influence):
        raise TypeError(f"influence: got a {type(influence).__name__}, expected an Influence(objective, params, P)")


def _lengths(influence: Influence, batch: PyTree) -> Array:
    squares = influence.self_influences_untold(as_batch(batch, "batch"))
    return jnp.sqrt(jnp.where(squares > 0, squares, jnp.nan))


def over_checkpoints(
    scores: Callable[[PyTree], Array],
    checkpoints: PyTree,
    weights: Sequence[float] | Array | np.ndarray | None = None,
) -> Array:
    r"""Scores at several parameters put together, $\sum_t \eta_t\, s(\theta_t)$, or their mean.

    For ensembles of models trained from other seeds, and for checkpoints of one training.

    Args:
      scores: Function of parameters, e.g. `lambda params: influence_at(params).influences(query, train)`.
      checkpoints: A list of trees of parameters, or one tree with leaves `(T, *leaf)`, which is no list itself.
      weights: $\eta_t$, T numbers; the mean if None.

    Returns:
      What the function returns, put together.

    Raises:
      ValueError: If there are no checkpoints, or not as many weights.

    Example:
      >>> import influence_jax as ij
      >>> ij.baselines.over_checkpoints(lambda params: params["w"] ** 2, {"w": jnp.array([1.0, 3.0])}).item()
      5.0
    """
    models = checkpoints if type(checkpoints) is list else _unstacked(checkpoints)
    if not models:
        raise ValueError("checkpoints: got none, expected at least one tree of parameters")
    if not callable(scores):
        raise TypeError(f"scores: got a {type(scores).__name__}, expected a function of parameters")
    shares = np.full(len(models), 1 / len(models)) if weights is None else _as_shares(weights, "weights", len(models))
    parts = (share * scores(params) for share, params in zip(shares.tolist(), models, strict=True))
    return functools.reduce(jnp.add, parts)


def _as_shares(values: Any, name: str, count: int) -> np.ndarray:
    shares = np.asarray(values)
    if shares.shape != (count,):
        raise ValueError(
            f"{name}: got shape {shares.shape}, expected ({count},), one for each checkpoint; checkpoints are a list "
            "of trees, or one tree with leaves (T, *leaf)"
        )
    if shares.dtype.kind not in "iuf" or not np.isfinite(shares).all():
        raise ValueError(f"{name}: got {values}, expected finite numbers")
    return shares


def _unstacked(stack: PyTree) -> list[PyTree]:
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(tree.check_params(stack, "checkpoints"))}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            f"checkpoints: got leaves of leading axes {sorted(lengths)}, expected a list of trees, or one tree with "
            "leaves (T, *leaf), as Training.checkpoints returns"
        )
    return [jax.tree.map(lambda x, t=t: x[t], stack) for t in range(lengths.pop()[0])]


def tracin(
    objective: Objective | LossFunction,
    checkpoints: PyTree,
    learning_rates: Sequence[float] | Array,
    query: PyTree,
    train: PyTree,
) -> Array:
    r"""TracIn, $\sum_t \eta_t\,\nabla f_q(\theta_t)^\top\nabla\ell_i(\theta_t)$ over checkpoints of a training.

    Args:
      objective: Loss of one example.
      checkpoints: Parameters of the training as it went, a list of trees or one tree with leaves `(T, *leaf)`.
      learning_rates: $\eta_t$, T numbers; one that a checkpoint stands for k steps of, times k.
      query: Leaves `(Q, ...)`.
      train: Leaves `(N, ...)`.

    Returns:
      `(Q, N)`; positive is helpful.

    Raises:
      TypeError, ValueError: As `Influence`, and if there are not as many learning rates as checkpoints.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: 0.5 * (params["w"] - z) ** 2
      >>> checkpoints = {"w": jnp.array([0.0, 1.0])}
      >>> ij.baselines.tracin(f, checkpoints, [1.0, 0.5], jnp.array([2.0]), jnp.array([2.0, 0.0])).tolist()
      [[4.5, -0.5]]

    Reference: Pruthi et al. 2020, arXiv:2002.08484, eq. 1.
    """
    count = len(checkpoints if type(checkpoints) is list else _unstacked(checkpoints))
    rates = _as_shares(learning_rates, "learning_rates", count)
    at = lambda params: Influence(objective, params, Identity(params)).influences(query, train)
    return over_checkpoints(at, checkpoints, rates)


def trak(
    objective: Objective | LossFunction,
    measurement: Objective | LossFunction,
    params: PyTree,
    train: PyTree,
    projection: Projection,
    damping: float = 0.0,
) -> Influence:
    r"""TRAK's kernel machine as an influence: $P = R\,(R^\top F R + \lambda I)^{-1} R^\top$, asked for the margin.

    F is the mean of $\nabla m_i \nabla m_i^\top$ over the training examples, with m what is asked: the negative margin
    $\log((1 - p) / p)$ of the right label, so that a positive score still helps.  With $\nabla\ell_i = (1 - p_i)\nabla
    m_i$ these are TRAK's scores times N.  An ensemble is a mean over models,
    `over_checkpoints(lambda params: trak(...).influences(query, train), models)`.

    Args:
      objective: Loss of one example, $-\log p$.
      measurement: `f(params, example)`, the negative margin: `negative_margin` of the logits and the label.
      params: Leaves `(*leaf)`.
      train: Leaves `(N, ...)`.
      projection: R, from `influence_jax.projections`; its `dim` is to be below N, or damping positive.
      damping: $\lambda$; 0 as in the paper, where the projection does its work, and a singular kernel is refused.

    Returns:
      An `Influence`.

    Raises:
      TypeError, ValueError: If an argument is not of that form, or the kernel is singular.

    Example:
      >>> import influence_jax as ij
      >>> logits = lambda params, z: jnp.stack([0.0, 1.0]) * (params["w"] @ z["x"])
      >>> f = lambda params, z: jax.nn.logsumexp(logits(params, z)) - logits(params, z)[z["y"]]
      >>> m = lambda params, z: ij.baselines.negative_margin(logits(params, z), z["y"])
      >>> data = {"x": jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), "y": jnp.array([1, 1, 0])}
      >>> params = {"w": jnp.zeros(2)}
      >>> projection = ij.projections.gaussian(params, 2, jax.random.key(0))
      >>> ij.baselines.trak(f, m, params, data, projection).influences(data, data)[0].round(2)
      Array([ 0.75,  0.  , -0.75], dtype=float...)

    Reference: Park et al. 2023, arXiv:2303.14186, eq. 13 and 15, with the mean over models of the whole.
    """
    objective, measurement = as_objective(objective), as_objective(measurement, "measurement")
    params = tree.check_params(params)
    check_number(damping, "damping")
    check_projection(projection)
    rows = projection.project_grads(measurement, params, train)
    watch = Watch(measurement, params, "train", noun="measurement")
    watch.refuses = True
    watch.batch(look(rows, 0)._replace(flat=False), as_batch(train, "train"))
    check_finite(rows, "train, whose gradients of the measurement")
    return Influence(objective, params, Projected(params, projection, _kernel(rows, damping)), measurement=measurement)


def negative_margin(logits: Array, label: Array) -> Array:
    r"""The log-odds against a label, $\log\sum_{j \neq y} e^{o_j} - o_y = \log\frac{1 - p_y}{p_y}$, exact however sure.

    Args:
      logits: `(C,)`.
      label: y, an integer.

    Returns:
      A number; low where the label is likely.

    Example:
      >>> negative_margin(jnp.array([0.0, 40.0]), 1).item()
      -40.0

    Reference: Park et al. 2023, arXiv:2303.14186, section 3.
    """
    own = jnp.arange(logits.shape[-1]) == label
    return jax.nn.logsumexp(jnp.where(own, -jnp.inf, logits)) - logits[label]


def _kernel(rows: Array, damping: float) -> Array:
    kernel, singular = _inverse_of_mean(rows, damping)
    if not isinstance(singular, jax.core.Tracer) and singular:
        raise ValueError(
            f"projection: its kernel of {len(rows)} examples in {rows.shape[1]} dimensions is singular; use a smaller "
            "dim, or a positive damping"
        )
    return kernel


@compiled
def _inverse_of_mean(rows: Array, damping: Array | float) -> tuple[Array, Array]:
    """The damped inverse of the mean of outer products, and whether there is none to the precision of the numbers."""
    mean = jnp.matmul(rows.T, rows, precision=tree.HIGHEST) / len(rows)
    values, vectors = jnp.linalg.eigh(mean + jnp.asarray(damping, mean.dtype) * jnp.eye(len(mean), dtype=mean.dtype))
    singular = values[0] <= len(mean) * jnp.finfo(mean.dtype).eps * values[-1]
    return jnp.matmul(vectors / values[None], vectors.T, precision=tree.HIGHEST), singular
