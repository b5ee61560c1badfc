"""Operators that act within the range of a random projection."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .. import _reprs, tree
from .._mesh import compiled
from .._pytree import dataclass, set_field, static
from .._typing import Array, PyTree
from ..projections import Projection
from ..projections.base import check_projection
from .operator import LinearOperator


@dataclass
class Projected(LinearOperator):
    r"""A matrix in the space of a projection R, $v \mapsto R\,M\,R^\top v$.

    With M the inverse of $R^\top C R$, which is small, it stands for the inverse of C: what TRAK does.

    Args:
      params: Defines the space.
      projection: R, from `influence_jax.projections`.
      matrix: M, `(dim, dim)`, symmetric.
      psd: Whether M is positive semi-definite.

    Raises:
      TypeError: If the projection is none.
      ValueError: If the projection is of other parameters, or M is not of that shape.

    Example:
      >>> import influence_jax as ij
      >>> params = {"w": jnp.ones(3)}
      >>> projection = ij.projections.gaussian(params, 8, jax.random.key(0))
      >>> kernel = ij.Projected(params, projection, jnp.eye(8))
      >>> rows = projection.project({"w": jnp.eye(3)})
      >>> bool(jnp.allclose(ij.to_dense(kernel), rows @ rows.T, atol=1e-5))
      True

    Reference: Park et al. 2023, arXiv:2303.14186, eq. 13.
    """

    params: PyTree
    projection: Projection
    matrix: Array
    psd: bool = static(default=True)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        set_field(self, "params", tree.check_params(self.params))
        check_projection(self.projection)
        tree.check_vector(self.params, self.projection.space, "params, against the space of the projection")
        expected = (self.projection.dim, self.projection.dim)
        if not hasattr(self.matrix, "dtype"):
            raise TypeError(f"matrix: got a {type(self.matrix).__name__}, expected an array {expected}")
        if jnp.shape(self.matrix) != expected:
            raise ValueError(f"matrix: got shape {jnp.shape(self.matrix)}, expected {expected}, that of the projection")
        if not jnp.issubdtype(jnp.result_type(self.matrix), jnp.floating) or tree.is_float64_lost(self.matrix):
            raise TypeError(f"matrix: got {self.matrix.dtype}, expected real floating numbers, float32 in 32-bit mode")
        if not isinstance(self.matrix, jax.core.Tracer):
            uneven = float(jnp.max(jnp.abs(self.matrix - self.matrix.T)))
            if not uneven <= 1e-3 * float(jnp.max(jnp.abs(self.matrix))):
                raise ValueError(f"matrix: differs from its transpose by up to {uneven:.1e}, expected a symmetric one")
        set_field(self, "matrix", jnp.asarray(self.matrix))

    def mv(self, v: PyTree) -> PyTree:
        tree.check_vector(v, self.space, "v")
        return tree.only(self.mm(tree.stack_of_one(v)))

    def mm(self, V: PyTree) -> PyTree:
        tree.check_stack(V, self.space, "V")
        return _projected_product(self, V)

    @property
    def space(self) -> PyTree:
        return self.params

    def __repr__(self) -> str:
        return _reprs.call(self, _reprs.parameters(self.space), f"rank {self.projection.dim:,}")


@compiled
def _projected_product(op: Projected, V: PyTree) -> PyTree:
    rows, back = jax.vjp(op.projection.of_stack, tree.promote(V))  # linear, so that the derivative is the adjoint
    product = jnp.matmul(rows, op.matrix.astype(rows.dtype), precision=tree.HIGHEST)
    return tree.cast_like(back(product)[0], V)
