r"""What follows from one factor per example, $C_i = L_i^\top R_i$ with C rows each.

Empirical Fisher: $L_i = R_i = g_i^\top$, one row.  GGN: $L_i = J_i$ and $R_i = H_i J_i$, a row per output.  Diagonal
and trace are then exact in one pass over the data, and the matrix is one product of tall matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from .. import tree
from .._mesh import compiled
from .._typing import Array, Key, PyTree
from ..batching import chunk_for, each, map_chunks, sum_over
from ..gradients import all_or_nan, directional, spoilt
from ..objective import floating_output
from .capabilities import (
    Root,
    check_losses,
    dense_by_products,
    diagonal,
    diagonal_by_products,
    not_convex_because,
    root,
    symmetric,
    to_dense,
    trace,
    trace_by_products,
    wide_dtype,
)
from .convexity import is_at_hand
from .exact import GGN, EmpiricalFisher, OverData, divide, sum_over_data, weighed, without_data
from .fisher import Fisher
from .outputs import flat_output, loss_square_root, output_hessian

# With more outputs than this, one product per parameter is the cheaper way to a GGN's matrix and diagonal.
MAX_ROWS = 32


def row_count(op: OverData) -> int:
    """Rows of each example's factor: as many as outputs for GGN, as samples for Fisher, one for the empirical."""
    if isinstance(op, Fisher):
        return op.samples
    if not isinstance(op, GGN):
        return 1
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), op.data)
    return tree.size(jax.eval_shape(partial(flat_output, op.split), tree.shapes(op.params), example))


def _factors(op: OverData, batch: PyTree) -> tuple[PyTree, PyTree]:
    """`(L_i, R_i)` of every example of a chunk, leaves `(B, C, *leaf)`."""
    one = lambda example, losses, params: _factors_of_one(losses, params, example)
    return each(one, batch, without_data(op), tree.promote(op.params))


def _factors_of_one(op: OverData, params: PyTree, example: PyTree) -> tuple[PyTree, PyTree]:
    if isinstance(op, GGN):
        jacobian = spoilt(_jacobian(lambda p: flat_output(op.split, p, example), params), op.loss(params, example))
        return jacobian, tree.combine(output_hessian(op.split, params, example), jacobian)
    jacobian = spoilt(_jacobian(_root_rows(op, params, example), params), op.loss(params, example))
    return jacobian, jacobian


def _jacobian(fn: Callable[[PyTree], Array], params: PyTree) -> PyTree:
    """Derivative of an `(C,)`-valued function by reverse mode, leaves `(C, *leaf)`."""
    out, pullback = jax.vjp(fn, params)
    return jax.vmap(pullback)(jnp.eye(out.size, dtype=out.dtype))[0]


def _chunk(op: OverData, rows: int) -> int:
    return min(op.chunk or chunk_for(2 * rows * op.size), op.count)


@partial(compiled, static_argnames="rows")
def _assembled_dense(op: OverData, rows: int) -> Array:
    def chunk_sum(batch: PyTree, weights: Array) -> Array:
        left, right = _factors(op, batch)
        left, right = (tree.flatten(side, op.params).reshape(-1, op.size) for side in (left, right))
        scaled = jnp.repeat(weights, rows).astype(right.dtype)[:, None] * right
        return jnp.matmul(left.T, scaled, precision=tree.HIGHEST)

    return symmetric(divide(*sum_over_data(op, chunk_sum, _chunk(op, rows))))


@partial(compiled, static_argnames="rows")
def _assembled_diagonal(op: OverData, rows: int) -> PyTree:
    def chunk_sum(batch: PyTree, weights: Array) -> PyTree:
        left, right = _factors(op, batch)
        products = jax.tree.map(lambda x, y: jnp.sum(x * y, axis=1), left, right)
        return tree.only(tree.combine(weights[None], products))

    return divide(*sum_over_data(op, chunk_sum, _chunk(op, rows)))


@to_dense.register(EmpiricalFisher)
@to_dense.register(Fisher)
def dense_by_rows(op: OverData) -> Array:
    """The matrix from all examples' factors, or if these have too many rows, from products."""
    check_losses(op)
    rows = row_count(op)
    return _assembled_dense(op, rows) if rows <= MAX_ROWS else symmetric(dense_by_products(op))


