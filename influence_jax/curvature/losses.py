"""Looking at the losses of an operator's data, before anything is made of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from .._class_numbers import check_class_numbers
from .._sound import Unsound, find, refusal
from .._typing import Array, PyTree
from ..objective import as_objective
from .capabilities import check_losses
from .exact import OverData
from .fisher import Keyed
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


@check_losses.register
def _(op: OverData, *, gradients: bool = False) -> None:
    if is_part() or any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(op)):
        return
    found = unsound(op, gradients=gradients)
    if found.first is not None:
        raise refusal(found, "data")
