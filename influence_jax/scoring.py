r"""Scores from factors: inner products of solved vectors with per-example gradients, never held all at once."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import tree
from ._jaxpr_compat import matmul_flops
from ._typing import Array, PyTree
from .batching import chunk_for, map_over, scan_chunks
from .gradients import _jacobian_product, _mixed_product
from .objective import LossOnly, Objective

# A product with per-example gradients costs what this many directional derivatives do, plus this many operations per
# parameter for writing and reading the gradients; fitted to MLPs, a CNN and a transformer on CPU.
GRADIENT_PASSES = 3
OPERATIONS_PER_ENTRY = 150


class TopK(NamedTuple):
    """The most influential training examples of each query.

    Attributes:
      values: Scores `(Q, k)`, descending.
      indices: Places in the training batch, `(Q, k)` int32.
    """

    values: Array
    indices: Array


def inner_products(
    objective: Objective | LossOnly,
    params: PyTree,
    factors: PyTree,
    batch: PyTree,
    chunk: int | None,
    rhs_chunk: int | None,
) -> Array:
    """Inner products of factors and per-example gradients, `(N, Q)`."""
    if _directional(objective, params, batch, tree.count(factors)):
        return _jacobian_product(objective, params, batch, factors, chunk, rhs_chunk)
    wide = tree.promote(params)

    def one(example: PyTree) -> Array:
        return tree.gram(factors, tree.stack_of_one(jax.grad(objective)(wide, example)))[:, 0]

    return map_over(one, batch, chunk=chunk or chunk_for(tree.size(params)))


def _directional(objective: Objective | LossOnly, params: PyTree, batch: PyTree, factors: int) -> bool:
    """Whether one forward-mode pass per factor is cheaper than gradients of every example and one matrix product.

    Decided from shapes: a model that uses its parameters once per example (a dense network) spends more on storing
    gradients than on computing them, one that uses them at every position (convolution, sequence) does not.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    jaxpr = jax.make_jaxpr(objective)(params, shapes)
    flops = matmul_flops(jaxpr)
    return factors <= GRADIENT_PASSES + OPERATIONS_PER_ENTRY * tree.size(params) / max(flops, 1)


@partial(jax.jit, static_argnames=("wrt", "chunk", "rhs_chunk"))
def perturbed(
    objective: Objective | LossOnly,
    params: PyTree,
    factors: PyTree,
    batch: PyTree,
    wrt: str | int,
    chunk: int | None,
    rhs_chunk: int | None,
) -> PyTree:
    """Derivatives of the inner products in a part of each example, leaves `(Q, N, *x.shape)`."""
    products = _mixed_product(objective, params, batch, factors, wrt, chunk, rhs_chunk)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), products)


@partial(jax.jit, static_argnames=("k", "chunk", "rhs_chunk"))
def top_k(
    objective: Objective | LossOnly,
    params: PyTree,
    factors: PyTree,
    batch: PyTree,
    k: int,
    chunk: int | None,
    rhs_chunk: int | None,
) -> TopK:
    """The k largest inner products of each factor, merged chunk by chunk."""
    total, queries = tree.count(batch), tree.count(factors)

    def merge(best: tuple[Array, ...], part: PyTree, indices: Array) -> tuple[Array, ...]:
        losses = -inner_products(objective, params, factors, part, chunk, rhs_chunk).T
        places = jnp.broadcast_to(indices, losses.shape)
        together = [jnp.concatenate(pair, axis=1) for pair in zip(best, (places >= total, losses, places), strict=True)]
        # Real examples before padding, then by score with NaN last, then the lower index, whatever the chunks.
        return tuple(column[:, :k] for column in lax.sort(together, dimension=1, num_keys=3))

    dtype = tree.accumulation_dtype(*(leaf.dtype for leaf in jax.tree.leaves(factors)))
    none = (jnp.ones((queries, k), bool), jnp.zeros((queries, k), dtype), jnp.full((queries, k), total, jnp.int32))
    _, losses, indices = scan_chunks(merge, none, batch, chunk=chunk)
    return TopK(-losses, indices)
