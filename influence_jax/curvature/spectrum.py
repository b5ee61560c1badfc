r"""Lanczos on device, and what it tells about an operator's eigenvalues."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _reprs, tree
from .._mesh import compiled
from .._pytree import dataclass, static
from .._typing import Array, Key, PyTree
from ..batching import check_key, check_positive
from .capabilities import check_losses, wide_dtype
from .flat import flattened
from .layout import Layout, constrain
from .loops import fori_loop
from .operator import LinearOperator


class Basis(NamedTuple):
    r"""What Lanczos finds: $A Q^\top = Q^\top T + r\,e_m^\top$.

    Attributes:
      vectors: $Q$, orthonormal stack, leaves `(m, *leaf)`.
      matrix: $T = Q A Q^\top$, `(m, m)`, tridiagonal to rounding.
      lengths: Of the rest r after each step, `(m,)`; rounding where the space is exhausted.
    """

    vectors: PyTree
    matrix: Array
    lengths: Array

    def pairs(self, steps: int) -> tuple[Array, Array, Array]:
        """Return Ritz values of the first `steps` vectors, eigenvectors of T in columns, and residuals."""
        values, vectors = jnp.linalg.eigh(self.matrix[:steps, :steps])
        return values, vectors, jnp.abs(self.lengths[steps - 1] * vectors[-1])


def lanczos(
    mv: Callable[[PyTree], PyTree],
    space: PyTree,
    steps: int,
    key: Key,
    *,
    layout: Layout,
    check: int = 0,
    fori_loop: Callable[..., PyTree] = lax.fori_loop,
) -> Basis:
    r"""Lanczos tridiagonalisation with full reorthogonalisation, twice, from a random start.

    $\beta_{k+1} q_{k+1} = A q_k - \alpha_k q_k - \beta_k q_{k-1}$, and what rounding leaves of it along the others is
    taken off.  Where the Krylov space is exhausted (fewer distinct eigenvalues than steps) it goes on from another
    direction, so that `steps = size` gives all eigenpairs.

    Args:
      mv: Product with one vector.
      space: The parameters.
      steps: Dimension m of the space, at most the number of parameters.
      key: For the random start.
      layout: How vectors are laid out on a mesh.
      check: Steps more, from another start outside of the space; at most the number of parameters in all.
      fori_loop: `lax.fori_loop`, or a host loop of the same signature when `mv` reads data from outside.
    """
    dtype, size = wide_dtype(space), tree.size(space)
    start = tree.unflatten(jax.random.normal(key, (size,), dtype), space)
    total = steps + check

    def step(index: Array, it: _Step) -> _Step:
        it = _extended(index, it, tree.promote(mv(it.q)), start, steps - 1 if check else total)
        return it._replace(basis=constrain(it.basis, layout))

    first = _Step(
        basis=jax.tree.map(lambda x: jnp.zeros((total, *x.shape), x.dtype), start),
        matrix=jnp.zeros((total, total), dtype),
        lengths=jnp.zeros(total, dtype),
        q=tree.scale(1 / _length(start), start),
        scale=jnp.zeros((), dtype),
    )
    end = fori_loop(0, total, step, first)
    # Row i holds <q_j, A q_i> for j <= i: tridiagonal but for rounding and restarts.
    lower = jnp.tril(end.matrix, -1)
    return Basis(end.basis, lower + lower.T + jnp.diag(jnp.diag(end.matrix)), end.lengths)


class _Step(NamedTuple):
    """State of Lanczos; rows that are yet to come are zero."""

    basis: PyTree  # (m, *leaf)
    matrix: Array  # (m, m)
    lengths: Array  # (m,)
    q: PyTree  # the next vector
    scale: Array  # () largest product


def _length(vector: PyTree) -> Array:
    return jnp.sqrt(tree.dot(vector, vector))


@compiled
def _extended(index: Array, it: _Step, product: PyTree, start: PyTree, last: int) -> _Step:
    """One more direction: the basis with q in row `index`, the matrix with its products, and the next q.

    Once is not enough to take off what lies along the basis, for rounding is left behind; twice is.  Of an exhausted
    space, and after the step `last`, another start is made of the first one, and what lies along the basis is taken off
    that: of entries x the numbers cos 4kx, which are as independent as random ones.
    """
    basis = jax.tree.map(lambda rows, row: rows.at[index].set(row), it.basis, it.q)
    scale, dtype = jnp.maximum(it.scale, _length(product)), it.matrix.dtype
    # Every row of the basis that is taken off leaves rounding of its own.
    noise = 10 * jnp.finfo(dtype).eps * len(it.matrix) ** 0.5 * scale

    def once(now: _Pass) -> _Pass:
        products = tree.gram(basis, tree.stack_of_one(now.vector))[:, 0]
        rest = tree.subtract(now.vector, tree.only(tree.combine(products[None], basis)))
        second, length = now.count == 1, _length(rest)
        again = second & ((length <= noise) | (index == last))
        other = jax.tree.map(lambda s: jnp.cos((index + 1).astype(s.dtype) * 4 * s), start)
        return _Pass(
            vector=jax.tree.map(lambda x, y: jnp.where(again, x, y), other, rest),
            products=jnp.where(now.count == 0, products, now.products),
            length=jnp.where(second, length, now.length),
            count=now.count + 1,
            last=jnp.where(again, 4, now.last),
        )

    begin = _Pass(product, jnp.zeros(it.matrix.shape[:1], dtype), jnp.zeros((), dtype), jnp.int32(0), jnp.int32(2))
    # Of fixed length, so that it can be differentiated; what need not be is skipped.
    skipping = lambda now, _: (lax.cond(now.count < now.last, once, lambda now: now, now), None)
    end = lax.scan(skipping, begin, length=4)[0]
    unit = _length(end.vector)
    q = tree.scale(1 / jnp.where(unit > 0, unit, 1), end.vector)
    return _Step(basis, it.matrix.at[index].set(end.products), it.lengths.at[index].set(end.length), q, scale)


class _Pass(NamedTuple):
    """A vector of which what lies along a basis is taken off, again and again."""

    vector: PyTree
    products: Array  # (m,) with the basis, before anything was taken off
    length: Array  # () of what was left after the second pass
    count: Array  # () int32 passes made
    last: Array  # () int32 and to be made


@dataclass
class Spectrum:
    r"""Ritz values of an operator from several random starts; made by `spectrum`.

    Print it for a guide to the damping.

    Attributes:
      values: Ritz values, ascending, `(probes, m)`.
      weights: What part of a random vector each stands for, `(probes, m)`; rows sum to one.
      residuals: An eigenvalue lies within this distance of each Ritz value, `(probes, m)`.
      size: Number of parameters; static.

    Example:
      >>> import influence_jax as ij
      >>> ritz = ij.spectrum(ij.Diagonal({"w": jnp.array([1.0, 2.0, 5.0])}), 3, key=jax.random.key(0))
      >>> ritz.values.round(3).tolist(), float(ritz.density(jnp.array([2.0]), 0.1)[0]) > 0
      ([[1.0, 2.0, 5.0]], True)
    """

    values: Array
    weights: Array
    residuals: Array
    size: int = static()

    @property
    def largest(self) -> tuple[Array, Array]:
        """The largest Ritz value, a lower bound of the largest eigenvalue, and its residual."""
        return self._extreme(self.values.argmax())

    @property
    def smallest(self) -> tuple[Array, Array]:
        """The smallest Ritz value, an upper bound of the smallest eigenvalue, and its residual."""
        return self._extreme(self.values.argmin())

    def _extreme(self, place: Array) -> tuple[Array, Array]:
        return self.values.reshape(-1)[place], self.residuals.reshape(-1)[place]

    def trace_of(self, fn: Callable[[Array], Array]) -> tuple[Array, Array | None]:
        r"""Stochastic Lanczos quadrature: $\mathrm{tr} f(A)$ and its standard error over probes (None from one).

        Args:
          fn: Function of an array of eigenvalues.

        Reference: Ubaru, Chen & Saad 2017, doi:10.1137/16M1104974.
        """
        estimates = self.size * (self.weights * fn(self.values)).sum(axis=1)
        probes, mean = estimates.shape[0], estimates.mean()
        return mean, estimates.std(ddof=1) / probes**0.5 if probes > 1 else None

    def effective_dimension(self, damping: float | Array) -> tuple[Array, Array | None]:
        r"""$\mathrm{tr}\, A (A + \lambda I)^{-1}$, how many directions the data determine, and its standard error.

        Args:
          damping: $\lambda$.

        Returns:
          The estimate and its standard error, scalars; no error, None, from a single probe.
        """
        return self.trace_of(lambda values: values / (values + damping))

    def density(self, points: Array, width: float | Array) -> Array:
        """Density of eigenvalues, smoothed by a Gaussian of that width; integrates to one.

        Args:
          points: Where, `(n,)`.
          width: Standard deviation, in units of eigenvalues.

        Returns:
          `(n,)`.
        """
        if not isinstance(width, jax.core.Tracer) and not float(width) > 0:
            raise ValueError(f"width: got {width}, expected a positive number")
        distance = (jnp.asarray(points)[:, None, None] - self.values[None]) / width
        bumps = jnp.exp(-0.5 * distance**2) / (width * (2 * jnp.pi) ** 0.5)
        return jnp.mean(jnp.sum(bumps * self.weights[None], axis=2), axis=1)

    def __repr__(self) -> str:
        read = _reprs.numbers(self.values)
        unread = any(_reprs.numbers(leaf) is None for leaf in jax.tree.leaves(self))
        if unread or read is None or read.ndim != 2 or not (np.isfinite(read).all() and read.max() > 0):
            return _reprs.call(self, _reprs.counted(self.size, "eigenvalue"), f"values {_reprs.array(self.values)}")
        return jax.tree.map(np.asarray, self)._table()  # by numpy: nothing is compiled for a table

    def _table(self) -> str:
        (high, high_error), (low, low_error) = self.largest, self.smallest
        lines = [
            f"{self.size:,} eigenvalues, from {float(low):.3g} (± {float(low_error):.1g}) to {float(high):.3g} "
            f"(± {float(high_error):.1g}), mean {float(self.trace_of(lambda x: x)[0]) / self.size:.3g}",
            "   damping   effective dimension   condition number   CG steps to 1e-5, at most",
        ]
        for exponent in range(-6, 1):
            damping = float(high) * 10.0**exponent
            if damping + float(low) <= 0:
                lines.append(f"{damping:10.1e}   indefinite: smallest eigenvalue + damping <= 0")
                continue
            # A Ritz value may lie above the smallest eigenvalue: of none below zero, zero is the safe guess.
            condition = (float(high) + damping) / (min(float(low), 0.0) + damping)
            dimension, error = self.effective_dimension(damping)
            spread = "" if error is None else f" ± {float(error):.1f}"
            steps = int(np.ceil(0.5 * condition**0.5 * np.log(2e5 * condition**0.5)))
            lines.append(f"{damping:10.1e}   {f'{float(dimension):.1f}{spread}':>19}   {condition:16.1e}   {steps}")
        return "\n".join(lines)


def spectrum(op: LinearOperator, steps: int = 60, *, key: Key, probes: int = 1) -> Spectrum:
    r"""Ritz values of an operator: extreme eigenvalues, density, effective dimension, a guide to the damping.

    Lanczos: $A Q_m = Q_m T_m + \beta_m q_{m+1} e_m^\top$ from a random $q_1$. Eigenpairs $(\theta_j, w_j)$ of the
    tridiagonal $T_m$ give Ritz values $\theta_j$, residuals $\beta_m |w_{mj}|$ and weights $w_{1j}^2$.

    Args:
      op: The operator.
      steps: Products per probe, at most the number of parameters.
      key: For the random starts.
      probes: Random starts; two or more give standard errors.

    Returns:
      A `Spectrum`, arrays `(probes, steps)`; print it.

    Raises:
      TypeError, ValueError: If an argument is not of that form.

    Example:
      >>> import influence_jax as ij
      >>> op = ij.Diagonal({"w": jnp.array([1.0, 2.0, 5.0])})
      >>> ritz = ij.spectrum(op, 3, key=jax.random.key(0))
      >>> float(ritz.largest[0].round(3)), float(ritz.smallest[0].round(3))
      (5.0, 1.0)

    Reference: Golub & Meurant 2010, Matrices, Moments and Quadrature; Ghorbani et al. 2019, arXiv:1901.10159.
    """
    if not isinstance(op, LinearOperator):
        raise TypeError(
            f"op: got a {type(op).__name__}, expected a LinearOperator such as GGN(objective, params, data)"
        )
    check_positive(steps, "steps")
    check_positive(probes, "probes")
    check_key(key, "spectrum starts from random vectors")
    if not op.on_host:
        check_losses(op)
    steps, keys = min(steps, op.size), jax.random.split(key, probes)
    if op.on_host:
        found = [_probe(op, steps, key) for key in keys]
        return Spectrum(*(jnp.stack(parts) for parts in zip(*found, strict=True)), size=op.size)
    return _spectrum(op, steps, keys)


@partial(compiled, static_argnames="steps")
def _spectrum(op: LinearOperator, steps: int, keys: Key) -> Spectrum:
    return Spectrum(*lax.map(partial(_probe, op, steps), keys), size=op.size)


def _probe(op: LinearOperator, steps: int, key: Key) -> tuple[Array, Array, Array]:
    flat = flattened(op)
    found = lanczos(flat.mv, flat.space, steps, key, fori_loop=fori_loop(op), layout=flat.layout)
    values, vectors, residuals = found.pairs(steps)
    return values, vectors[0] ** 2, residuals
