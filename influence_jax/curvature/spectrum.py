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
from .layout import Layout, constrain
from .loops import fori_loop
from .operator import LinearOperator


class Krylov(NamedTuple):
    r"""Ritz pairs of an operator, ascending.

    Attributes:
      values: `(m,)`.
      vectors: Orthonormal stack, leaves `(m, *leaf)`.
      residuals: $\|A q - \theta q\|$ of each pair, `(m,)`.
      first: First entries of the eigenvectors of the tridiagonal matrix, `(m,)`: their squares weigh a density.
    """

    values: Array
    vectors: PyTree
    residuals: Array
    first: Array


def lanczos(
    mv: Callable[[PyTree], PyTree],
    space: PyTree,
    steps: int,
    key: Key,
    *,
    layout: Layout,
    fori_loop: Callable[..., PyTree] = lax.fori_loop,
) -> Krylov:
    """Lanczos tridiagonalisation with full reorthogonalisation, twice, from a random start.

    Where the Krylov space is exhausted (fewer distinct eigenvalues than steps) it goes on from a new random direction,
    so that `steps = size` gives all eigenpairs.

    Args:
      mv: Product with one vector.
      space: The parameters.
      steps: Dimension m of the space, at most the number of parameters.
      key: For the random directions.
      layout: How vectors are laid out on a mesh.
      fori_loop: `lax.fori_loop`, or a host loop of the same signature when `mv` reads data from outside.
    """
    dtype, size = wide_dtype(space), tree.size(space)
    keys = jax.random.split(key, steps + 1)

    def step(index: Array, carry: tuple) -> tuple:
        basis, *rest = _extended(index, carry, tree.promote(mv(carry[2])), keys[index + 1])
        return constrain(basis, layout), *rest

    start = tree.unflatten(jax.random.normal(keys[0], (size,), dtype), space)
    start = tree.scale(1 / _norm(start), start)
    basis = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), start)
    carry = (basis, jnp.zeros((steps, steps), dtype), start, jnp.zeros((), dtype), jnp.zeros((), dtype))
    basis, matrix, _, _, beta = fori_loop(0, steps, lambda i, c: step(i, c[:4]), carry)
    # Row i holds <q_j, A q_i> for j <= i: tridiagonal but for rounding and restarts.
    lower = jnp.tril(matrix, -1)
    values, vectors = jnp.linalg.eigh(lower + lower.T + jnp.diag(jnp.diag(matrix)))
    return Krylov(values, constrain(tree.combine(vectors.T, basis), layout), jnp.abs(beta * vectors[-1]), vectors[0])


def _norm(vector: PyTree) -> Array:
    return jnp.sqrt(tree.dot(vector, vector))


@compiled
def _extended(index: Array, carry: tuple, product: PyTree, key: Key) -> tuple:
    """One more direction: the basis with q in row `index`, the matrix with its products, and the next q."""
    basis, matrix, q, scale = carry
    basis = jax.tree.map(lambda rows, row: rows.at[index].set(row), basis, q)
    scale, dtype, size = jnp.maximum(scale, _norm(product)), matrix.dtype, tree.size(product)

    def twice(vector: PyTree) -> tuple[PyTree, Array]:
        # Because once leaves rounding behind; a scan, for two passes in a row would each be compiled.
        rest, products = lax.scan(lambda rest, _: _orthogonal(basis, rest), vector, length=2)
        return rest, products[0]

    rest, coefficients = twice(product)
    beta = _norm(rest)
    exhausted = beta <= 10 * jnp.finfo(dtype).eps * jnp.sqrt(jnp.asarray(size, dtype)) * scale
    fresh = lambda: tree.unflatten(jax.random.normal(key, (size,), dtype), product)
    rest = lax.cond(exhausted, lambda: twice(fresh())[0], lambda: rest)
    length = _norm(rest)
    q = tree.scale(1 / jnp.where(length > 0, length, 1), rest)
    return basis, matrix.at[index].set(coefficients), q, scale, jnp.where(exhausted, 0, beta)


def _orthogonal(basis: PyTree, vector: PyTree) -> tuple[PyTree, Array]:
    """A vector less its projection on orthonormal rows, and its inner products with them, `(m,)`."""
    products = tree.gram(basis, tree.stack_of_one(vector))[:, 0]
    return tree.subtract(vector, tree.only(tree.combine(products[None], basis))), products


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
    krylov = lanczos(op.mv, op.space, steps, key, fori_loop=fori_loop(op), layout=op.layout)
    return krylov.values, krylov.first**2, krylov.residuals
