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
from .base import Solver, implicit_solve
from .damping import RelativeDamping, check_damping, damped_product, needs_damping, redamp, resolve_damping
from .info import Info, more_damping, solved


class SampleSpaceState(NamedTuple):
    r"""Eigendecomposition of the kernel $\Omega^{1/2} R R^\top \Omega^{1/2}$ over M = examples times rows."""

    op: OverData
    damping: Array  # ()
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
      damping: $\lambda > 0$, or a `RelativeDamping`.

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
    damping: float | Array | RelativeDamping

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def init(self, op: LinearOperator, *, key: Key | None = None) -> SampleSpaceState:
        weights = _root_weights(op)  # raises for operators without examples
        op = cast(OverData, op)
        kernel = _kernel(lax.stop_gradient(op)) * weights[:, None] * weights[None]
        values, vectors = jnp.linalg.eigh(0.5 * (kernel + kernel.T))
        return SampleSpaceState(op, resolve_damping(self.damping, op, key), jnp.maximum(values, 0), vectors)

    def apply_many(self, state: SampleSpaceState, V: PyTree) -> tuple[PyTree, Info]:
        return implicit_solve(state.op, state.damping, V, partial(_solve, lax.stop_gradient(state)))

    def advice(self, info: Info) -> str:
        """Point to the damping, which the solution is divided by."""
        return f"{more_damping(self)}, which it divides by, or compute in 64-bit mode"

    def with_damping(
        self, state: SampleSpaceState, damping: Any, *, key: Key | None = None
    ) -> tuple[Any, SampleSpaceState]:
        return redamp(self, state, damping, key)


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


def _kernel(op: OverData) -> Array:
    r"""$R R^\top$, `(M, M)`; rows are computed again for every pair of chunks."""
    rows = row_count(op)
    data, examples = weighed(op)

    def against(left: PyTree, part: PyTree) -> Array:
        return tree.gram(root_factors(op, examples(part)), left).reshape(tree.count(part), rows, -1)

    def strip(part: PyTree) -> Array:
        left = root_factors(op, examples(part))
        products = map_chunks(partial(against, left), data, chunk=_chunk(op))  # (N, C, B * C)
        return products.reshape(op.count * rows, -1).T.reshape(tree.count(part), rows, -1)

    return map_chunks(strip, data, chunk=_chunk(op)).reshape(op.count * rows, -1)


def _solve(state: SampleSpaceState, B: PyTree) -> tuple[PyTree, Info]:
    op, rows, chunk = state.op, row_count(state.op), _chunk(state.op)
    weights, vectors = _root_weights(op), state.vectors
    data, examples = weighed(op)

    def images(part: PyTree) -> Array:
        return tree.gram(root_factors(op, examples(part)), B).reshape(tree.count(part), rows, -1)

    def back(part: tuple[PyTree, Array], mask: Array) -> PyTree:
        batch, coefficients = examples(part[0]), part[1]
        coefficients = (coefficients * mask[:, None, None]).reshape(-1, coefficients.shape[-1])
        return tree.combine(coefficients.T, root_factors(op, batch))

    image = weights[:, None] * map_chunks(images, data, chunk=chunk).reshape(op.count * rows, -1)
    damping = state.damping.astype(image.dtype)
    inner = jnp.matmul(vectors.T, image, precision=tree.HIGHEST) / (state.values + damping)[:, None]
    inner = weights[:, None] * jnp.matmul(vectors, inner, precision=tree.HIGHEST)
    inside, _ = sum_over(back, (data, inner.reshape(op.count, rows, -1)), chunk=chunk, dtype=image.dtype)
    X = jax.tree.map(lambda b, r: ((b - r) / damping).astype(b.dtype), B, inside)
    norm = tree.norms(B)
    tolerance = jnp.full_like(norm, jnp.finfo(norm.dtype).eps ** 0.5)
    # With fewer rows than parameters there are directions without curvature.
    smallest = jnp.min(state.values) if op.count * rows >= op.size else jnp.zeros((), damping.dtype)
    lowest = jnp.broadcast_to(smallest + damping, norm.shape).astype(norm.dtype)
    return solved(partial(damped_product, op, state.damping), X, B, tolerance, jnp.zeros(norm.shape, jnp.int32), lowest)
