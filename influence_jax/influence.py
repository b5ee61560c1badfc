r"""Influence: what each training example did to each query, through one linear operator.

$\mathrm{score}_{qi} = \nabla f_q^\top\, P\, \nabla\ell_i$ for up-weighting and $\nabla f_q^\top\, P\,
\partial_x\nabla\ell_i$ for perturbing inputs, with $P$ any linear operator on parameters: an inverse curvature for
influence functions, the identity for gradient similarity.  A positive score means that training on the example lowers
the query's loss.
"""

from __future__ import annotations

import dataclasses
import enum
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import tree
from ._jaxpr_compat import matmul_flops
from ._pytree import dataclass, set_field, static
from ._typing import Array, LossFunction, PyTree
from .batching import as_batch, check_chunk, chunk_for, map_chunks, map_over, scan_chunks
from .curvature import LinearOperator
from .gradients import _jacobian_product, _mixed_product, _per_example_grads, check_wrt
from .objective import LossOnly, Objective, as_objective

# A product with per-example gradients costs what this many directional derivatives do, plus this many operations per
# parameter for writing and reading the gradients; fitted to MLPs, a CNN and a transformer on CPU.
GRADIENT_PASSES = 3
OPERATIONS_PER_ENTRY = 150


class InfluenceMode(enum.StrEnum):
    """What is done to a training example: weighted up, or its input perturbed."""

    Up = "up"
    Perturbation = "perturbation"


class TopK(NamedTuple):
    """The most influential training examples of each query.

    Attributes:
      values: Scores `(Q, k)`, descending.
      indices: Places in the training batch, `(Q, k)` int32.
    """

    values: Array
    indices: Array


