"""Operators given by their entries: identity, diagonal, low rank."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .. import _reprs, blocks, tree
from .._mesh import compiled
from .._pytree import dataclass, set_field
from .._typing import Array, Key, PyTree
from .capabilities import Spectral, diagonal, minibatch, restrict, spectral, to_dense, trace, wide_dtype
from .operator import LinearOperator, inner_products


@dataclass
class Identity(LinearOperator):
    r"""The identity, $v \mapsto v$; as the inverse in `Influence` it gives gradient similarity.

    Args:
      params: Defines the space, leaves `(*leaf)`.

    Raises:
      TypeError: If a leaf is no array of real floating numbers.

    Example:
      >>> import influence_jax as ij
      >>> ij.Identity({"w": jnp.ones(2)}).mv({"w": jnp.array([1.0, 2.0])})["w"].tolist()
      [1.0, 2.0]
    """

    params: PyTree

    def __post_init__(self) -> None:
        set_field(self, "params", tree.check_params(self.params))

    def mv(self, v: PyTree) -> PyTree:
        tree.check_vector(v, self.space, "v")
        return v

    def mm(self, V: PyTree) -> PyTree:
        tree.check_stack(V, self.space, "V")
        return V

    @property
    def space(self) -> PyTree:
        return self.params

    @property
    def psd(self) -> bool:
        return True


@minibatch.register
def _(op: Identity, indices: Array) -> LinearOperator:
    return op


@spectral.register
def _(op: Identity) -> Spectral:
    return Spectral(tree.promote, tree.promote, jax.tree.map(lambda x: jnp.ones((), wide_dtype(x)), op.params))


@restrict.register
def _(op: Identity, block: Sequence[str]) -> LinearOperator:
    return Identity(blocks.select(op.params, blocks.as_block(block, op.params)))


@to_dense.register
def _(op: Identity) -> Array:
    return jnp.eye(op.size, dtype=wide_dtype(op.space))


@diagonal.register
def _(op: Identity) -> PyTree:
    return tree.promote(jax.tree.map(jnp.ones_like, op.params))


@trace.register
def _(op: Identity, *, key: Key | None = None) -> Array:
    return jnp.asarray(op.size, wide_dtype(op.space))


@dataclass
class Diagonal(LinearOperator):
    r"""A diagonal operator, $v \mapsto d \odot v$.

    Args:
      tree: The diagonal, shaped like the parameters, leaves `(*leaf)`.

    Raises:
      TypeError: If a leaf is no array of real floating numbers.

    Example:
      >>> import influence_jax as ij
      >>> ij.Diagonal({"w": jnp.array([2.0, 3.0])}).mv({"w": jnp.ones(2)})["w"].tolist()
      [2.0, 3.0]
    """

    tree: PyTree

    def __post_init__(self) -> None:
        set_field(self, "tree", tree.check_params(self.tree, "tree"))

    def mv(self, v: PyTree) -> PyTree:
        tree.check_vector(v, self.space, "v")
        return self._times(v)

    def mm(self, V: PyTree) -> PyTree:
        tree.check_stack(V, self.space, "V")
        return self._times(V)

    def _times(self, v: PyTree) -> PyTree:
        def leaf_times(d: Array, x: Array) -> Array:
            dtype = tree.widest(d.dtype, x.dtype)
            return (jnp.broadcast_to(d.astype(dtype), x.shape) * x.astype(dtype)).astype(x.dtype)

        return jax.tree.map(leaf_times, self.tree, v)

    @property
    def space(self) -> PyTree:
        return self.tree


@minibatch.register
def _(op: Diagonal, indices: Array) -> LinearOperator:
    return op


@spectral.register
def _(op: Diagonal) -> Spectral:
    return Spectral(tree.promote, tree.promote, tree.promote(op.tree))


@restrict.register
def _(op: Diagonal, block: Sequence[str]) -> LinearOperator:
    return Diagonal(blocks.select(op.tree, blocks.as_block(block, op.tree)))


@diagonal.register
def _(op: Diagonal) -> PyTree:
    return tree.promote(op.tree)


@to_dense.register
def _(op: Diagonal) -> Array:
    return jnp.diag(tree.flatten(diagonal(op), op.tree))


@trace.register
def _(op: Diagonal, *, key: Key | None = None) -> Array:
    return tree.dot(op.tree, jax.tree.map(jnp.ones_like, op.tree))


@dataclass
class LowRank(LinearOperator):
    r"""A low-rank operator, $v \mapsto \sum_k d_k\, q_k \langle q_k, v\rangle$ with orthonormal $q_k$.

    Args:
      basis: Stack of orthonormal vectors, leaves `(R, *leaf)`.
      values: Eigenvalues `(R,)`.

    Raises:
      ValueError: If the number of vectors and values differ, or there are more vectors than parameters.

    Example:
      >>> import influence_jax as ij
      >>> op = ij.LowRank({"w": jnp.array([[1.0, 0.0]])}, jnp.array([5.0]))
      >>> op.mv({"w": jnp.ones(2)})["w"].tolist()
      [5.0, 0.0]
    """

    basis: PyTree
    values: Array

    def __post_init__(self) -> None:
        set_field(self, "basis", tree.check_params(self.basis, "basis"))
        set_field(self, "values", jnp.asarray(self.values, wide_dtype(self.space)))
        lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(self.basis)}
        if lengths != {self.values.shape} or self.values.ndim != 1:
            raise ValueError(
                f"values: got shape {self.values.shape}, expected (R,) with basis leaves (R, *leaf), got {lengths}"
            )
        if self.values.shape[0] > self.size:
            raise ValueError(
                f"basis: got {self.values.shape[0]} vectors for {self.size} parameters; keep at most as many"
            )
        overlaps = inner_products(self.basis, self.basis)
        if not isinstance(overlaps, jax.core.Tracer):
            off = float(jnp.max(jnp.abs(overlaps - jnp.eye(len(overlaps), dtype=overlaps.dtype))))
            if not off < 100 * float(jnp.finfo(overlaps.dtype).eps) ** 0.5:
                raise ValueError(
                    f"basis: its Gram matrix is {off:.1e} away from the identity, expected orthonormal vectors; "
                    "orthonormalise them, e.g. by a QR decomposition of flatten(basis, params).T"
                )

    def mv(self, v: PyTree) -> PyTree:
        tree.check_vector(v, self.space, "v")
        return tree.only(self.mm(tree.stack_of_one(v)))

    def mm(self, V: PyTree) -> PyTree:
        tree.check_stack(V, self.space, "V")
        return _low_rank_product(self, V)

    @property
    def space(self) -> PyTree:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.basis)

    def __repr__(self) -> str:
        return _reprs.call(self, _reprs.parameters(self.basis, stacked=True), f"rank {_reprs.first(self.values)}")


@compiled
def _low_rank_product(op: LowRank, V: PyTree) -> PyTree:
    coefficients = tree.gram(V, op.basis)
    return tree.cast_like(tree.combine(coefficients * op.values.astype(coefficients.dtype)[None], op.basis), V)


@minibatch.register
def _(op: LowRank, indices: Array) -> LinearOperator:
    return op


@spectral.register
def _(op: LowRank) -> Spectral:
    values = op.values.astype(wide_dtype(op.space))
    if op.values.shape[0] == op.size:
        return Spectral(lambda V: tree.gram(V, op.basis), lambda C: tree.combine(C, op.basis), values)

    def to_basis(V: PyTree) -> tuple[Array, PyTree]:
        coefficients = tree.gram(V, op.basis)
        return coefficients, tree.subtract(tree.promote(V), tree.combine(coefficients, op.basis))

    def from_basis(coordinates: tuple[Array, PyTree]) -> PyTree:
        coefficients, complement = coordinates
        return tree.add(tree.combine(coefficients, op.basis), complement)

    zero = jax.tree.map(lambda x: jnp.zeros((), values.dtype), op.basis)
    return Spectral(to_basis, from_basis, (values, zero))


@diagonal.register
def _(op: LowRank) -> PyTree:
    squares = jax.tree.map(jnp.square, tree.promote(op.basis))
    return tree.only(tree.combine(op.values[None], squares))


@to_dense.register
def _(op: LowRank) -> Array:
    rows = tree.flatten(tree.promote(op.basis), op.space)
    return jnp.matmul(rows.T, op.values.astype(rows.dtype)[:, None] * rows, precision=tree.HIGHEST)


@trace.register
def _(op: LowRank, *, key: Key | None = None) -> Array:
    return jnp.sum(op.values.astype(wide_dtype(op.space)))