@diagonal.register(GGN)
@diagonal.register(EmpiricalFisher)
@diagonal.register(Fisher)
def _(op: OverData) -> PyTree:
    check_losses(op)
    rows = row_count(op)
    if rows <= max(MAX_ROWS, op.size):
        return _assembled_diagonal(op, rows)
    return tree.unflatten(diagonal_by_products(op), op.space)


@trace.register(GGN)
@trace.register(EmpiricalFisher)
@trace.register(Fisher)
def _(op: OverData, *, key: Key | None = None) -> Array:
    check_losses(op)
    rows = row_count(op)
    if rows <= MAX_ROWS or (key is None and rows <= op.size):
        entries = _assembled_diagonal(op, rows)
        return tree.dot(entries, jax.tree.map(jnp.ones_like, entries))
    return trace_by_products(op, key)


@root.register(EmpiricalFisher)
@root.register(GGN)
@root.register(Fisher)
def _(op: OverData) -> Root:
    why = not_convex_because(op) if is_at_hand(op) else ""
    if why:
        raise ValueError(f"op: {op!r} has no root, for {why}; use EmpiricalFisher, or products with the GGN itself")
    weights = jnp.ones(op.count, wide_dtype(op.params)) if op.weights is None else jnp.asarray(op.weights)
    weights = weights / (jnp.sum(weights) if op.total is None else op.total)
    return Root(partial(_root_apply, op), partial(_root_transpose, op), weights)


def _root_rows(op: OverData, params: PyTree, example: PyTree) -> Callable[[PyTree], Array]:
    """The function whose derivative at `params` is $R_i$, `(C,)`."""
    if isinstance(op, Fisher):
        return op.rows(params, example)
    if isinstance(op, EmpiricalFisher):
        return lambda p: op.loss(p, example)[None]
    half = loss_square_root(op.split, floating_output(op.split, params, example), example)
    return lambda p: jnp.matmul(half.T, flat_output(op.split, p, example), precision=tree.HIGHEST)


def root_factors(op: OverData, batch: PyTree) -> PyTree:
    """$R_i$ of every example of a chunk, a stack with leaves `(B * C, *leaf)`."""

    def one(example: PyTree, losses: OverData, params: PyTree) -> PyTree:
        return spoilt(_jacobian(_root_rows(losses, params, example), params), losses.loss(params, example))

    factors = each(one, batch, without_data(op), tree.promote(op.params))
    return jax.tree.map(lambda x: x.reshape((x.shape[0] * x.shape[1], *x.shape[2:])), factors)


@compiled
def _root_apply(op: OverData, v: PyTree) -> Array:
    params = tree.promote(op.params)
    vector = tree.cast_like(v, params)
    data, examples = weighed(op)

    def one(example: PyTree) -> Array:
        along = directional(_root_rows(op, params, example), params, vector)[1]
        return spoilt(along, op.loss(params, example))

    def one_chunk(part: tuple[PyTree, Array | None]) -> Array:
        rows = jax.vmap(one)(examples(part))
        return rows if part[1] is None else rows * (part[1] != 0).astype(rows.dtype)[:, None]

    return map_chunks(one_chunk, data, chunk=op.chunk)


@compiled
def _root_transpose(op: OverData, u: Array) -> PyTree:
    params = tree.promote(op.params)
    data, examples = weighed(op)

    def chunk_sum(part: tuple[tuple[PyTree, Array | None], Array], mask: Array) -> PyTree:
        (_, weights), coefficients = part
        batch, mask = examples(part[0]), mask if weights is None else jnp.where(weights != 0, mask, 0)

        def total(p: PyTree) -> Array:
            rows = jax.vmap(lambda z: _root_rows(op, params, z)(p))(batch)
            return jnp.sum(rows * (mask[:, None] * coefficients).astype(rows.dtype))

        return tree.scale(all_or_nan(jax.vmap(partial(op.loss, params))(batch)), jax.grad(total)(params))

    return sum_over(chunk_sum, (data, u), chunk=op.chunk, dtype=u.dtype)[0]
