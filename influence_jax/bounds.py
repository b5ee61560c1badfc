r"""Certificates: how far a score can be from the exact one, from the residual of its solve."""

from __future__ import annotations

from functools import singledispatch
from numbers import Real
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from . import tree
from ._mesh import compiled
from ._typing import Array, PyTree
from .batching import as_batch, chunk_for, map_chunks
from .blocks import select
from .curvature import GGN, Identity, LinearOperator, Restricted, Scaled, Sum
from .curvature.capabilities import wide_dtype
from .curvature.exact import weighed
from .curvature.fisher import MAX_OUTPUTS
from .curvature.outputs import loss_square_root
from .curvature.per_example import row_count
from .gradients import _per_example_grads, grads_of_chunk
from .influence import Influence
from .objective import as_objective, floating_output
from .solvers import Info, Inverse
from .solvers.damping import damped_product, every_value


def score_bounds(
    influence: Influence, query: PyTree, train: PyTree, *, lambda_min: float | Array | None = None
) -> tuple[Array, Array, Info]:
    r"""Scores, and how far each can be from the score of the exact damped inverse.

    $|s_{qi} - \nabla f_q^\top (C + \lambda I)^{-1} \nabla\ell_i| \le \frac{\|\nabla f_q - (C + \lambda I) x_q\|\,
    \|\nabla\ell_i\|}{\lambda_{min} + \lambda}$, with the residual computed anew from the operator that was inverted;
    summed over the blocks of a `Blockwise` inverse.  Up to rounding in the scores themselves.

    Args:
      influence: Whose inverse is an `Inverse`.
      query: Leaves `(Q, ...)`.
      train: Leaves `(N, ...)`.
      lambda_min: A lower bound of the smallest eigenvalue of the operator, for one that is not known to be positive
        semi-definite; a Ritz value does not do, for it bounds from above.  A `GGN` is known to be where the loss is
        convex in the output for every example, which is looked at for outputs of at most 1024 entries.

    Returns:
      Scores `(Q, N)`; bounds `(Q, N)`, infinite where nothing is known, or where `lambda_min + damping` is not
      positive; and the Info of the solves, `(Q,)`.

    Raises:
      TypeError: If the inverse is no `Inverse`, or `lambda_min` is no number.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: params["w"] @ z
      >>> params, data = {"w": jnp.ones(2)}, jnp.eye(2)
      >>> inverse = ij.invert(ij.EmpiricalFisher(f, params, data), ij.CG(0.5))
      >>> scores, bounds, info = ij.score_bounds(ij.Influence(f, params, inverse), data, data)
      >>> scores.tolist(), bool((bounds < 1e-5).all())
      ([[1.0, 0.0], [0.0, 1.0]], True)

    Reference: Higham 2002, Accuracy and Stability of Numerical Algorithms, section 7.1.
    """
    if not isinstance(influence, Influence):
        raise TypeError(f"influence: got a {type(influence).__name__}, expected an Influence")
    if not isinstance(influence.inverse, Inverse):
        raise TypeError(
            f"influence: its inverse is {influence.inverse!r}, expected an Inverse, made by invert(operator, solver)"
        )
    if lambda_min is not None and not _is_number(lambda_min):
        raise TypeError(f"lambda_min: got {lambda_min!r}, expected a number, or None")
    query, train = as_batch(query, "query"), as_batch(train, "train")
    influence.check_query(query, train)
    run = _bound_scores if influence.inverse.on_host else _score_bounds
    scores, bounds, info = run(influence, query, train, lambda_min)
    influence.tell([scores], query, train)
    return scores, bounds, info


def _is_number(value: object) -> bool:
    scalar = isinstance(value, jax.Array | np.ndarray) and value.shape == ()
    return (isinstance(value, Real) and not isinstance(value, bool)) or scalar


