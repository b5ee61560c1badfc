"""What sums and multiples of operators offer, from what their parts do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .. import tree
from .._typing import Array, Key, PyTree
from .capabilities import Root, Spectral, diagonal, minibatch, restrict, root, spectral, sums, to_dense, trace
from .operator import LinearOperator, Scaled, Sum


@minibatch.register
def _(op: Sum, indices: Array) -> LinearOperator:
    return Sum(tuple(minibatch(term, indices) for term in op.terms))


@minibatch.register
def _(op: Scaled, indices: Array) -> LinearOperator:
    return dataclasses.replace(op, op=minibatch(op.op, indices))


@root.register
def _(op: Scaled) -> Root:
    inner = root(op.op)
    return inner._replace(weights=tree.scale(op.factor, inner.weights))


@spectral.register
def _(op: Scaled) -> Spectral:
    inner = spectral(op.op)
    return inner._replace(values=tree.scale(op.factor, inner.values))


@sums.register
def _(op: Scaled, V: PyTree) -> tuple[PyTree, Array]:
    total, weight = sums(op.op, V)
    return tree.scale(op.factor, total), weight


@restrict.register
def _(op: Sum, block: Sequence[str]) -> LinearOperator:
    return Sum(tuple(restrict(term, block) for term in op.terms))


@restrict.register
def _(op: Scaled, block: Sequence[str]) -> LinearOperator:
    return dataclasses.replace(op, op=restrict(op.op, block))


@to_dense.register
def _(op: Sum) -> Array:
    return sum((to_dense(term) for term in op.terms[1:]), to_dense(op.terms[0]))


@to_dense.register
def _(op: Scaled) -> Array:
    return tree.scale(op.factor, to_dense(op.op))


@diagonal.register
def _(op: Sum) -> PyTree:
    return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *(diagonal(term) for term in op.terms))


@diagonal.register
def _(op: Scaled) -> PyTree:
    return tree.scale(op.factor, diagonal(op.op))


@trace.register
def _(op: Sum, *, key: Key | None = None) -> Array:
    keys = [None] * len(op.terms) if key is None else list(jax.random.split(key, len(op.terms)))
    return jnp.sum(jnp.stack([trace(term, key=term_key) for term, term_key in zip(op.terms, keys, strict=True)]))


@trace.register
def _(op: Scaled, *, key: Key | None = None) -> Array:
    return tree.scale(op.factor, trace(op.op, key=key))
