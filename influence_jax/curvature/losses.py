"""Looking at the losses of an operator's data, before anything is made of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from .. import tree
from .._class_numbers import check_class_numbers
from .._mesh import compiled
from .._sound import Unsound, find, finite_rows, refusal
from .._typing import Array, PyTree
from ..batching import chunk_for, map_chunks
from ..objective import as_objective
from .capabilities import check_losses
from .exact import OverData, without_data
from .fisher import Keyed
from .operator import LinearOperator
from .parts import is_part


def unsound(op: OverData, start: int = 0, *, gradients: bool = False, name: str = "data") -> Unsound:
    """Look at the losses of examples that have weight; `start` is the place of the first in the whole data."""
    data, counted = _counted(op)
    settings = {"start": start, "expected": op.count if gradients else 0, "chunk": op.chunk, "name": name}
    return find(as_objective(op.objective), op.params, data, counted=counted, **settings)


def check_classes(op: OverData, start: int = 0, name: str = "data") -> None:
    """Look at the class numbers of examples that have weight, and no further; under tracing, at none.

    Raises:
      ValueError: As `check_class_numbers`.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(op)):
        return
    data, counted = _counted(op)
    settings = {"counted": counted, "start": start, "chunk": op.chunk}
    check_class_numbers(as_objective(op.objective), op.params, data, name, **settings)


def _counted(op: OverData) -> tuple[PyTree, Array | np.ndarray]:
    """Return the examples, without their keys, and which of them have weight."""
    data = op.data.example if isinstance(op.data, Keyed) else op.data
    with jax.ensure_compile_time_eval():  # as in `find`
        return data, np.ones(op.count, bool) if op.weights is None else jnp.asarray(op.weights) != 0


def check_products(op: LinearOperator) -> None:
    """Raise, on the host, if the curvature of an example is not finite though its loss and gradient are.

    Raises:
      ValueError: Saying of how many, and which is the first.
    """
    over_data = lambda x: isinstance(x, OverData)
    for part in filter(over_data, jax.tree.leaves(op, is_leaf=over_data)):
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(part)):
            continue
        bad = ~np.asarray(_finite_products(part))
        if part.weights is not None:
            bad &= np.asarray(part.weights) != 0
        if bad.any():
            raise ValueError(
                f"data: the second derivative of the loss of {bad.sum():,} of {part.count:,} examples is NaN or "
                f"infinite though loss and gradient are finite, first example {bad.argmax()}, as of a square root at "
                "zero; leave them out by a weight of zero, or use a loss that is smooth there"
            )


@compiled
def _finite_products(op: OverData) -> Array:
    """Tell of which examples the product with a vector of ones is finite, `(N,)`."""
    params = tree.promote(op.params)
    ones = jax.tree.map(jnp.ones_like, params)

    def of_chunk(batch: PyTree) -> Array:
        alone = lambda z: without_data(op).sum_product(params, tree.stack_of_one(z), jnp.ones(1), ones)
        return finite_rows(jax.vmap(alone)(batch))

    return map_chunks(of_chunk, op.data, chunk=op.chunk or chunk_for(op.size))


@check_losses.register
def _(op: OverData, *, gradients: bool = False) -> None:
    if is_part() or any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(op)):
        return
    found = unsound(op, gradients=gradients)
    if found.first is not None:
        raise refusal(found, "data")
