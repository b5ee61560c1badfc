"""Operators on flat vectors: one array `(K, P)` instead of a stack of leaves."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import Any

import jax

from .. import tree
from .._pytree import dataclass
from .._typing import Array, PyTree
from ..batching import map_rows
from .capabilities import minibatch, wide_dtype
from .exact import OverData
from .operator import LinearOperator, Scaled, Sum, Wrapper


@singledispatch
def flat_product(op: LinearOperator, rows: Array) -> Array:
    """Return the product with the rows of an array, `(K, P)`."""
    return tree.flatten(op.mm(tree.unflatten(rows, op.space)), op.space)


@flat_product.register
def _(op: OverData, rows: Array) -> Array:
    one = lambda row: tree.flatten(op.mv(tree.unflatten(row, op.space)), op.space)  # leaves of few rows at a time
    return map_rows(one, rows, op.rhs_chunk)


@flat_product.register
def _(op: Sum, rows: Array) -> Array:
    return tree.total([flat_product(term, rows) for term in op.terms])


@flat_product.register
def _(op: Scaled, rows: Array) -> Array:
    return tree.scale(op.factor, flat_product(op.op, rows))


@dataclass
class Flat(Wrapper):
    """The same operator on flat vectors, in the dtype that solvers compute in."""

    op: LinearOperator

    def mv(self, v: Array) -> Array:
        return flat_product(self.op, v[None])[0]

    def mm(self, V: Array) -> Array:
        return flat_product(self.op, V)

    def lifted(self, fn: Callable[[PyTree], PyTree]) -> Callable[[Array], Array]:
        """Return a function of stacks of leaves as one of flat rows."""
        return lambda rows: tree.flatten(fn(tree.unflatten(rows, self.op.space)), self.op.space)

    def lifted_solve(self, solve: Callable[[PyTree], tuple[PyTree, Any]]) -> Callable[[Array], tuple[Array, Any]]:
        """Return the same of a function that says something beside."""

        def on_rows(rows: Array) -> tuple[Array, Any]:
            X, beside = solve(tree.unflatten(rows, self.op.space))
            return tree.flatten(X, self.op.space), beside

        return on_rows

    @property
    def parts(self) -> tuple[LinearOperator, ...]:
        return (self.op,)

    @property
    def space(self) -> PyTree:
        return jax.ShapeDtypeStruct((self.op.size,), wide_dtype(self.op.space))


@minibatch.register
def _(op: Flat, indices: Array) -> LinearOperator:
    return Flat(minibatch(op.op, indices))


def can_be_flat(op: LinearOperator, vectors: PyTree) -> bool:
    """Whether vectors may be laid out as one array: of one dtype, and on one device or on every one."""
    leaves = jax.tree.leaves(vectors)
    split = any(axis is not None for _, sharding in op.layout.params for axis in sharding.spec)
    if op.on_host:  # nothing is traced, and arrays say themselves where they are
        placed = [leaf.sharding for leaf in jax.tree.leaves(op.space) if isinstance(leaf, jax.Array)]
        split = split or not all(sharding.is_fully_replicated for sharding in placed)
    return len({leaf.dtype for leaf in leaves}) == 1 and not split


def flattened(op: LinearOperator) -> LinearOperator:
    """Return the operator on flat vectors, if vectors may be laid out so."""
    return Flat(op) if can_be_flat(op, tree.promote_shapes(op.space)) else op