@dataclass
class Influence:
    r"""The interaction map between queries and training examples through an operator P.

    Scores have rows for queries and columns for training examples, $s_{qi} = \nabla f_q^\top P \nabla\ell_i$, in
    float32 or wider.  Positive: training on example i lowers the loss of query q (helpful).  No factor 1/N: removing
    example i changes the query's loss by about $s_{qi}/N$ when P inverts the curvature of the mean loss.

    Args:
      objective: Loss of a training example: an `Objective` or a bare `f(params, example) -> scalar`.
      params: Where the derivatives are taken, leaves `(*leaf)`.
      inverse: The operator P, e.g. `invert(GGN(...), CG(1e-3))` or `Identity(params)`.
      measurement: What is asked of a query, `f(params, example) -> scalar`, if not its loss; e.g. a logit margin.
        Scores are then the change of the measurement, with the sign of a loss.
      chunk: Training examples handled at once; chosen from the sizes if None.
      rhs_chunk: Factors handled at once in directional derivatives; one on CPU if None.

    Raises:
      TypeError, ValueError: If an argument is not of that form, or P does not act on `params`.

    Example:
      >>> import influence_jax as ij
      >>> objective = ij.Objective(lambda p, z: p["w"] * z["x"], lambda out, z: 0.5 * (out - z["y"]) ** 2)
      >>> params, data = {"w": jnp.array(1.0)}, {"x": jnp.array([1.0, 2.0]), "y": jnp.array([2.0, 1.0])}
      >>> influence = ij.Influence(objective, params, ij.invert(ij.GGN(objective, params, data), ij.Direct()))
      >>> influence.influences(data, data).round(2).tolist()
      [[0.4, -0.8], [-0.8, 1.6]]

    Reference: Koh & Liang 2017, arXiv:1703.04730, eq. 2 and 5, with the opposite sign.
    """

    objective: Objective | LossOnly | LossFunction
    params: PyTree
    inverse: LinearOperator
    measurement: Objective | LossOnly | LossFunction | None = dataclasses.field(default=None, kw_only=True)
    chunk: int | None = static(default=None, kw_only=True)
    rhs_chunk: int | None = static(default=None, kw_only=True)

    def __post_init__(self) -> None:
        set_field(self, "objective", as_objective(self.objective))
        set_field(self, "params", tree.check_params(self.params))
        if self.measurement is not None:
            set_field(self, "measurement", as_objective(self.measurement, "measurement"))
        if not isinstance(self.inverse, LinearOperator):
            raise TypeError(
                f"inverse: got a {type(self.inverse).__name__}, expected a LinearOperator such as "
                "influence_jax.invert(curvature, solver) or influence_jax.Identity(params)"
            )
        tree.check_vector(self.params, self.inverse.space, "params, against the space of inverse")
        check_chunk(self.chunk)
        check_chunk(self.rhs_chunk, "rhs_chunk")

    @property
    def asked(self) -> Objective | LossOnly:
        """What is asked of a query: the measurement if there is one, else the objective."""
        return as_objective(self.objective if self.measurement is None else self.measurement)

    def influences(
        self, query: PyTree, train: PyTree, mode: str | InfluenceMode = "up", *, wrt: str | int = "x"
    ) -> PyTree:
        r"""Influence of every training example on every query.

        Args:
          query: Leaves `(Q, ...)`.
          train: Leaves `(N, ...)`.
          mode: `"up"`: $\nabla f_q^\top P \nabla\ell_i$.  `"perturbation"`: its derivative in the input of example i.
          wrt: The perturbed part of a training example: key, attribute or tuple index.

        Returns:
          `(Q, N)`, or `(Q, N, *x.shape)` for perturbation (a pytree of such arrays if the input is a pytree).

        Raises:
          ValueError: If the mode or `wrt` is unknown, or a batch is malformed.
          TypeError: If the perturbed part is not floating.
        """
        query, train, mode = as_batch(query, "query"), as_batch(train, "train"), as_mode(mode)
        if mode is InfluenceMode.Perturbation:
            check_wrt(train, wrt)
            return _perturbation(self, _factors(self, query), train, wrt)
        if _count(train) < _count(query) and getattr(self.inverse, "symmetric", True):
            return _up_from_train(self, query, train)
        return _up(self, _factors(self, query), train)

    def influence_factors(self, query: PyTree) -> PyTree:
        r"""Factors $P\,\nabla f_q$: one solve per query, reusable against any training data.

        Args:
          query: Leaves `(Q, ...)`.

        Returns:
          Tree like the parameters, leaves `(Q, *leaf)`, float32 or wider.
        """
        return _factors(self, as_batch(query, "query"))

    def influences_from_factors(
        self, factors: PyTree, train: PyTree, mode: str | InfluenceMode = "up", *, wrt: str | int = "x"
    ) -> PyTree:
        """Influence of every training example from factors; as `influences`, without the solves.

        Args:
          factors: What `influence_factors` returned, leaves `(Q, *leaf)`.
          train: Leaves `(N, ...)`.
          mode: `"up"` or `"perturbation"`.
          wrt: The perturbed part of a training example.

        Returns:
          `(Q, N)`, or `(Q, N, *x.shape)` for perturbation.

        Raises:
          ValueError: If the factors are not a stack of parameter-shaped trees, or as `influences`.
          TypeError: If the perturbed part is not floating.
        """
        tree.check_stack(factors, self.params, "factors")
        train, mode = as_batch(train, "train"), as_mode(mode)
        if mode is InfluenceMode.Up:
            return _up(self, factors, train)
        check_wrt(train, wrt)
        return _perturbation(self, factors, train, wrt)

    def self_influences(self, batch: PyTree) -> Array:
        r"""Influence of each example on itself, $\nabla\ell_i^\top P \nabla\ell_i$; high for mislabelled examples.

        Args:
          batch: Leaves `(N, ...)`.

        Returns:
          `(N,)`.
        """
        return _self_influences(self, as_batch(batch, "batch"))

    def top_k(self, query: PyTree, train: PyTree, k: int) -> TopK:
        """The k most helpful training examples of each query; negate scores for the most harmful.

        Streams over the training data, so memory grows with `Q (k + chunk)`, not with `Q N`.  Ties go to the lower
        index.

        Args:
          query: Leaves `(Q, ...)`.
          train: Leaves `(N, ...)`.
          k: How many, `1 <= k <= N`.

        Returns:
          `TopK(values, indices)`, each `(Q, k)`, descending.

        Raises:
          TypeError: If k is not an int.
          ValueError: If k is not between 1 and N.
        """
        query, train = as_batch(query, "query"), as_batch(train, "train")
        if isinstance(k, bool) or not isinstance(k, int | np.integer):
            raise TypeError(f"k: got {k!r}, expected an int")
        if not 1 <= k <= _count(train):
            raise ValueError(f"k: got {k}, expected between 1 and {_count(train)}, the number of training examples")
        return _top_k(self, _factors(self, query), train, int(k))

    def __repr__(self) -> str:
        asked = "" if self.measurement is None else f", measurement={self.measurement!r}"
        return f"Influence({self.objective!r}, {self.inverse!r}{asked})"


