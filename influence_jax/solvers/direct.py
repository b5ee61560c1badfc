r"""Exact solves: closed forms, Cholesky, eigendecomposition."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import tree
from .._memory import OutOfMemory, readable
from .._pytree import dataclass
from .._sound import finite_rows
from .._typing import Array, Key, PyTree
from ..batching import chunk_for, chunk_in_cache
from ..blocks import Block, join, select
from ..capture import InBasis
from ..curvature import (
    Kronecker,
    LinearOperator,
    LowRank,
    Unsupported,
    diagonal_blocks,
    restrict,
    spectral,
    to_dense,
)
from ..curvature.algebra import unshifted
from ..curvature.capabilities import wide_dtype
from .base import Inverse, Solver, fitted, implicit_solve
from .damping import BlockDamping, Damping, DampingLike, check_damping, flat_damping, needs_damping, of_leaves
from .info import NOT_FINITE, Info, is_nan, more_damping, worst

# Power iterations for the norm of a factorised operator; it is needed to one digit.
NORM_STEPS = 10
# Largest relative residual, as rounding lets it be estimated, at which an exact solve still counts as converged.
MAX_ROUNDING = 1e-2
# Bytes of a matrix, 16 TiB, that no device has: refused in words before a program is compiled for it.
LARGEST_MATRIX = 2**44


class Cholesky(NamedTuple):
    """Dense factor of the damped operator."""

    factor: Array  # (P, P), lower triangular
    norm: Array  # (), largest eigenvalue of the damped operator


class Eigenpairs(NamedTuple):
    """All eigenpairs of an operator; with a damping for each block, of the damped operator."""

    pairs: LowRank
    rounding: Array  # (), error of the eigenvalues relative to the largest


# What exact solvers compute: nothing for an operator with eigendecompositions in closed form.
Fit: TypeAlias = Cholesky | Eigenpairs | tuple[()]


@needs_damping
@dataclass
class Direct(Solver):
    r"""Exact solution of $(A + \lambda I) x = v$.

    Uses the eigendecomposition if the operator has one in closed form, and a damping for each of its blocks; else the
    dense matrix, by Cholesky if the
    operator is known to be positive semi-definite and by `Eigh` if not.  Dense work takes P² memory and P³ time.  A
    solution that rounding may have spoilt, as in a nearly singular system, has `converged=False`.  Differentiable in
    damping, parameters, weights and v.

    Args:
      damping: $\lambda \ge 0$, a `RelativeDamping`, or a dict or tree of these by block or leaf.

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
    damping: DampingLike

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def fit(self, op: LinearOperator, damping: Damping, *, key: Key | None = None) -> Fit:
        if is_closed(op, damping):
            return ()
        _check_dense(self, op)
        return _cholesky(op, damping) if op.psd else _eigenpairs(op, damping)

    def refit(self, inverse: Inverse, damping: Damping, *, key: Key | None = None) -> Fit:
        same = isinstance(inverse.fit, Eigenpairs) and not _are_by_block(damping, inverse.damping)
        return inverse.fit if same else fitted(self, inverse.op, damping, key)

    def solve(self, op: LinearOperator, damping: Damping, fit: Fit, V: PyTree) -> tuple[PyTree, Info]:
        return implicit_solve(op, damping, V, partial(_solve, *lax.stop_gradient((op, damping, fit))))

    def advice(self, info: Info) -> str:
        return _advice(self, info)

    def holds(self, op: LinearOperator) -> str:
        return _holds(self, op)

    def by_block(self, inverse: Inverse) -> OrderedDict[str, Inverse]:
        return _inverses(inverse)


