r"""Exact solves: closed forms, Cholesky, eigendecomposition."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import tree
from .._memory import OutOfMemory, readable
from .._pytree import dataclass
from .._typing import Array, Key, PyTree
from ..batching import chunk_for, chunk_in_cache
from ..blocks import join, select
from ..curvature import (
    LinearOperator,
    LowRank,
    Unsupported,
    diagonal_blocks,
    restrict,
    shifted,
    spectral,
    to_dense,
)
from ..curvature.capabilities import wide_dtype
from .base import Inverse, Solver, implicit_solve
from .damping import RelativeDamping, block_dampings, check_damping, needs_damping, redamp, resolve_damping
from .info import NOT_FINITE, Info, is_nan, more_damping, worst

# Power iterations for the norm of a factorised operator; it is needed to one digit.
NORM_STEPS = 10
# Largest relative residual, as rounding lets it be estimated, at which an exact solve still counts as converged.
MAX_ROUNDING = 1e-2
# Bytes of a matrix, 16 TiB, that no device has: refused in words before a program is compiled for it.
LARGEST_MATRIX = 2**44


class CholeskyState(NamedTuple):
    """Dense factor of the damped operator."""

    op: LinearOperator
    damping: Array  # ()
    factor: Array  # (P, P), lower triangular
    norm: Array  # (), largest eigenvalue of the damped operator


class SpectralState(NamedTuple):
    """An operator with closed-form eigendecomposition, equal to `op`; damping is added when solving."""

    op: LinearOperator
    damping: Array  # ()
    decomposed: LinearOperator
    rounding: Array  # (), error of the eigenvalues relative to the largest; 0 for closed forms


class BlocksState(NamedTuple):
    """An operator of blocks with closed-form eigendecompositions, each at a damping of its own."""

    op: LinearOperator
    dampings: OrderedDict[str, Array]  # ()


@needs_damping
@dataclass
class Direct(Solver):
    r"""Exact solution of $(A + \lambda I) x = v$.

    Uses the eigendecomposition if the operator has one in closed form; else the dense matrix, by Cholesky if the
    operator is known to be positive semi-definite and by `Eigh` if not.  Dense work takes P² memory and P³ time.  A
    solution that rounding may have spoilt, as in a nearly singular system, has `converged=False`.  Differentiable in
    damping, parameters, weights and v.

    Args:
      damping: $\lambda \ge 0$, or a `RelativeDamping`.

    Raises:
      TypeError, ValueError: If an argument is not of that form; in `invert`, of a `RelativeDamping` if the mean
        eigenvalue is not positive.

    Example:
      >>> import influence_jax as ij
      >>> ij.invert(ij.Identity({"w": jnp.ones(2)}), ij.Direct(damping=1.0)).mv({"w": jnp.ones(2)})["w"].tolist()
      [0.5, 0.5]

    Reference: Golub & Van Loan 2013, Matrix Computations, section 4.2.
    """

    asks_sign: ClassVar[bool] = True
    damping: float | Array | RelativeDamping

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def init(self, op: LinearOperator, *, key: Key | None = None) -> CholeskyState | SpectralState | BlocksState:
        return self.init_noting(op, key=key)[0]

    def init_noting(
        self, op: LinearOperator, *, key: Key | None = None
    ) -> tuple[CholeskyState | SpectralState | BlocksState, OrderedDict[str, Array]]:
        if is_blocked(op):
            return _blocks_state(op, self.damping, key)
        if not has_spectral(op):
            _check_dense(self, op)
        return self._whole(op, key), OrderedDict()

    def _whole(self, op: LinearOperator, key: Key | None) -> CholeskyState | SpectralState:
        damping = resolve_damping(self.damping, op, key)
        if has_spectral(op) or not op.psd:
            return spectral_state(op, damping)
        matrix = to_dense(lax.stop_gradient(op))
        damped = matrix + lax.stop_gradient(damping).astype(matrix.dtype) * jnp.eye(op.size, dtype=matrix.dtype)
        factor = jnp.linalg.cholesky(damped)
        return CholeskyState(op, damping, factor, _largest_eigenvalue(factor))

    def apply_many(self, state: CholeskyState | SpectralState | BlocksState, V: PyTree) -> tuple[PyTree, Info]:
        if isinstance(state, BlocksState):
            return _solve_blocks(state, V)
        fixed = lax.stop_gradient(state)

        def solve(B: PyTree) -> tuple[PyTree, Info]:
            return cholesky_solve(fixed, B) if isinstance(fixed, CholeskyState) else spectral_solve(fixed, B)

        return implicit_solve(state.op, state.damping, V, solve)

    def advice(self, info: Info) -> str:
        return _advice(self, info)

    def holds(self, op: LinearOperator) -> str:
        return _holds(self, op)

    def with_damping(
        self, state: CholeskyState | SpectralState | BlocksState, damping: Any, *, key: Key | None = None
    ) -> tuple[Direct, SpectralState | BlocksState]:
        if isinstance(state, CholeskyState):
            raise ValueError(
                "damping: Direct has factorised this operator at its damping and cannot change it; use "
                "influence_jax.Eigh(damping), one eigendecomposition that serves every damping"
            )
        return _redamp(self, state, damping, key)

    def by_block(self, inverse: Inverse) -> OrderedDict[str, Inverse]:
        return _inverses(inverse)


@needs_damping
@dataclass
class Eigh(Solver):
    r"""Exact solution of $(A + \lambda I) x = v$ by one dense eigendecomposition, for every damping.

    `inverse.with_damping(x)` costs nothing, so a grid of dampings takes one fit; indefinite operators are solved
    exactly and reported in `min_curvature` $= \lambda_{min} + \lambda$.  P² memory, P³ time.

    Args:
      damping: $\lambda \ge 0$, or a `RelativeDamping`.

    Raises:
      TypeError, ValueError: If an argument is not of that form; in `invert`, of a `RelativeDamping` if the mean
        eigenvalue is not positive.

    Example:
      >>> import influence_jax as ij
      >>> inverse = ij.invert(ij.Diagonal({"w": jnp.array([1.0, 3.0])}), ij.Eigh(damping=1.0))
      >>> inverse.with_damping(0.0).mv({"w": jnp.array([2.0, 3.0])})["w"].tolist()
      [2.0, 1.0]

    Reference: Golub & Van Loan 2013, Matrix Computations, chapter 8.
    """

    damping: float | Array | RelativeDamping

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def init(self, op: LinearOperator, *, key: Key | None = None) -> SpectralState | BlocksState:
        return self.init_noting(op, key=key)[0]

    def init_noting(
        self, op: LinearOperator, *, key: Key | None = None
    ) -> tuple[SpectralState | BlocksState, OrderedDict[str, Array]]:
        if is_blocked(op):
            return _blocks_state(op, self.damping, key)
        if not has_spectral(op):
            _check_dense(self, op)
        return spectral_state(op, resolve_damping(self.damping, op, key)), OrderedDict()

    def apply_many(self, state: SpectralState | BlocksState, V: PyTree) -> tuple[PyTree, Info]:
        if isinstance(state, BlocksState):
            return _solve_blocks(state, V)
        return implicit_solve(state.op, state.damping, V, lambda B: spectral_solve(lax.stop_gradient(state), B))

    def advice(self, info: Info) -> str:
        return _advice(self, info)

    def holds(self, op: LinearOperator) -> str:
        return _holds(self, op)

    def with_damping(
        self, state: SpectralState | BlocksState, damping: Any, *, key: Key | None = None
    ) -> tuple[Eigh, SpectralState | BlocksState]:
        return _redamp(self, state, damping, key)

    def by_block(self, inverse: Inverse) -> OrderedDict[str, Inverse]:
        return _inverses(inverse)


def _advice(solver: Solver, info: Info) -> str:
    """Advise on exact solves, where the system is singular to rounding, or its numbers are not finite."""
    if is_nan(info):
        return f"the system is singular: {more_damping(solver)}; unless {NOT_FINITE}"
    return f"the system is singular to rounding: {more_damping(solver)}, or compute in 64-bit mode"


def _holds(solver: Solver, op: LinearOperator) -> str:
    """Say how large the matrix is that an operator without closed form is written out as."""
    if has_spectral(op):
        return ""
    size, memory = f"{op.size:,}", readable(_dense_bytes(op))
    return (
        f"{type(solver).__name__} holds a matrix of {size} x {size} parameters, {memory}; "
        "BlockCG(damping) holds none, and the closed form of ekfac(...) with Direct only those of layers. "
    )


def _dense_bytes(op: LinearOperator) -> int:
    """Return how many bytes the matrix of an operator takes."""
    return op.size**2 * wide_dtype(op.space).itemsize


def _check_dense(solver: Solver, op: LinearOperator) -> None:
    """Raise, before anything is compiled, if no device could hold the matrix."""
    if _dense_bytes(op) > LARGEST_MATRIX:
        raise OutOfMemory(f"solver: {_holds(solver, op)}".rstrip())


def is_blocked(op: LinearOperator) -> bool:
    """Whether the operator is made of several blocks with closed-form eigendecompositions."""
    return len(diagonal_blocks(op)) > 1 and has_spectral(op)


def _blocks_state(
    op: LinearOperator, damping: float | Array | RelativeDamping, key: Key | None
) -> tuple[BlocksState, OrderedDict[str, Array]]:
    """Return the state of an operator of blocks, and which of them hold nothing but rounding."""
    parts = OrderedDict((name, restrict(op, block)) for name, block in diagonal_blocks(op).items())
    if not isinstance(damping, RelativeDamping):
        same = ((name, resolve_damping(damping, part, key)) for name, part in parts.items())
        return BlocksState(op, OrderedDict(same)), OrderedDict()
    dampings, noise = block_dampings(dict.fromkeys(parts, damping), parts, dict.fromkeys(parts, key))
    return BlocksState(op, dampings), noise


def _redamp(solver: Any, state: SpectralState | BlocksState, damping: Any, key: Key | None) -> tuple[Any, Any]:
    if isinstance(state, BlocksState):
        return dataclasses.replace(solver, damping=damping), _blocks_state(state.op, damping, key)[0]
    return redamp(solver, state, damping, key)


def _inverses(inverse: Inverse) -> OrderedDict[str, Inverse]:
    """The inverse of each block, or of the operator as a whole if it has none."""
    if not isinstance(inverse.state, BlocksState):
        return OrderedDict({"": inverse})
    found = OrderedDict()
    for name, block in diagonal_blocks(inverse.op).items():
        part, damping = restrict(inverse.op, block), inverse.state.dampings[name]
        found[name] = Inverse(part, inverse.solver, SpectralState(part, damping, part, jnp.zeros_like(damping)))
    return found


def _solve_blocks(state: BlocksState, V: PyTree) -> tuple[PyTree, Info]:
    """Solve block by block; to differentiation the damping of each is part of an operator solved without any."""
    none = jnp.zeros_like(next(iter(state.dampings.values())))
    damped = shifted(state.op, state.dampings)
    return implicit_solve(damped, none, V, partial(_solve_each, lax.stop_gradient(state)))


def _solve_each(state: BlocksState, B: PyTree) -> tuple[PyTree, Info]:
    """Solve every block, each judged by its own largest eigenvalue; `Info.block` is where the system is worst."""
    solved, infos = {}, []
    for name, block in diagonal_blocks(state.op).items():
        part, damping = restrict(state.op, block), state.dampings[name]
        alone = SpectralState(part, damping, part, jnp.zeros_like(damping))
        solved[name], info = spectral_solve(alone, select(B, block))
        infos.append(info)
    merged = cast(Info, worst(infos))
    lowest = [jnp.where(info.converged, jnp.abs(info.min_curvature), -1) for info in infos]
    block = jnp.argmin(jnp.stack(lowest), axis=0).astype(jnp.int32)
    return join(solved, B), merged._replace(block=block)


def has_spectral(op: LinearOperator) -> bool:
    """Whether the operator has an eigendecomposition in closed form."""
    try:
        spectral(op)
    except Unsupported:
        return False
    return True


def rows_at_once(op: LinearOperator) -> int:
    """How many vectors to multiply at once by default: few where they are all that is read, and fall out of caches."""
    closed = isinstance(op, Inverse) and isinstance(op.state, SpectralState | BlocksState) and has_spectral(op.op)
    return (chunk_in_cache if closed else chunk_for)(op.size)


def spectral_state(op: LinearOperator, damping: Array) -> SpectralState:
    """The closed-form eigendecomposition, or all eigenpairs by way of the dense matrix."""
    if has_spectral(op):
        return SpectralState(op, damping, op, jnp.zeros_like(damping))
    values, vectors = jnp.linalg.eigh(to_dense(lax.stop_gradient(op)))
    decomposed = LowRank(tree.unflatten(vectors.T, op.space), values)
    return SpectralState(op, damping, decomposed, jnp.asarray(_rounding(op.size, values.dtype), damping.dtype))


def _rounding(size: int, dtype: np.dtype) -> float:
    """Backward error of dense factorisations, relative to the largest eigenvalue."""
    return float(jnp.finfo(dtype).eps) * size**0.5


def _largest_eigenvalue(factor: Array) -> Array:
    """Of L Lᵀ, by power iteration from its largest column."""

    def step(_: int, v: Array) -> Array:
        product = jnp.matmul(factor, jnp.matmul(factor.T, v, precision=tree.HIGHEST), precision=tree.HIGHEST)
        return product / jnp.linalg.norm(product)

    start = factor @ factor[jnp.argmax(jnp.sum(jnp.square(factor), axis=1))]
    vector = lax.fori_loop(0, NORM_STEPS, step, start / jnp.linalg.norm(start))
    return jnp.sum(jnp.square(factor.T @ vector))


def cholesky_solve(state: CholeskyState, B: PyTree) -> tuple[PyTree, Info]:
    """Two triangular solves."""
    rhs = tree.flatten(B, state.op.space).astype(state.factor.dtype)
    flat = jax.scipy.linalg.cho_solve((state.factor, True), rhs.T).T
    X = tree.cast_like(tree.unflatten(flat, state.op.space), B)
    error = _rounding(state.op.size, state.factor.dtype) * state.norm
    unit = tree.norms(X)
    length = jnp.where(unit > 0, unit, 1)
    along = tree.scale_rows(1 / length, X)
    # xᵀAx / xᵀx, for A x = b; of x = 0 there is none
    curvature = jnp.where(unit == 0, jnp.inf, tree.dots(along, B) / length)
    return X, _info(X, B, error, curvature)


def spectral_solve(state: SpectralState, B: PyTree) -> tuple[PyTree, Info]:
    """Divide by the damped eigenvalues; directions whose eigenvalue has no correct digit are left out.

    Entries that a person gives, as of `Diagonal`, are exact.  The eigenvalues of a curvature were computed, in closed
    form too: without a damping, or with one below the square of rounding, those below the rounding of the largest are
    noise, as of a feature that is always zero.
    """
    to_basis, from_basis, values = spectral(state.decomposed)
    damped = jax.tree.map(lambda d: d + state.damping.astype(d.dtype), values)
    entries = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(damped)])
    largest, rounding = jnp.max(jnp.abs(entries)), _rounding(state.op.size, entries.dtype)
    error = state.rounding.astype(entries.dtype) * largest
    undamped = state.op.is_curvature & (state.damping.astype(entries.dtype) <= rounding**2 * largest)
    floor = jnp.maximum(error, jnp.where(undamped, rounding * largest, 0))

    def divide(coordinate: Array, value: Array) -> Array:
        dead = jnp.abs(value) <= floor.astype(value.dtype)
        inverse = jnp.where(dead, 0.0, 1 / jnp.where(dead, 1.0, value)).astype(coordinate.dtype)
        return coordinate * jnp.broadcast_to(inverse, coordinate.shape)

    X = tree.cast_like(from_basis(jax.tree.map(divide, to_basis(B), damped)), B)
    rows = jax.tree.leaves(B)[0].shape[:1]
    info = _info(X, B, error, jnp.broadcast_to(jnp.min(entries), rows))
    return X, info._replace(converged=info.converged & jnp.all(jnp.abs(entries) > floor))


def _info(X: PyTree, B: PyTree, error: Array, curvature: Array) -> Info:
    """Converged where the factorisation's error, times the solution, is small beside the right-hand side."""
    norm = tree.norms(B)
    missed = error.astype(norm.dtype) * tree.norms(X)
    none = jnp.zeros(norm.shape, jnp.int32)
    return Info(none, None, missed <= MAX_ROUNDING * norm, curvature.astype(norm.dtype), none, jnp.zeros_like(norm))