@singledispatch
def lower_bound(op: LinearOperator) -> Array:
    """Return a number that no eigenvalue of an operator is below; minus infinity if none is known."""
    return jnp.asarray(0.0 if op.psd else -jnp.inf, wide_dtype(op.space))


@lower_bound.register
def _(op: GGN) -> Array:
    zero = jnp.zeros((), wide_dtype(op.params))
    if op.psd:
        return zero
    if row_count(op) > MAX_OUTPUTS:
        return zero - jnp.inf
    params, (data, examples) = tree.promote(op.params), weighed(op)
    convex = lambda z: jnp.all(jnp.isfinite(loss_square_root(op.split, floating_output(op.split, params, z), z)))
    all_convex = map_chunks(lambda part: jax.vmap(convex)(examples(part)), data, chunk=op.chunk)
    return jnp.where(jnp.all(all_convex), zero, -jnp.inf)


@lower_bound.register
def _(op: Identity) -> Array:
    return jnp.ones((), wide_dtype(op.space))


@lower_bound.register
def _(op: Sum) -> Array:
    return _at_least(op, jnp.sum(jnp.stack([lower_bound(term) for term in op.terms])))


@lower_bound.register
def _(op: Scaled) -> Array:
    lowest = lower_bound(op.op)
    scaled = jnp.where(op.factor > 0, tree.scale(op.factor, lowest), jnp.where(op.factor == 0, 0.0, -jnp.inf))
    return _at_least(op, scaled)


def _at_least(op: LinearOperator, lowest: Array) -> Array:
    """Return a lower bound, or zero where the operator is known to have none below."""
    return jnp.maximum(lowest, 0) if op.psd else lowest


@lower_bound.register
def _(op: Restricted) -> Array:
    return lower_bound(op.op)


def _bound_scores(
    influence: Influence, query: PyTree, train: PyTree, lambda_min: float | Array | None
) -> tuple[Array, Array, Info]:
    objective, params, inverse = as_objective(influence.objective), influence.params, cast(Inverse, influence.inverse)
    grads = tree.promote(_per_example_grads(influence.asked, params, query, influence.chunk))
    factors, info = inverse.solve_many(grads)
    factors = influence.where_fitted(factors)
    parts = inverse.by_block
    reach = {name: _reach(part, _part(grads, part), _part(factors, part), lambda_min) for name, part in parts.items()}

    def one_chunk(batch: PyTree) -> tuple[Array, Array]:
        rows = grads_of_chunk(objective, tree.promote(params), batch)
        by_block = [tree.norms(_part(rows, part))[:, None] * reach[name][None] for name, part in parts.items()]
        return tree.gram(rows, factors), jnp.sum(jnp.stack(by_block), axis=0)

    scores, bounds = map_chunks(one_chunk, train, chunk=influence.chunk or chunk_for(tree.size(params)))
    return scores.T, bounds.T, info


_score_bounds = compiled(_bound_scores)


def _part(stack: PyTree, part: Inverse) -> PyTree:
    """What of a stack a block's inverse acts on."""
    same = jax.tree.structure(stack) == jax.tree.structure(part.space)
    return stack if same else select(stack, tuple(part.space))


def _reach(part: Inverse, grads: PyTree, factors: PyTree, lambda_min: float | Array | None) -> Array:
    """Length of the residual over the smallest damped eigenvalue, `(Q,)`."""
    norm = tree.norms(grads)
    grads, factors = (tree.scale_rows(1 / jnp.where(norm > 0, norm, 1), rows) for rows in (grads, factors))
    if not part.op.at_hand:
        return jnp.full_like(norm, jnp.inf)
    residual = norm * tree.norms(tree.subtract(grads, damped_product(part.op, part.damping, factors)))
    lowest = lower_bound(part.op) if lambda_min is None else lambda_min
    smallest = jnp.asarray(lowest, residual.dtype) + jnp.min(every_value(part.damping)).astype(residual.dtype)
    return jnp.where(smallest > 0, residual / jnp.where(smallest > 0, smallest, 1), jnp.inf)