@needs_damping
@dataclass
class Eigh(Solver):
    r"""Exact solution of $(A + \lambda I) x = v$ by one dense eigendecomposition, for every damping.

    `inverse.with_damping(x)` costs nothing, so a grid of dampings takes one fit; indefinite operators are solved
    exactly and reported in `min_curvature` $= \lambda_{min} + \lambda$.  P² memory, P³ time.

    Args:
      damping: $\lambda \ge 0$, a `RelativeDamping`, or a dict or tree of these by block or leaf.

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

    damping: DampingLike

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def fit(self, op: LinearOperator, damping: Damping, *, key: Key | None = None) -> Fit:
        if is_closed(op, damping):
            return ()
        _check_dense(self, op)
        return _eigenpairs(op, damping)

    def refit(self, inverse: Inverse, damping: Damping, *, key: Key | None = None) -> Fit:
        same = isinstance(inverse.fit, Eigenpairs) and not _are_by_block(damping, inverse.damping)
        return inverse.fit if same else fitted(self, inverse.op, damping, key)

    def solve(self, op: LinearOperator, damping: Damping, fit: Fit, V: PyTree) -> tuple[PyTree, Info]:
        return implicit_solve(op, damping, V, partial(_solve, *lax.stop_gradient((op, damping, fit))))

    def advice(self, info: Info) -> str:
        return _advice(self, info)

    def holds(self, op: LinearOperator) -> str:
        return _holds(self, op)

    def by_block(self, inverse: Inverse) -> OrderedDict[str, Inverse]:
        return _inverses(inverse)


def _advice(solver: Solver, info: Info) -> str:
    """Advise on exact solves, where the system is singular to rounding, or its numbers are not finite."""
    if is_nan(info):
        return f"the system is singular: {more_damping(solver)}; unless {NOT_FINITE}"
    return f"the system is singular to rounding: {more_damping(solver)}, or compute in 64-bit mode"


def _holds(solver: Solver, op: LinearOperator) -> str:
    """Say how large the matrix is that an operator without closed form is written out as."""
    return "" if has_spectral(op) else _matrix_of(solver, op)


def _matrix_of(solver: Solver, op: LinearOperator) -> str:
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
        raise OutOfMemory(f"solver: {_matrix_of(solver, op)}".rstrip())


def is_closed(op: LinearOperator, damping: Damping) -> bool:
    """Whether all eigendecompositions are in closed form: one number is added to the eigenvalues of each block."""
    alike = (not isinstance(of_leaves(damping, block), BlockDamping) for block in diagonal_blocks(op).values())
    return has_spectral(op) and all(alike)


def _are_by_block(*dampings: Damping) -> bool:
    return any(isinstance(damping, BlockDamping) for damping in dampings)


def _inverses(inverse: Inverse) -> OrderedDict[str, Inverse]:
    """The inverse of each block, or of the operator as a whole if it has none."""
    blocks = diagonal_blocks(inverse.op)
    if len(blocks) == 1 or not is_closed(inverse.op, inverse.damping):
        return OrderedDict({"": inverse})
    parts = ((name, restrict(inverse.op, block), of_leaves(inverse.damping, block)) for name, block in blocks.items())
    return OrderedDict((name, Inverse(part, inverse.solver, damping, ())) for name, part, damping in parts)


def _solve(op: LinearOperator, damping: Damping, fit: Fit, B: PyTree) -> tuple[PyTree, Info]:
    if isinstance(fit, Cholesky):
        return cholesky_solve(op, fit, B)
    if isinstance(fit, Eigenpairs):
        added = jnp.zeros(()) if isinstance(damping, BlockDamping) else damping
        return spectral_solve(op, fit.pairs, added, fit.rounding, B)
    blocks = diagonal_blocks(op)
    return _solve_each(op, damping, blocks, B) if len(blocks) > 1 else closed_solve(op, cast(Array, damping), B)


def closed_solve(op: LinearOperator, damping: Array, B: PyTree) -> tuple[PyTree, Info]:
    """Solve by an eigendecomposition in closed form."""
    return spectral_solve(op, op, damping, None, B)


def _solve_each(op: LinearOperator, damping: Damping, blocks: Mapping[str, Block], B: PyTree) -> tuple[PyTree, Info]:
    """Solve every block, each judged by its own largest eigenvalue; `Info.block` is where the system is worst."""
    solved, infos = {}, []
    for name, block in blocks.items():
        added = cast(Array, of_leaves(damping, block))
        solved[name], info = closed_solve(restrict(op, block), added, select(B, block))
        infos.append(info)
    return join(solved, B), _of_blocks(infos)


def _of_blocks(infos: Sequence[Info]) -> Info:
    """Return how the solves of all blocks went together."""
    lowest = [jnp.where(info.converged, jnp.abs(cast(Array, info.min_curvature)), -1) for info in infos]
    block = jnp.argmin(jnp.stack(lowest), axis=0).astype(jnp.int32)
    return cast(Info, worst(infos))._replace(block=block)


def has_spectral(op: LinearOperator) -> bool:
    """Whether the operator has an eigendecomposition in closed form."""
    try:
        spectral(op)
    except Unsupported:
        return False
    return True


def rows_at_once(op: LinearOperator) -> int:
    """How many vectors to multiply at once by default: few where they are all that is read, and fall out of caches."""
    closed = isinstance(op, Inverse) and isinstance(op.solver, Direct | Eigh) and has_spectral(op.op)
    return (chunk_in_cache if closed else chunk_for)(op.size)


def _damped_matrix(op: LinearOperator, damping: Damping) -> Array:
    """Return the matrix of the damped operator."""
    matrix = to_dense(op)
    added = jnp.broadcast_to(flat_damping(damping, op.space), (op.size,))
    return matrix + jnp.diag(added.astype(matrix.dtype))


def _cholesky(op: LinearOperator, damping: Damping) -> Cholesky:
    factor = jnp.linalg.cholesky(_damped_matrix(*lax.stop_gradient((op, damping))))
    return Cholesky(factor, _largest_eigenvalue(factor))


def _eigenpairs(op: LinearOperator, damping: Damping) -> Eigenpairs:
    """Return all eigenpairs by way of the dense matrix; one number is added to them when solving."""
    op, damping = lax.stop_gradient((op, damping))
    matrix = _damped_matrix(op, damping) if isinstance(damping, BlockDamping) else to_dense(op)
    values, vectors = jnp.linalg.eigh(matrix)
    pairs = LowRank(tree.unflatten(vectors.T, op.space), values)
    return Eigenpairs(pairs, jnp.asarray(_rounding(op.size, values.dtype), values.dtype))


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


def cholesky_solve(op: LinearOperator, fit: Cholesky, B: PyTree) -> tuple[PyTree, Info]:
    """Two triangular solves."""
    rhs = tree.flatten(B, op.space).astype(fit.factor.dtype)
    flat = jax.scipy.linalg.cho_solve((fit.factor, True), rhs.T).T
    X = tree.cast_like(tree.unflatten(flat, op.space), B)
    error = _rounding(op.size, fit.factor.dtype) * fit.norm
    unit = tree.norms(X)
    length = jnp.where(unit > 0, unit, 1)
    along = tree.scale_rows(1 / length, X)
    # xᵀAx / xᵀx, for A x = b; of x = 0 there is none
    curvature = jnp.where(unit == 0, jnp.inf, tree.dots(along, B) / length)
    return X, _info(X, B, error, curvature)


def spectral_solve(
    op: LinearOperator, decomposed: LinearOperator, damping: Array, rounding: Array | None, B: PyTree
) -> tuple[PyTree, Info]:
    """Divide by the damped eigenvalues; directions whose eigenvalue has no correct digit are left out.

    `decomposed` equals `op`, and has an eigendecomposition in closed form, whose eigenvalues are known to `rounding` of
    the largest; exactly if None.

    Entries that a person gives, as of `Diagonal`, are exact.  The eigenvalues of a curvature were computed, in closed
    form too: without a damping, or with one below the square of rounding, those below the rounding of the largest are
    noise, as of a feature that is always zero.
    """
    to_basis, from_basis, values = spectral(decomposed)
    inverse = _inverted(op, values, damping, rounding)
    divide = lambda x, value: x * jnp.broadcast_to(value.astype(x.dtype), x.shape)
    X = tree.cast_like(from_basis(jax.tree.map(divide, to_basis(B), inverse.values)), B)
    info = _info(X, B, inverse.error, jnp.broadcast_to(inverse.lowest, (tree.count(B),)))
    return X, info._replace(converged=info.converged & inverse.sound)


class _Inverted(NamedTuple):
    """The eigenvalues of an inverse, zero where there is none, and what is known of the damped operator's."""

    values: PyTree
    lowest: Array  # ()
    sound: Array  # () bool: whether each could be inverted
    error: Array | None  # () of the largest, absolute; None in closed form


