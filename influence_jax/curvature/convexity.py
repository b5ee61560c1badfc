"""Whether a loss is convex in the output, which is found out from its Hessians there, at the examples of the data."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import tree
from .._mesh import compiled
from .._typing import Array, PyTree
from ..batching import chunk_for, map_over
from ..objective import Objective, floating_output
from .outputs import cost_hessian, hessian_product

# Up to this many outputs all eigenvalues are computed, beyond as many steps of Lanczos.
EXACT_OUTPUTS, LANCZOS_STEPS = 32, 40


class Convexity(NamedTuple):
    """What is known of a loss at the examples of some data.

    Attributes:
      negative: The first example at which it has negative curvature in the output; None if there is none.
      undefined: The first at which its second derivative there is infinite or not a number; None if there is none.
    """

    negative: int | None
    undefined: int | None

    @property
    def holds(self) -> bool:
        """Whether the loss is convex in the output at every example."""
        return self == (None, None)


def is_declared_convex(objective: Objective) -> bool:
    """Whether the loss says of itself that it is convex in the output, as those of `influence_jax.losses` do."""
    return getattr(objective.loss, "convex", False) is True


def is_at_hand(arrays: PyTree) -> bool:
    """Whether all arrays can be read now: none is traced, or partly with another process."""
    leaves = jax.tree.leaves(arrays)
    return not any(isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True) for x in leaves)


def convexity(
    objective: Objective, params: PyTree, data: PyTree, weights: Array | None = None, chunk: int | None = None
) -> Convexity:
    """Find out, on the host, in one pass over the data; examples of weight zero do not count."""
    counted = np.ones(tree.count(data), bool) if weights is None else np.asarray(weights) != 0
    low, high, epsilon = _extremes_of(objective, params, data, chunk, 1.0)
    undefined = counted & ~np.isfinite(low + high)
    known = counted & ~undefined
    scale = np.max(high, where=known, initial=0)
    below = lambda scale: low < -10 * EXACT_OUTPUTS * epsilon * scale - epsilon**0.5 * high
    negative = known & below(scale)
    if negative.any():
        # Terms cancel in the Hessian of a confident prediction until all of it is their rounding: it may drown in it.
        # How large they are shows where nothing is predicted.
        _, at_zero, _ = _extremes_of(objective, params, data, chunk, 0.0)
        scale = max(scale, np.max(at_zero, where=known & np.isfinite(at_zero), initial=0))
        negative &= below(scale)
    return Convexity(*(int(np.argmax(found)) if found.any() else None for found in (negative, undefined)))


def _extremes_of(
    objective: Objective, params: PyTree, data: PyTree, chunk: int | None, factor: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """The smallest and the largest absolute eigenvalue of each loss Hessian, and the epsilon of their dtype."""
    with jax.ensure_compile_time_eval():  # under jit, too, what is concrete is looked at now
        low, high = (np.asarray(x) for x in _extremes(objective, params, data, jnp.float32(factor), chunk))
    return low.astype(np.float64), high.astype(np.float64), float(jnp.finfo(low.dtype).eps)


@partial(compiled, static_argnames="chunk")
def _extremes(
    objective: Objective, params: PyTree, data: PyTree, factor: Array, chunk: int | None
) -> tuple[Array, Array]:
    """The smallest and the largest absolute eigenvalue of each loss Hessian, at `factor` times the output."""

    def one(example: PyTree) -> tuple[Array, Array]:
        out = tree.promote(floating_output(objective, params, example))
        out = jax.tree.map(lambda x: jnp.where(factor == 0, 0, x * factor.astype(x.dtype)), out)
        if tree.size(out) <= EXACT_OUTPUTS:
            hessian = cost_hessian(objective, out, example)
            finite = jnp.all(jnp.isfinite(hessian))
            values = jnp.linalg.eigvalsh(jnp.where(finite, hessian, 0))
            values = jnp.where(finite, values, jnp.nan)
        else:
            values = _ritz_values(objective, out, example)
        return values[0], jnp.max(jnp.abs(values))

    return map_over(one, data, chunk=chunk or chunk_for(min(tree.size(_output(objective, params, data)), 2**20) * 64))


def _output(objective: Objective, params: PyTree, data: PyTree) -> PyTree:
    """The shapes of one example's output."""
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), data)
    return jax.eval_shape(partial(floating_output, objective), tree.shapes(params), example)


def _ritz_values(objective: Objective, out: PyTree, example: PyTree) -> Array:
    r"""Approximate the extreme eigenvalues of the loss Hessian by Lanczos, ascending.

    $\beta_{k+1} q_{k+1} = H q_k - \alpha_k q_k - \beta_k q_{k-1}$ with $\alpha_k = q_k^\top H q_k$; two vectors are
    kept.  What rounding does to such a recurrence doubles Ritz values, but makes none that are not there.
    """
    product, flat = hessian_product(objective, example, out), lambda x: tree.flatten(x, out)
    start = jax.random.normal(jax.random.key(0), (tree.size(out),), flat(out).dtype)
    start = start / jnp.linalg.norm(start)

    def step(carry: tuple[Array, Array, Array], _: None) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
        before, q, beta = carry
        image = flat(product(tree.unflatten(q, out)))
        alpha = jnp.vdot(q, image)
        rest = image - alpha * q - beta * before
        length = jnp.linalg.norm(rest)
        # Where the Krylov space ends, what is left is rounding: from there on all is zero.
        length = jnp.where(length > 10 * jnp.finfo(q.dtype).eps * jnp.linalg.norm(image), length, 0)
        return (q, rest * jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0), length), (alpha, length)

    carry = (jnp.zeros_like(start), start, jnp.zeros((), start.dtype))
    _, (alpha, beta) = lax.scan(step, carry, length=min(tree.size(out), LANCZOS_STEPS))
    matrix = jnp.diag(alpha) + jnp.diag(beta[:-1], 1) + jnp.diag(beta[:-1], -1)
    finite = jnp.all(jnp.isfinite(matrix))
    return jnp.where(finite, jnp.linalg.eigvalsh(jnp.where(finite, matrix, 0)), jnp.nan)
