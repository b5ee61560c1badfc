r"""Exact solves: closed forms, Cholesky, eigendecomposition."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import tree
from .._pytree import dataclass
from .._typing import Array, Key, PyTree
from ..curvature import LinearOperator, LowRank, Unsupported, spectral, to_dense
from .base import Info, RelativeDamping, Solver, check_damping, implicit_solve, redamp, resolve_damping


class CholeskyState(NamedTuple):
    """Dense factor of the damped operator."""

    op: LinearOperator
    damping: Array  # ()
    factor: Array  # (P, P), lower triangular


class SpectralState(NamedTuple):
    """An operator with closed-form eigendecomposition, equal to `op`; damping is added when solving."""

    op: LinearOperator
    damping: Array  # ()
    decomposed: LinearOperator


@dataclass
class Direct(Solver):
    r"""Exact solution of $(A + \lambda I) x = v$.

    Uses the eigendecomposition if the operator has one in closed form; else the dense matrix, by Cholesky if the
    operator is positive semi-definite and by `Eigh` if not.  Dense work takes P² memory and P³ time.  A system that is
    singular to working precision gives `converged=False`.  Differentiable in damping, parameters, weights and v.

    Args:
      damping: $\lambda \ge 0$, or a `RelativeDamping`.

    Example:
      >>> import influence_jax as ij
      >>> ij.invert(ij.Identity({"w": jnp.ones(2)}), ij.Direct(damping=1.0)).mv({"w": jnp.ones(2)})["w"].tolist()
      [0.5, 0.5]
    """

    damping: float | Array | RelativeDamping = 0.0

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def init(self, op: LinearOperator, *, key: Key | None = None) -> CholeskyState | SpectralState:
        damping = resolve_damping(self.damping, op, key)
        if has_spectral(op):
            return SpectralState(op, damping, op)
        if not op.psd:
            return SpectralState(op, damping, decompose(op))
        matrix = to_dense(lax.stop_gradient(op))
        damped = matrix + lax.stop_gradient(damping).astype(matrix.dtype) * jnp.eye(op.size, dtype=matrix.dtype)
        return CholeskyState(op, damping, jnp.linalg.cholesky(damped))

    def apply_many(self, state: CholeskyState | SpectralState, V: PyTree) -> tuple[PyTree, Info]:
        fixed = lax.stop_gradient(state)

        def solve(B: PyTree) -> tuple[PyTree, Info]:
            return cholesky_solve(fixed, B) if isinstance(fixed, CholeskyState) else spectral_solve(fixed, B)

        return implicit_solve(state.op, state.damping, V, solve)

    def with_damping(
        self, state: CholeskyState | SpectralState, damping: Any, *, key: Key | None = None
    ) -> tuple[Direct, SpectralState]:
        if isinstance(state, CholeskyState):
            raise ValueError(
                "damping: Direct has factorised this operator at its damping and cannot change it; use "
                "influence_jax.Eigh(damping), one eigendecomposition that serves every damping"
            )
        return redamp(self, state, damping, key)

    def __repr__(self) -> str:
        return f"Direct(damping={self.damping})"


@dataclass
class Eigh(Solver):
    r"""Exact solution of $(A + \lambda I) x = v$ by one dense eigendecomposition, for every damping.

    `inverse.with_damping(x)` costs nothing, so a grid of dampings takes one fit; indefinite operators are solved
    exactly and reported in `min_curvature` $= \lambda_{min} + \lambda$.  P² memory, P³ time.

    Args:
      damping: $\lambda \ge 0$, or a `RelativeDamping`.

    Example:
      >>> import influence_jax as ij
      >>> inverse = ij.invert(ij.Diagonal({"w": jnp.array([1.0, 3.0])}), ij.Eigh(damping=1.0))
      >>> inverse.with_damping(0.0).mv({"w": jnp.array([2.0, 3.0])})["w"].tolist()
      [2.0, 1.0]
    """

    damping: float | Array | RelativeDamping = 0.0

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def init(self, op: LinearOperator, *, key: Key | None = None) -> SpectralState:
        return SpectralState(op, resolve_damping(self.damping, op, key), op if has_spectral(op) else decompose(op))

    def apply_many(self, state: SpectralState, V: PyTree) -> tuple[PyTree, Info]:
        return implicit_solve(state.op, state.damping, V, lambda B: spectral_solve(lax.stop_gradient(state), B))

    def with_damping(self, state: SpectralState, damping: Any, *, key: Key | None = None) -> tuple[Eigh, SpectralState]:
        return redamp(self, state, damping, key)

    def __repr__(self) -> str:
        return f"Eigh(damping={self.damping})"


def has_spectral(op: LinearOperator) -> bool:
    """Whether the operator has an eigendecomposition in closed form."""
    try:
        spectral(op)
    except Unsupported:
        return False
    return True


def decompose(op: LinearOperator) -> LowRank:
    """All eigenpairs of an operator, by way of its dense matrix."""
    values, vectors = jnp.linalg.eigh(to_dense(lax.stop_gradient(op)))
    return LowRank(tree.unflatten(vectors.T, op.space), values)


def _singular(smallest: Array, largest: Array, size: int) -> Array:
    """Whether pivots or eigenvalues of that range leave no correct digit."""
    return ~(smallest > jnp.finfo(smallest.dtype).eps * size**0.5 * largest)


def cholesky_solve(state: CholeskyState, B: PyTree) -> tuple[PyTree, Info]:
    """Two triangular solves."""
    rhs = tree.flatten(B, state.op.space).astype(state.factor.dtype)
    flat = jax.scipy.linalg.cho_solve((state.factor, True), rhs.T).T
    X = tree.cast_like(tree.unflatten(flat, state.op.space), B)
    pivots = jnp.square(jnp.diag(state.factor))
    singular = _singular(jnp.min(pivots), jnp.max(pivots), state.op.size)
    curvature = tree.dots(X, B) / tree.dots(X, X)  # xᵀAx / xᵀx, for A x = b
    return X, _closed_form_info(curvature, jnp.broadcast_to(~singular, curvature.shape))


def spectral_solve(state: SpectralState, B: PyTree) -> tuple[PyTree, Info]:
    """Divide by the damped eigenvalues; directions that are singular to working precision are left out."""
    to_basis, from_basis, values = spectral(state.decomposed)
    damped = jax.tree.map(lambda d: d + state.damping.astype(d.dtype), values)
    entries = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(damped)])
    largest = jnp.max(jnp.abs(entries))

    def divide(coordinate: Array, value: Array) -> Array:
        dead = _singular(jnp.abs(value), largest, state.op.size)
        inverse = jnp.where(dead, 0.0, 1 / jnp.where(dead, 1.0, value)).astype(coordinate.dtype)
        return coordinate * jnp.broadcast_to(inverse, coordinate.shape)

    X = tree.cast_like(from_basis(jax.tree.map(divide, to_basis(B), damped)), B)
    singular = _singular(jnp.min(jnp.abs(entries)), largest, state.op.size)
    rows = jax.tree.leaves(B)[0].shape[:1]
    return X, _closed_form_info(jnp.broadcast_to(jnp.min(entries), rows), jnp.broadcast_to(~singular, rows))


def _closed_form_info(curvature: Array, converged: Array) -> Info:
    steps = jnp.zeros(converged.shape, jnp.int32)
    return Info(steps, jnp.full_like(curvature, jnp.nan), converged, curvature)