def as_mode(mode: Any) -> InfluenceMode:
    """The influence mode, from itself or its name.

    Raises:
      ValueError: If there is no such mode.
    """
    if mode in tuple(InfluenceMode):
        return InfluenceMode(mode)
    raise ValueError(f"mode: got {mode!r}, expected one of {[str(m) for m in InfluenceMode]}")


def _count(batch: PyTree) -> int:
    return jax.tree.leaves(batch)[0].shape[0]


def _apply(inverse: LinearOperator, stack: PyTree) -> PyTree:
    return inverse.mm(tree.promote(stack))


@jax.jit
def _factors(influence: Influence, query: PyTree) -> PyTree:
    grads = _per_example_grads(influence.asked, influence.params, query, influence.chunk)
    return _apply(influence.inverse, grads)


def _scores(influence: Influence, objective: Objective | LossOnly, factors: PyTree, batch: PyTree) -> Array:
    """Inner products of factors and per-example gradients, `(N, Q)`."""
    params = influence.params
    if _directional(objective, params, batch, _count(factors)):
        return _jacobian_product(objective, params, batch, factors, influence.chunk, influence.rhs_chunk)
    wide = tree.promote(params)

    def one(example: PyTree) -> Array:
        return tree.gram(factors, tree.stack_of_one(jax.grad(objective)(wide, example)))[:, 0]

    return map_over(one, batch, chunk=influence.chunk or chunk_for(tree.size(params)))


def _directional(objective: Objective | LossOnly, params: PyTree, batch: PyTree, factors: int) -> bool:
    """Whether one forward-mode pass per factor is cheaper than gradients of every example and one matrix product.

    Decided from shapes: a model that uses its parameters once per example (a dense network) spends more on storing
    gradients than on computing them, one that uses them at every position (convolution, sequence) does not.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    flops = matmul_flops(jax.make_jaxpr(objective)(params, shapes))
    return factors <= GRADIENT_PASSES + OPERATIONS_PER_ENTRY * tree.size(params) / max(flops, 1)


@jax.jit
def _up(influence: Influence, factors: PyTree, train: PyTree) -> Array:
    return _scores(influence, as_objective(influence.objective), factors, train).T


@jax.jit
def _up_from_train(influence: Influence, query: PyTree, train: PyTree) -> Array:
    """Solve for the training examples, which are fewer than the queries; P is self-adjoint."""
    grads = _per_example_grads(influence.objective, influence.params, train, influence.chunk)
    return _scores(influence, influence.asked, _apply(influence.inverse, grads), query)


@partial(jax.jit, static_argnames="wrt")
def _perturbation(influence: Influence, factors: PyTree, train: PyTree, wrt: str | int) -> PyTree:
    objective, params = influence.objective, influence.params
    products = _mixed_product(objective, params, train, factors, wrt, influence.chunk, influence.rhs_chunk)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), products)


@jax.jit
def _self_influences(influence: Influence, batch: PyTree) -> Array:
    def one_chunk(part: PyTree) -> Array:
        grads = _per_example_grads(influence.objective, influence.params, part)
        return tree.dots(_apply(influence.inverse, grads), grads)

    return map_chunks(one_chunk, batch, chunk=influence.chunk or chunk_for(tree.size(influence.params)))


@partial(jax.jit, static_argnames="k")
def _top_k(influence: Influence, factors: PyTree, train: PyTree, k: int) -> TopK:
    count, queries = _count(train), _count(factors)

    def merge(best: tuple[Array, Array], part: PyTree, indices: Array) -> tuple[Array, Array]:
        scores = _scores(influence, as_objective(influence.objective), factors, part).T
        losses = jnp.where(indices < count, -scores, jnp.inf)
        places = jnp.broadcast_to(indices, scores.shape)
        together = (jnp.concatenate([best[0], losses], 1), jnp.concatenate([best[1], places], 1))
        # Two keys: score first, then the lower index, whatever the order of the chunks.
        losses, places = lax.sort(together, dimension=1, num_keys=2)
        return losses[:, :k], places[:, :k]

    dtype = tree.accumulation_dtype(*(leaf.dtype for leaf in jax.tree.leaves(factors)))
    none = (jnp.full((queries, k), jnp.inf, dtype), jnp.full((queries, k), np.iinfo(np.int32).max, jnp.int32))
    losses, indices = scan_chunks(merge, none, train, chunk=influence.chunk)
    return TopK(-losses, indices)
