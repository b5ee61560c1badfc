r"""Solvers that know an operator by its leading eigenpairs: Arnoldi and Nyström."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import tree
from .._pytree import dataclass, static
from .._typing import Array, Key, PyTree
from ..batching import check_key, check_positive
from ..curvature import LinearOperator, LowRank
from ..curvature.capabilities import wide_dtype
from ..curvature.flat import Flat, flattened
from ..curvature.layout import constrain
from ..curvature.loops import fori_loop
from ..curvature.spectrum import lanczos
from .base import Solver, measured
from .damping import (
    BlockDamping,
    Damping,
    DampingLike,
    check_damping,
    divide,
    every_value,
    flat_damping,
    multiply,
    needs_damping,
)
from .info import NOT_FINITE, Info, is_nan, lowest_of, more_damping

# An eigenpair counts as found when its residual is below this part of the largest eigenvalue.
RITZ_TOLERANCE = 1e-2
# Products spent on whether a larger eigenvalue than those kept was missed.
CHECK_STEPS = 8


class LowRankFit(NamedTuple):
    """The eigenpairs found of an operator."""

    pairs: LowRank
    found: Array  # (), bool: whether the eigenpairs are what they should be
    lowest: Array  # (), smallest curvature met


@dataclass
class LowRankSolver(Solver):
    """What both have in common; abstract.

    The eigenpairs are constants to differentiation; the derivative in damping is exact for the approximate inverse.
    """

    damping: DampingLike
    rank: int = static()
    complement: bool = static(default=True, kw_only=True)

    def __post_init__(self) -> None:
        check_damping(self.damping)
        check_positive(self.rank, "rank")

    @property
    def approximate(self) -> bool:
        return True

    def solve(self, op: LinearOperator, damping: Damping, fit: LowRankFit, V: PyTree) -> tuple[PyTree, Info]:
        V, pairs = tree.promote(V), lax.stop_gradient(fit.pairs)
        flat = _is_flat(pairs, op.space)
        of = Flat(op) if flat else op
        rhs, own = (tree.flatten(V, op.space), flat_damping(damping, op.space)) if flat else (V, damping)
        if isinstance(damping, BlockDamping):
            X, usable = _solve_by_block(pairs, own, rhs, self.complement)
        else:
            X, usable = _solve_alike(pairs, damping, rhs, self.complement)
        info = measured(of, own, X, rhs, fit.lowest + jnp.min(every_value(damping)))
        X = tree.cast_like(tree.unflatten(X, op.space), V) if flat else X
        return X, info._replace(converged=info.converged & fit.found & usable)

    def advice(self, info: Info) -> str:
        """Say whether it is the damping, what was not found, or curvature that a sketch does not take."""
        if self.complement and more_damping(self) != "raise the damping":
            return f"{more_damping(self)}: what is outside of the eigenpairs is divided by it; or say complement=False"
        if is_nan(info):
            return NOT_FINITE
        return f"the {self.rank} eigenpairs of largest size were not all found: {self._more()}"

    def _more(self) -> str:
        """Say what finds more."""
        raise NotImplementedError("an abstract class")


def _is_flat(pairs: LowRank, space: PyTree) -> bool:
    """Tell whether eigenpairs are flat vectors, and not trees like the parameters."""
    form = lambda tree: (jax.tree.structure(tree), [leaf.shape for leaf in jax.tree.leaves(tree)])
    return form(pairs.space) != form(space)


def _solve_alike(pairs: LowRank, damping: Array, V: PyTree, complement: bool) -> tuple[PyTree, Array]:
    r"""Return $Q (\Lambda + \lambda I)^{-1} Q^\top v$, the rest over the damping, and whether that can be."""
    coefficients = tree.gram(V, pairs.basis)
    damping = damping.astype(coefficients.dtype)
    damped = pairs.values.astype(coefficients.dtype) + damping
    usable = jnp.abs(damped) > 0
    inverse = jnp.where(usable, 1 / jnp.where(usable, damped, 1), 0)
    positive = jnp.where(damping > 0, damping, 1)
    outside = jnp.where(damping > 0, 1 / positive, jnp.nan) if complement else jnp.zeros_like(damping)
    X = tree.cast_like(tree.combine(coefficients * (inverse - outside)[None], pairs.basis), V)
    X = jax.tree.map(lambda x, v: x + outside.astype(v.dtype) * v, X, V) if complement else X
    return X, jnp.all(usable)


def _solve_by_block(pairs: LowRank, damping: Damping, V: PyTree, complement: bool) -> tuple[PyTree, Array]:
    r"""Return the same with a diagonal D of dampings in place of $\lambda I$, and whether that can be.

    By Woodbury, $(Q \Lambda Q^\top + D)^{-1} = D^{-1} - D^{-1} Q (I + \Lambda Q^\top D^{-1} Q)^{-1} \Lambda Q^\top
    D^{-1}$; within the eigenpairs alone, $Q (\Lambda + Q^\top D Q)^{-1} Q^\top$.
    """
    values = pairs.values.astype(tree.gram(pairs.basis, pairs.basis).dtype)
    if not complement:
        inner = jnp.diag(values) + tree.gram(pairs.basis, multiply(pairs.basis, damping))
        X = tree.combine(jnp.linalg.solve(inner, tree.gram(V, pairs.basis).T).T, pairs.basis)
        return tree.cast_like(X, V), jnp.all(jnp.isfinite(inner))
    over, basis = divide(V, damping), divide(pairs.basis, damping)
    inner = jnp.eye(len(values), dtype=values.dtype) + values[:, None] * tree.gram(pairs.basis, basis)
    inside = jnp.linalg.solve(inner, values[:, None] * tree.gram(over, pairs.basis).T)
    X = tree.subtract(over, tree.cast_like(tree.combine(inside.T, basis), V))
    return X, jnp.all(jnp.isfinite(inner))


def _check_rank(rank: int, op: LinearOperator) -> None:
    if rank > op.size:
        raise ValueError(f"rank: got {rank}, expected at most the {op.size} parameters of {op!r}")


@needs_damping
@dataclass
class Arnoldi(LowRankSolver):
    r"""Invert through the eigenpairs of largest $|\lambda|$, found by Lanczos on the operator.

    $x = Q (D + \lambda I)^{-1} Q^\top v + \frac1\lambda (v - Q Q^\top v)$: what lies outside of the Krylov space is
    treated as having curvature zero; `complement=False` drops it, as Schioppa et al. do.  The error obeys
    $|\lambda_{r+1}| / \lambda$.  Indefinite operators keep the signs of their eigenvalues, and `min_curvature` shows
    them.  `converged` says that the eigenpairs are found, and that no larger one is left: a Krylov space holds one copy
    of a repeated eigenvalue, `Nystrom` all.  How far x is from the exact solution is what the residual says.
    To differentiation the eigenpairs are constants: the derivative in the damping is exact, those in parameters and
    data are zero.

    Args:
      damping: $\lambda > 0$, a `RelativeDamping`, or a dict or tree of these by block or leaf.
      rank: Eigenpairs kept; static.
      steps: Products spent on them, at most as many as parameters; `2 rank + 20` if None; static.
      complement: Whether to keep what is outside; static.

    Raises:
      ValueError: If there are fewer steps than pairs; in `invert`, without a key, or if the rank exceeds the number of
        parameters.

    Example:
      >>> import influence_jax as ij
      >>> op = ij.Diagonal({"w": jnp.array([4.0, 1.0, 0.0])})
      >>> inverse = ij.invert(op, ij.Arnoldi(1.0, rank=2), key=jax.random.key(0))
      >>> bool(jnp.allclose(inverse.mv({"w": jnp.array([5.0, 2.0, 3.0])})["w"], jnp.array([1.0, 1.0, 3.0])))
      True

    Reference: Schioppa et al. 2022, arXiv:2112.03052.
    """

    steps: int | None = static(default=None, kw_only=True)

    def __post_init__(self) -> None:
        LowRankSolver.__post_init__(self)
        if self.steps is not None:
            check_positive(self.steps, "steps")
            if self.steps < self.rank:
                raise ValueError(f"steps: got {self.steps}, expected at least rank={self.rank}")

    def _more(self) -> str:
        return "raise rank, or steps"

    def fit(self, op: LinearOperator, damping: Damping, *, key: Key | None = None) -> LowRankFit:
        key = check_key(key, "Arnoldi starts from a random vector; pass it to invert")
        _check_rank(self.rank, op)
        steps = min(self.steps or 2 * self.rank + 20, op.size)
        check = min(CHECK_STEPS, op.size - steps)
        fixed = flattened(lax.stop_gradient(op))
        krylov = lanczos(fixed.mv, fixed.space, steps, key, check=check, fori_loop=fori_loop(op), layout=fixed.layout)
        values, vectors, residuals = krylov.pairs(steps)
        kept = jnp.argsort(-jnp.abs(values))[: self.rank]
        inside = jax.tree.map(lambda x: x[:steps], krylov.vectors)
        pairs = LowRank(constrain(tree.combine(vectors.T[kept], inside), fixed.layout), values[kept])
        sizes = jnp.abs(values[kept])
        found = jnp.all(residuals[kept] <= RITZ_TOLERANCE * sizes[0])
        if check:  # a few steps outside find nothing larger, as copies of an eigenvalue would be
            outside = jnp.linalg.eigvalsh(krylov.matrix[steps:, steps:])
            found &= jnp.max(jnp.abs(outside)) <= sizes[-1] + RITZ_TOLERANCE * sizes[0]
        return LowRankFit(pairs, found, jnp.min(values))


@needs_damping
@dataclass
class Nystrom(LowRankSolver):
    r"""Invert through a randomised Nyström approximation, $A \approx (A\Omega)(\Omega^\top A\Omega)^+(A\Omega)^\top$.

    One product with a stack of `rank` vectors.  For positive semi-definite operators: what the sketch shows to be
    negative is left out and reported in `min_curvature`, with `converged=False`.  The error depends on all eigenvalues
    beyond the rank, not on the next alone: ask for twice as many as matter.  Solves as `Arnoldi` does, with its
    derivatives; also a preconditioner, `CG(damping, preconditioner=Nystrom(damping, rank))`.

    Args:
      damping: $\lambda > 0$, a `RelativeDamping`, or a dict or tree of these by block or leaf.
      rank: Sketch size; static.
      complement: Whether to keep what is outside; static.

    Raises:
      ValueError: In `invert`, without a key, or if the rank exceeds the number of parameters.

    Example:
      >>> import influence_jax as ij
      >>> op = ij.Diagonal({"w": jnp.array([4.0, 1.0, 0.0])})
      >>> inverse = ij.invert(op, ij.Nystrom(1.0, rank=3), key=jax.random.key(0))
      >>> bool(jnp.allclose(inverse.mv({"w": jnp.array([5.0, 2.0, 3.0])})["w"], jnp.array([1.0, 1.0, 3.0])))
      True

    Reference: Frangella, Tropp & Udell 2023, arXiv:2110.02820, algorithm 2.1; Hataya & Yamada 2023, arXiv:2302.09726.
    """

    def advice(self, info: Info) -> str:
        if lowest_of(info) < 0:
            return "the operator is indefinite, which a Nyström sketch does not take; use Arnoldi"
        return super().advice(info)

    def _more(self) -> str:
        return "raise rank"

    def fit(self, op: LinearOperator, damping: Damping, *, key: Key | None = None) -> LowRankFit:
        key = check_key(key, "Nystrom draws a random sketch; pass it to invert")
        _check_rank(self.rank, op)
        flat = flattened(op)
        normal = jax.random.normal(key, (self.rank, op.size), wide_dtype(op.space))
        return from_sketch(flat, tree.orthonormal(tree.unflatten(normal, flat.space))[0])


def from_sketch(op: LinearOperator, sketch: PyTree) -> LowRankFit:
    r"""The fit of `Nystrom` for a sketch of one's own.

    Args:
      op: The operator.
      sketch: Stack $\Omega$ of independent vectors, leaves `(rank, *leaf)`.

    Returns:
      What `Nystrom.fit` returns.

    Raises:
      ValueError: If the sketch is not a stack of vectors of the operator's space.
    """
    tree.check_stack(sketch, op.space, "sketch")
    op, sketch = lax.stop_gradient(op), tree.promote(sketch)
    image = tree.promote(op.mm(sketch))
    core = tree.gram(sketch, image)
    dtype = core.dtype
    epsilon = jnp.finfo(dtype).eps
    # Shifted, so that directions at rounding level do not blow up; the shift is taken off the eigenvalues again.
    largest = jnp.sqrt(jnp.max(jnp.abs(jnp.diag(tree.gram(image, image)))))
    shift = epsilon * jnp.sqrt(jnp.asarray(tree.size(op.space), dtype)) * largest
    overlap = tree.gram(sketch, sketch)
    image = tree.add_scaled_rows(image, jnp.broadcast_to(shift, core.shape[:1]), sketch)
    values, vectors = jnp.linalg.eigh(0.5 * (core + core.T) + shift * overlap)
    usable = values > shift
    roots = jnp.where(usable, 1 / jnp.sqrt(jnp.where(usable, values, 1)), 0)
    factor = tree.combine((vectors * roots[None]).T, image)  # A is approximately factorᵀ factor
    basis, triangle = tree.orthonormal(factor)
    left, singular, _ = jnp.linalg.svd(triangle)
    pairs = LowRank(tree.combine(left.T, basis), jnp.maximum(singular**2 - shift, 0))
    lowest = jnp.min(values / jnp.diag(vectors.T @ overlap @ vectors)) - shift
    return LowRankFit(pairs, lowest >= -RITZ_TOLERANCE * largest, lowest)
