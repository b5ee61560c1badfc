"""The model's output as one flat array, and the curvature of the loss in it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from .. import tree
from .._typing import Array, PyTree
from ..gradients import directional
from ..objective import LossOnly, Objective, floating_output


def require_split(objective: Objective | LossOnly, operator: str) -> Objective:
    """The objective, if it is split into prediction and loss.

    Raises:
      TypeError: If it is a bare function.
    """
    if isinstance(objective, Objective):
        return objective
    raise TypeError(
        f"objective: {operator} got the bare function {objective!r}, expected an Objective, because it needs the "
        "model's output; write Objective(predict, loss) with predict(params, example) and loss(output, example), or "
        "use Hessian or EmpiricalFisher"
    )


def flat_output(objective: Objective, params: PyTree, example: PyTree) -> Array:
    """The model's output as one flat array `(C,)`, float32 or wider."""
    out = floating_output(objective, params, example)
    return tree.flatten(tree.promote(out), out)


def output_hessian(objective: Objective, params: PyTree, example: PyTree) -> Array:
    """The loss Hessian in the flat output, `(C, C)`."""
    return cost_hessian(objective, floating_output(objective, params, example), example)


def cost_hessian(objective: Objective, out: PyTree, example: PyTree) -> Array:
    """The loss Hessian in an output that is known, `(C, C)`."""

    def cost(flat: Array) -> Array:
        return objective.cost(tree.cast_like(tree.unflatten(flat, out), out), example)

    return jax.hessian(cost)(tree.flatten(tree.promote(out), out))


def hessian_product(objective: Objective, example: PyTree, out: PyTree) -> Callable[[PyTree], PyTree]:
    """The product of the loss Hessian in the output with a vector shaped like it."""
    gradient = jax.grad(lambda o: objective.cost(o, example))
    return lambda v: directional(gradient, out, v)[1]


def loss_square_root(objective: Objective, out: PyTree, example: PyTree) -> Array:
    """The symmetric square root of the loss Hessian in an output, `(C, C)`; NaN where the loss is not convex there."""
    nothing = jax.tree.map(jnp.zeros_like, lax.stop_gradient(out))
    size = jnp.max(jnp.abs(cost_hessian(objective, nothing, example)))
    return square_root(cost_hessian(objective, out, example), jnp.where(jnp.isfinite(size), size, 1))


@jax.custom_jvp
def square_root(matrix: Array, size: Array) -> Array:
    """The symmetric L with L L = matrix, for the Hessian of a loss in its output.

    NaN if that is not convex, or an entry is infinite or undefined.  `size` is that of the terms which cancel in it:
    the Hessian's where nothing is predicted yet.

    Symmetric, because it is the only square root that does not depend on the signs and rotations of eigenvectors, which
    differ from one compiled program to the next.  Eigenvalues at rounding level are zero: their roots are not small.
    """
    return _square_root(matrix, size)[0]


def _square_root(matrix: Array, size: Array) -> tuple[Array, Array, Array]:
    """The square root, and its eigenvalues and eigenvectors."""
    values, vectors = jnp.linalg.eigh(matrix)
    epsilon, largest = jnp.finfo(matrix.dtype).eps, jnp.max(jnp.abs(values))
    rounding = 2 * epsilon * largest
    roots = jnp.where(values > rounding, jnp.sqrt(jnp.maximum(values, rounding)), 0.0).astype(matrix.dtype)
    # Terms cancel in the Hessian of a confident prediction (softmax has p - p²), so that all of it can drown in their
    # rounding: what is negative beyond that, and beyond rounding of the rest, is not convex.
    floor = 10 * matrix.shape[0] * epsilon * size.astype(matrix.dtype) + epsilon**0.5 * largest
    roots = jnp.where((values < -floor) | ~jnp.all(jnp.isfinite(matrix)), jnp.nan, roots)
    return jnp.matmul(vectors * roots[None], vectors.T, precision=tree.HIGHEST), roots, vectors


@square_root.defjvp
def _(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """L dL + dL L = d(matrix), solved in the eigenbasis; unlike the derivative of eigh it stands repeated values."""
    half, roots, vectors = _square_root(*primals)
    inner = jnp.matmul(jnp.matmul(vectors.T, tangents[0], precision=tree.HIGHEST), vectors, precision=tree.HIGHEST)
    sums = roots[:, None] + roots[None]
    inner = jnp.where(sums > 0, inner / jnp.where(sums > 0, sums, 1), 0).astype(half.dtype)
    return half, jnp.matmul(jnp.matmul(vectors, inner, precision=tree.HIGHEST), vectors.T, precision=tree.HIGHEST)