def _inverted(op: LinearOperator, values: PyTree, damping: Array, rounding: Array | None) -> _Inverted:
    damped = jax.tree.map(lambda d: d + damping.astype(d.dtype), values)
    entries = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(damped)])
    largest, noise = jnp.max(jnp.abs(entries)), _rounding(op.size, entries.dtype)
    error = None if rounding is None else rounding.astype(entries.dtype) * largest
    undamped = op.is_curvature & (damping.astype(entries.dtype) <= noise**2 * largest)
    floor = jnp.where(undamped, noise * largest, 0)
    floor = floor if error is None else jnp.maximum(error, floor)

    def invert(value: Array) -> Array:
        dead = jnp.abs(value) <= floor.astype(value.dtype)
        return jnp.where(dead, 0.0, 1 / jnp.where(dead, 1.0, value))

    sound = jnp.all(jnp.abs(entries) > floor)
    return _Inverted(jax.tree.map(invert, damped), jnp.min(entries), sound, error)


def inverted_layers(inverse: LinearOperator) -> tuple[list[InBasis], Info] | None:
    """Return the layers of a Kronecker-factored inverse, and how one solve goes, leaves `(1,)`.

    None of another inverse.
    """
    if not isinstance(inverse, Inverse) or not isinstance(inverse.solver, Direct | Eigh) or inverse.fit != ():
        return None
    if not isinstance(unshifted(inverse.op), Kronecker):
        return None
    layers, infos = [], []
    for block in diagonal_blocks(inverse.op).values():
        part, none = restrict(inverse.op, block), jnp.zeros(1, jnp.int32)
        found = _inverted(part, spectral(part).values, cast(Array, of_leaves(inverse.damping, block)), None)
        pairs = zip(cast(Kronecker, unshifted(part)).layers, found.values, strict=True)
        layers += [InBasis(each.layer, each.q_in, each.q_out, values) for each, values in pairs]
        lowest = found.lowest[None]
        infos.append(Info(none, None, found.sound[None], lowest, none, jnp.zeros_like(lowest)))
    return layers, _of_blocks(infos)


def _info(X: PyTree, B: PyTree, error: Array | None, curvature: Array) -> Info:
    """Converged where the factorisation's error, times the solution, is small beside the right-hand side."""
    none = jnp.zeros(tree.count(B), jnp.int32)
    if error is None:
        sound = finite_rows(X)
    else:
        norm = tree.norms(B)
        sound = error.astype(norm.dtype) * tree.norms(X) <= MAX_ROUNDING * norm
    return Info(none, None, sound, curvature, none, jnp.zeros(none.shape, curvature.dtype))
