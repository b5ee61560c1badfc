r"""Certificates: how far a score can be from the exact one, from the residual of its solve."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp

from . import tree
from ._typing import Array, PyTree
from .batching import as_batch, chunk_for, map_over
from .blocks import select
from .gradients import _per_example_grads
from .influence import Influence
from .objective import as_objective
from .solvers import Info, Inverse
from .solvers.damping import damped_product


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
        semi-definite; a Ritz value does not do, for it bounds from above.

    Returns:
      Scores `(Q, N)`; bounds `(Q, N)`, NaN where nothing is known, or where `lambda_min + damping` is not positive; and
      the Info of the solves, `(Q,)`.

    Raises:
      TypeError: If the inverse is no `Inverse`, or its solver does not tell its damping.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: params["w"] @ z
      >>> params, data = {"w": jnp.ones(2)}, jnp.eye(2)
      >>> inverse = ij.invert(ij.EmpiricalFisher(f, params, data), ij.CG(0.5))
      >>> scores, bounds, info = ij.score_bounds(ij.Influence(f, params, inverse), data, data)
      >>> scores.tolist(), bool((bounds < 1e-5).all())
      ([[1.0, 0.0], [0.0, 1.0]], True)
    """
    if not isinstance(influence, Influence):
        raise TypeError(f"influence: got a {type(influence).__name__}, expected an Influence")
    if not isinstance(influence.inverse, Inverse):
        raise TypeError(
            f"influence: its inverse is {influence.inverse!r}, expected an Inverse, made by invert(operator, solver)"
        )
    for name, part in influence.inverse.by_block.items():
        if not hasattr(part.state, "damping"):
            raise TypeError(
                f"influence: {part.solver!r} (block '{name}') does not tell its damping, so nothing is known"
            )
    scores, bounds, info = _score_bounds(influence, as_batch(query, "query"), as_batch(train, "train"), lambda_min)
    return scores, bounds, info


@jax.jit
def _score_bounds(
    influence: Influence, query: PyTree, train: PyTree, lambda_min: float | Array | None
) -> tuple[Array, Array, Info]:
    objective, params, inverse = as_objective(influence.objective), influence.params, cast(Inverse, influence.inverse)
    grads = tree.promote(_per_example_grads(influence.asked, params, query, influence.chunk))
    factors, info = inverse.solve_many(grads)
    parts = inverse.by_block
    reach = {name: _reach(part, _part(grads, part), _part(factors, part), lambda_min) for name, part in parts.items()}

    def one(example: PyTree) -> tuple[Array, Array]:
        grad = tree.stack_of_one(jax.grad(objective)(tree.promote(params), example))
        by_block = [reach[name] * tree.norms(_part(grad, part)) for name, part in parts.items()]
        bound = jnp.sum(jnp.stack(by_block), axis=0)
        return tree.gram(factors, grad)[:, 0], bound

    scores, bounds = map_over(one, train, chunk=influence.chunk or chunk_for(tree.size(params)))
    return scores.T, bounds.T, info


def _part(stack: PyTree, part: Inverse) -> PyTree:
    """What of a stack a block's inverse acts on."""
    same = jax.tree.structure(stack) == jax.tree.structure(part.space)
    return stack if same else select(stack, tuple(part.space))


def _reach(part: Inverse, grads: PyTree, factors: PyTree, lambda_min: float | Array | None) -> Array:
    """Length of the residual over the smallest damped eigenvalue, `(Q,)`."""
    damping = part.state.damping
    residual = tree.norms(tree.subtract(grads, damped_product(part.op, damping, factors)))
    known = jnp.zeros(()) if part.op.psd else jnp.full((), jnp.nan)
    smallest = jnp.asarray(known if lambda_min is None else lambda_min, residual.dtype) + damping.astype(residual.dtype)
    return residual / jnp.where(smallest > 0, smallest, jnp.nan)
