"""What sums and multiples of operators offer, from what their parts do."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from functools import singledispatch
from typing import Any

import jax
import jax.numpy as jnp

from .. import tree
from .._typing import Array, Key, PyTree
from ..blocks import Block
from .blocked import diagonal_blocks, whole
from .capabilities import (
    Root,
    Spectral,
    Unsupported,
    diagonal,
    minibatch,
    restrict,
    root,
    spectral,
    sums,
    to_dense,
    trace,
    unsupported,
)
from .operator import LinearOperator, Scaled, Sum
from .structured import Identity


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


@singledispatch
def identities(op: LinearOperator) -> Array | float | None:
    """How many times the identity an operator is; None of one that is not known to be a multiple of it."""
    return None


@identities.register
def _(op: Identity) -> float:
    return 1.0


@identities.register
def _(op: Scaled) -> Array | float | None:
    times = identities(op.op)
    return None if times is None else op.factor * times


@identities.register
def _(op: Sum) -> Array | float | None:
    times: list[Any] = [identities(term) for term in op.terms]
    return None if any(c is None for c in times) else sum(times)


def _shift(op: Sum) -> tuple[LinearOperator, Array | float]:
    """Split a sum into the one term that is no multiple of the identity, and the multiple that is added to it."""
    times: list[Any] = [identities(term) for term in op.terms]
    others = [place for place, c in enumerate(times) if c is None] or [0]
    if len(others) > 1:
        raise unsupported(spectral, op, "a closed-form solve")
    return op.terms[others[0]], sum(c for place, c in enumerate(times) if place != others[0])


def unshifted(op: LinearOperator) -> LinearOperator:
    """Return what an operator in closed form is a multiple of, but for multiples of the identity."""
    if isinstance(op, Scaled):
        return unshifted(op.op)
    return unshifted(_shift(op)[0]) if isinstance(op, Sum) else op


@spectral.register
def _(op: Sum) -> Spectral:
    r"""The eigenvalues of $A + c I$ are those of A, and c."""
    term, shift = _shift(op)
    inner = spectral(term)
    return inner._replace(values=jax.tree.map(lambda value: value + jnp.asarray(shift, value.dtype), inner.values))


@diagonal_blocks.register
def _(op: Sum) -> OrderedDict[str, Block]:
    try:
        return diagonal_blocks(_shift(op)[0])
    except Unsupported:
        return whole(op)


@diagonal_blocks.register
def _(op: Scaled) -> OrderedDict[str, Block]:
    return diagonal_blocks(op.op)


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
    return tree.total([to_dense(term) for term in op.terms])


@to_dense.register
def _(op: Scaled) -> Array:
    return tree.scale(op.factor, to_dense(op.op))


@diagonal.register
def _(op: Sum) -> PyTree:
    return tree.total([diagonal(term) for term in op.terms])


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
