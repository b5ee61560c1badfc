r"""Simple attributions, made of the same parts: gradient similarity, TracIn, RelatIF, TRAK.

The gradient dot product is `Influence(objective, params, Identity(params))`; the others are a few lines each.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from . import tree
from ._mesh import compiled
from ._typing import Array, LossFunction, PyTree
from .batching import check_finite
from .curvature import Identity
from .curvature.projected import Projected
from .influence import Influence
from .objective import LossOnly, Objective, as_objective
from .projections import Projection
from .projections.base import check_projection
from .solvers.damping import check_number


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
    asked = dataclasses.replace(influence, objective=influence.asked, measurement=None)
    return relative(influence, query, train) / _lengths(asked, query)[:, None]


def relative(influence: Influence, query: PyTree, train: PyTree) -> Array:
    r"""RelatIF: scores relative to how much an example matters at all, $s_{qi} / \sqrt{s_{ii}}$.

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

    Reference: Barshan et al. 2020, arXiv:2003.11630, eq. 9.
    """
    return influence.influences(query, train) / _lengths(influence, train)[None]


def _lengths(influence: Influence, batch: PyTree) -> Array:
    squares = influence.self_influences(batch)
    return jnp.sqrt(jnp.where(squares > 0, squares, jnp.nan))


def over_checkpoints(
    scores: Callable[[PyTree], Array],
    checkpoints: PyTree | Sequence[PyTree],
    weights: Sequence[float] | Array | None = None,
) -> Array:
    r"""Scores at several parameters put together, $\sum_t \eta_t\, s(\theta_t)$, or their mean.

    For ensembles of models trained from other seeds, and for checkpoints of one training.

    Args:
      scores: Function of parameters, e.g. `lambda params: influence_at(params).influences(query, train)`.
      checkpoints: Trees of parameters, a list or one tree with leaves `(T, *leaf)`.
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
    models = checkpoints if isinstance(checkpoints, list | tuple) else _unstacked(checkpoints)
    if not models:
        raise ValueError("checkpoints: got none, expected at least one tree of parameters")
    shares = np.full(len(models), 1 / len(models)) if weights is None else np.asarray(weights)
    if shares.shape != (len(models),):
        raise ValueError(f"weights: got shape {shares.shape}, expected ({len(models)},), one for each checkpoint")
    parts = (share * scores(params) for share, params in zip(shares.tolist(), models, strict=True))
    return functools.reduce(jnp.add, parts)


def _unstacked(stack: PyTree) -> list[PyTree]:
    count = tree.count(tree.check_params(stack, "checkpoints"))
    return [jax.tree.map(lambda x, t=t: x[t], stack) for t in range(count)]


def tracin(
    objective: Objective | LossFunction,
    checkpoints: PyTree | Sequence[PyTree],
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
    at = lambda params: Influence(objective, params, Identity(params)).influences(query, train)
    return over_checkpoints(at, checkpoints, learning_rates)


def trak(
    objective: Objective | LossFunction,
    params: PyTree,
    train: PyTree,
    projection: Projection,
    damping: float = 0.0,
) -> Influence:
    r"""TRAK's kernel machine as an influence: $P = R\,(R^\top F R + \lambda I)^{-1} R^\top$, asked for the margin.

    F is the mean of $\nabla m_i \nabla m_i^\top$ with the margin $m = \log(p / (1 - p))$, which a loss
    $\ell = -\log p$ tells; queries are asked for -m, so that a positive score still helps.  An ensemble is a mean over
    models, `over_checkpoints(lambda params: trak(...).influences(query, train), models)`.

    Args:
      objective: Loss of one example, minus the log of the probability of what it should predict.
      params: Leaves `(*leaf)`.
      train: Leaves `(N, ...)`.
      projection: R, from `influence_jax.projections`; its `dim` is to be below N, or damping positive.
      damping: $\lambda$.

    Returns:
      An `Influence`.

    Raises:
      TypeError, ValueError: If an argument is not of that form, or the kernel is singular.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: jnp.log1p(jnp.exp(-z["y"] * (params["w"] @ z["x"])))
      >>> data = {"x": jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), "y": jnp.array([1.0, 1.0, -1.0])}
      >>> params = {"w": jnp.zeros(2)}
      >>> projection = ij.projections.gaussian(params, 2, jax.random.key(0))
      >>> ij.baselines.trak(f, params, data, projection).influences(data, data)[0].round(2)
      Array([ 0.75,  0.  , -0.75], dtype=float...)

    Reference: Park et al. 2023, arXiv:2303.14186, eq. 13 and 15, with the mean over models of the whole.
    """
    objective, params = as_objective(objective), tree.check_params(params)
    check_number(damping, "damping")
    check_projection(projection)
    asked = _with_loss(objective, _NegativeMargin)
    rows = projection.project_grads(asked, params, train)
    check_finite(rows, "train, whose gradients of the margin")
    return Influence(objective, params, Projected(params, projection, _kernel(rows, damping)), measurement=asked)


def _kernel(rows: Array, damping: float) -> Array:
    kernel, singular = _inverse_of_mean(rows, damping)
    if singular:
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


@dataclasses.dataclass(frozen=True)
class _NegativeMargin:
    """Of a loss -log p, the log of (1 - p) / p."""

    loss: Callable[[PyTree, PyTree], Array]

    def __call__(self, output: PyTree, example: PyTree) -> Array:
        loss = self.loss(output, example)
        loss = jnp.maximum(loss, jnp.finfo(loss.dtype).tiny)
        return loss + jnp.log(-jnp.expm1(-loss))


def _with_loss(objective: Objective | LossOnly, wrapper: Callable) -> Objective | LossOnly:
    if isinstance(objective, Objective):
        return dataclasses.replace(objective, loss=wrapper(objective.loss), sample=None)
    return dataclasses.replace(objective, fn=wrapper(objective.fn))
