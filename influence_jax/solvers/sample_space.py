r"""The exact damped inverse through a system over examples and outputs instead of parameters."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from .. import tree
from .._pytree import dataclass
from .._typing import Array, Key, PyTree
from ..batching import chunk_for, map_chunks, sum_over
from ..curvature import LinearOperator, root
from ..curvature.exact import OverData, weighed
from ..curvature.per_example import root_factors, row_count
from .base import Inverse, Solver, fitted, implicit_solve
from .damping import (
    BlockDamping,
    Damping,
    DampingLike,
    check_damping,
    damped_product,
    each_leaf,
    every_value,
    needs_damping,
)
from .info import Info, more_damping, solved


class Kernel(NamedTuple):
    r"""Eigendecomposition of $\Omega^{1/2} R R^\top \Omega^{1/2}$ over M = examples times rows.

    With a damping D for each block, of $\Omega^{1/2} R D^{-1} R^\top \Omega^{1/2}$.
    """

    values: Array  # (M,)
    vectors: Array  # (M, M)


@needs_damping
@dataclass
class SampleSpace(Solver):
    r"""Exact solution of $(A + \lambda I) x = v$ for $A = R^\top \Omega R$ over few examples and many parameters.

    $x = \frac1\lambda \big(v - R^\top \Omega^{1/2} (\lambda I + \Omega^{1/2} R R^\top \Omega^{1/2})^{-1} \Omega^{1/2} R
    v\big)$: one eigendecomposition of order N·C (examples times outputs for `GGN`, examples for `EmpiricalFisher`)
    serves every damping.  Rows are computed chunk by chunk and never held all at once.  Differentiable as `CG`.

    Args:
      damping: $\lambda > 0$, a `RelativeDamping`, or a dict or tree of these by block or leaf.

    Raises:
      TypeError: In `invert`, unless the operator is a `GGN`, `EmpiricalFisher` or `Fisher`.
      ValueError: In `invert`, of a `GGN` whose loss is not convex in the output.

    Example:
      >>> import influence_jax as ij
      >>> fisher = ij.EmpiricalFisher(lambda p, z: p["w"] @ z, {"w": jnp.ones(2)}, 2.0 * jnp.eye(2))
      >>> ij.invert(fisher, ij.SampleSpace(1.0)).mv({"w": jnp.array([3.0, 6.0])})["w"].round(5).tolist()
      [1.0, 2.0]

    Reference: Woodbury 1950; Ren & Goldfarb 2019, arXiv:1906.02353.
    """

    asks_sign: ClassVar[bool] = True
    needs_psd: ClassVar[bool] = True
    damping: DampingLike

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def fit(self, op: LinearOperator, damping: Damping, *, key: Key | None = None) -> Kernel:
        weights = _root_weights(op)  # raises for operators without examples
        op, damping = lax.stop_gradient((cast(OverData, op), damping))
        kernel = _kernel(op, _unit(damping, op)) * weights[:, None] * weights[None]
        values, vectors = jnp.linalg.eigh(0.5 * (kernel + kernel.T))
        return Kernel(jnp.maximum(values, 0), vectors)

    def refit(self, inverse: Inverse, damping: Damping, *, key: Key | None = None) -> Kernel:
        alike = not isinstance(damping, BlockDamping) and not isinstance(inverse.damping, BlockDamping)
        return inverse.fit if alike else fitted(self, inverse.op, damping, key)

    def solve(self, op: Any, damping: Damping, fit: Kernel, V: PyTree) -> tuple[PyTree, Info]:
        return implicit_solve(op, damping, V, partial(_solve, *lax.stop_gradient((op, damping, fit))))

    def advice(self, info: Info) -> str:
        """Point to the damping, which the solution is divided by."""
        return f"{more_damping(self)}, which it divides by, or compute in 64-bit mode"


def _root_weights(op: LinearOperator) -> Array:
    r"""$\Omega^{1/2}$ of every row, `(M,)`."""
    weights = root(op).weights
    if not isinstance(op, OverData):
        raise TypeError(
            f"op: SampleSpace got {op!r}, expected GGN, EmpiricalFisher or Fisher; of c * A solve with A "
            "at the damping divided by c, and divide the solution by c"
        )
    return jnp.repeat(jnp.sqrt(lax.stop_gradient(weights)), row_count(op))


def _chunk(op: OverData) -> int:
    return min(op.chunk or chunk_for(row_count(op) * op.size), op.count)


def _unit(damping: Damping, op: OverData) -> PyTree | None:
    r"""$D^{-1/2}$, in whose units a damping for each block is the identity; None of one number for all."""
    if not isinstance(damping, BlockDamping):
        return None
    return jax.tree.map(lambda d: 1 / jnp.sqrt(d), each_leaf(damping, op.space))


def _rescaled(stack: PyTree, unit: PyTree | None) -> PyTree:
    return stack if unit is None else jax.tree.map(lambda x, u: x * u.astype(x.dtype), stack, unit)


def _kernel(op: OverData, unit: PyTree | None) -> Array:
    r"""$R R^\top$, `(M, M)`; rows are computed again for every pair of chunks."""
    rows = row_count(op)
    data, examples = weighed(op)
    factors = lambda part: _rescaled(root_factors(op, examples(part)), unit)

    def against(left: PyTree, part: PyTree) -> Array:
        return tree.gram(factors(part), left).reshape(tree.count(part), rows, -1)

    def strip(part: PyTree) -> Array:
        products = map_chunks(partial(against, factors(part)), data, chunk=_chunk(op))  # (N, C, B * C)
        return products.reshape(op.count * rows, -1).T.reshape(tree.count(part), rows, -1)

    return map_chunks(strip, data, chunk=_chunk(op)).reshape(op.count * rows, -1)


def _solve(op: OverData, damping: Damping, fit: Kernel, B: PyTree) -> tuple[PyTree, Info]:
    rows, chunk, unit = row_count(op), _chunk(op), _unit(damping, op)
    weights, vectors = _root_weights(op), fit.vectors
    data, examples = weighed(op)
    factors = lambda part: _rescaled(root_factors(op, examples(part)), unit)
    rhs = _rescaled(B, unit)

    def images(part: PyTree) -> Array:
        return tree.gram(factors(part), rhs).reshape(tree.count(part), rows, -1)

    def back(part: tuple[PyTree, Array], mask: Array) -> PyTree:
        coefficients = (part[1] * mask[:, None, None]).reshape(-1, part[1].shape[-1])
        return tree.combine(coefficients.T, factors(part[0]))

    image = weights[:, None] * map_chunks(images, data, chunk=chunk).reshape(op.count * rows, -1)
    added = jnp.ones((), image.dtype) if isinstance(damping, BlockDamping) else damping.astype(image.dtype)
    inner = jnp.matmul(vectors.T, image, precision=tree.HIGHEST) / (fit.values + added)[:, None]
    inner = weights[:, None] * jnp.matmul(vectors, inner, precision=tree.HIGHEST)
    inside, _ = sum_over(back, (data, inner.reshape(op.count, rows, -1)), chunk=chunk, dtype=image.dtype)
    X = _rescaled(jax.tree.map(lambda b, r: ((b - r) / added).astype(b.dtype), rhs, inside), unit)
    norm = tree.norms(B)
    tolerance = jnp.full_like(norm, jnp.finfo(norm.dtype).eps ** 0.5)
    # With fewer rows than parameters there are directions without curvature; in other units there is no telling.
    smallest = jnp.min(fit.values) if op.count * rows >= op.size and unit is None else jnp.zeros((), added.dtype)
    lowest = jnp.broadcast_to(smallest + jnp.min(every_value(damping)), norm.shape).astype(norm.dtype)
    return solved(partial(damped_product, op, damping), X, B, tolerance, jnp.zeros(norm.shape, jnp.int32), lowest)
