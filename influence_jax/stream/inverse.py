r"""Inverses of curvature over a loader."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from .. import tree
from .._memory import memory_errors
from .._mesh import on_auto_axes
from .._pytree import dataclass, static
from .._typing import Array, Key, LossFunction, PyTree
from ..curvature import LinearOperator, ekfac as ekfac_in_memory, kfac as kfac_in_memory, to_dense, trace
from ..objective import Objective
from ..solvers import Direct, Eigh, Inverse, Solver, invert as invert_operator
from ..solvers.base import check_solver
from ..solvers.lowrank import LowRankSolver
from .kronecker import ekfac, kfac
from .loaders import Blocks
from .operators import Curvature, operator

KRONECKER = {kfac_in_memory: kfac, ekfac_in_memory: ekfac}


@memory_errors("stream.invert")
def invert(
    curvature: Curvature,
    objective: Objective | LossFunction,
    params: PyTree,
    loader: Iterable[PyTree],
    solver: Solver,
    *,
    key: Key | None = None,
    batch_size: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
    progress: bool = True,
) -> Inverse:
    r"""Invert the mean curvature over a loader, $(\sum_b W_b C_b / \sum_b W_b + \lambda I)^{-1}$.

    The recurrences are those of `influence_jax.invert`, and so are the results to rounding, with a loop on the host and
    one pass over the loader for each product with all right-hand sides.  `CG`, `BlockCG`, `LiSSA` read the data while
    solving, `BlockCG` least often; `Arnoldi`, `Nystrom`, `Direct`, `Eigh`, `kfac` and `ekfac` while fitting only, and
    give an inverse that is all arrays and may be jitted.  A loss that is not finite is refused: where fitting takes no
    product, the loader is read once for the losses alone.

    Args:
      curvature: `(objective, params, batch) -> LinearOperator`: `GGN`, `Hessian`, `ekfac`, or a function of yours, also
        of sums, e.g. `lambda *a: Hessian(*a) + 1e-3 * Identity(params)`.
      objective: Loss of one example.
      params: Leaves `(*leaf)`.
      loader: Re-iterable of batches, a function that makes an iterator of them, or arrays given whole (memory maps).
      solver: `BlockCG(damping)`, `Nystrom(damping, rank)`, ...
      key: For solvers and dampings that draw random numbers.
      batch_size: Examples at once; the length of the first batch if None.
      sharding: Where batches go, e.g. `NamedSharding(mesh, PartitionSpec("data"))`.
      progress: Whether to show a bar for each pass over the loader, here and where the inverse reads it later.

    Returns:
      An `Inverse`, for `Influence` and `stream.scores`; outside of `jit` if it reads the loader.

    Raises:
      TypeError, ValueError: If an argument is not of that form, or the solver needs all data at once.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: 0.5 * (params["w"] * z) ** 2
      >>> loader = [jnp.array([1.0, 3.0]), jnp.array([5.0])]
      >>> inverse = ij.stream.invert(ij.Hessian, f, {"w": jnp.array(1.0)}, loader, ij.CG(damping=1.0))
      >>> round(float(inverse.mv({"w": jnp.array(38.0)})["w"]), 3)
      3.0
    """
    check_solver(solver)
    if not callable(curvature):
        raise TypeError(f"curvature: got {curvature!r}, expected a function such as influence_jax.GGN, not called yet")
    made = curvature.func if isinstance(curvature, partial) else curvature
    if made in KRONECKER:
        options = curvature.keywords if isinstance(curvature, partial) else {}
        settings: dict[str, Any] = {"batch_size": batch_size, "sharding": sharding, "progress": progress}
        fitted = KRONECKER[made](objective, params, loader, **options, **settings)
        return invert_operator(fitted, solver, key=key)
    source = Blocks(loader, "loader", batch_size, on_auto_axes(sharding))
    op = operator(curvature, objective, on_auto_axes(params), source)
    source.bar = "curvature" if progress else None  # of passes, not of the first block alone
    if isinstance(solver, Direct | Eigh):
        return invert_operator(Dense(op.params, to_dense(op), op.psd), solver, key=key)
    inverse = invert_operator(op, solver, key=key)
    if not isinstance(solver, LowRankSolver):
        return inverse
    # The eigenpairs are all that solving takes; only the residual would read the data once more.
    return dataclasses.replace(inverse, op=Read(op.params, op.psd))


@dataclass
class Dense(LinearOperator):
    """An operator by its matrix."""

    params: PyTree
    matrix: Array
    psd: bool = static(default=False)  # type: ignore[assignment]

    def mv(self, v: PyTree) -> PyTree:
        return tree.only(self.mm(tree.stack_of_one(v)))

    def mm(self, V: PyTree) -> PyTree:
        rows = tree.flatten(tree.promote(V), self.params)
        product = jnp.matmul(rows.astype(self.matrix.dtype), self.matrix, precision=tree.HIGHEST)
        return tree.cast_like(tree.unflatten(product, self.params), V)

    @property
    def space(self) -> PyTree:
        return self.params

    @property
    def is_curvature(self) -> bool:
        return True

    @property
    def fitted_at(self) -> tuple[PyTree, ...]:
        return (self.space,)


@to_dense.register
def _(op: Dense) -> Array:
    return op.matrix


@dataclass
class Read(LinearOperator):
    """An operator whose data have been read and are no longer at hand: what a product would be is not known."""

    params: PyTree
    psd: bool = static(default=False)  # type: ignore[assignment]

    def mv(self, v: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), v)

    @property
    def space(self) -> PyTree:
        return self.params

    @property
    def is_curvature(self) -> bool:
        return True

    @property
    def fitted_at(self) -> tuple[PyTree, ...]:
        return (self.space,)

    @property
    def at_hand(self) -> bool:
        return False


@trace.register
def _(op: Read, *, key: Key | None = None) -> Array:
    raise ValueError(
        "damping: got a RelativeDamping for an operator whose data were read once and are gone, expected a number; or "
        "give the RelativeDamping to the solver of stream.invert"
    )
