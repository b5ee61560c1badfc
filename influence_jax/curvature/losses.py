"""Looking at the losses of an operator's data, before anything is made of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from .._sound import Unsound, find, refusal
from .._typing import Array
from ..objective import as_objective
from .capabilities import check_losses
from .exact import OverData
from .fisher import Keyed
from .parts import is_part


def unsound(op: OverData, start: int = 0, *, gradients: bool = False) -> Unsound:
    """Look at the losses of examples that have weight; `start` is the place of the first in the whole data."""
    expected = op.count if gradients else 0
    data = op.data.example if isinstance(op.data, Keyed) else op.data
    with jax.ensure_compile_time_eval():  # as in `find`
        counted: Array | np.ndarray = np.ones(op.count, bool) if op.weights is None else jnp.asarray(op.weights) != 0
    settings = {"start": start, "expected": expected, "chunk": op.chunk}
    return find(as_objective(op.objective), op.params, data, counted=counted, **settings)


@check_losses.register
def _(op: OverData, *, gradients: bool = False) -> None:
    if is_part() or any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(op)):
        return
    found = unsound(op, gradients=gradients)
    if found.first is not None:
        raise refusal(found, "data")
