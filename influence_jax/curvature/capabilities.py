"""What can be asked of an operator beyond products.

Each is a `functools.singledispatch` function with a fallback; register yours for a new operator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import singledispatch
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _reprs, blocks, tree
from .._mesh import compiled
from .._pytree import dataclass, static
from .._typing import Array, Key, PyTree
from ..batching import map_rows
from .operator import LinearOperator, Scaled, Sum, Wrapper

# Up to this many parameters a trace without closed form is summed exactly, one product per parameter.
EXACT_TRACE_SIZE = 4096
TRACE_PROBES = 64


class Root(NamedTuple):
    r"""A factorisation $A = \sum_i \omega_i R_i^\top R_i$ over examples.

    Attributes:
      apply: Vector to `(N, C)`, row i is $R_i v$.
      transpose: `(N, C)` to vector, $\sum_i R_i^\top u_i$.
      weights: $\omega$, `(N,)`: the examples' weights over their sum, times the factor of a multiple.
    """

    apply: Callable[[PyTree], Array]
    transpose: Callable[[Array], PyTree]
    weights: Array

    def __repr__(self) -> str:
        return _reprs.call(self, f"weights {_reprs.array(self.weights)}")


class Spectral(NamedTuple):
    r"""An eigendecomposition in closed form, $A = B^{-1} \mathrm{diag}(d) B$ with $B$ orthogonal.

    Attributes:
      to_basis: Stack to coordinates, a pytree of arrays with leading axis K.
      from_basis: Coordinates back to a stack.
      values: Eigenvalues, a pytree that broadcasts against the coordinates of one vector.
    """

    to_basis: Callable[[PyTree], PyTree]
    from_basis: Callable[[PyTree], PyTree]
    values: PyTree

    def __repr__(self) -> str:
        return _reprs.call(self, _reprs.entries(self.values, "eigenvalue"))


class Unsupported(TypeError):
    """An operator was asked for something it does not have."""


def unsupported(function: Any, op: Any, asked_by: str) -> Unsupported:
    """The error that says which operators have what was asked for."""
    if not isinstance(op, LinearOperator):
        return Unsupported(f"op: got a {type(op).__name__}, expected a LinearOperator")
    known = sorted(cls.__name__ for cls in function.registry if cls is not object)
    return Unsupported(
        f"op: {type(op).__name__} has no {function.__name__}, which {asked_by} asks for; operators that have: {known}"
    )


@singledispatch
def minibatch(op: LinearOperator, indices: Array) -> LinearOperator:
    """The same operator on the examples at `indices`, unbiased for `op` when they are drawn uniformly.

    An operator without data returns itself.

    Args:
      op: Operator over N examples.
      indices: Integers `(B,)` in `[0, N)`.

    Returns:
      An operator of the same class.

    Raises:
      TypeError: If the operator is unknown or the indices are not integers.
      ValueError: If an index is out of range.

    Example:
      >>> import influence_jax as ij
      >>> ij.minibatch(ij.Identity({"w": jnp.ones(2)}), jnp.array([0])).size
      2
    """
    raise unsupported(minibatch, op, "LiSSA")


@singledispatch
def root(op: LinearOperator) -> Root:
    r"""The factorisation $A = \sum_i \omega_i R_i^\top R_i$ of a mean over examples.

    Empirical Fisher: $R_i = \nabla\ell_i^\top$, C = 1.  GGN: $R_i = L_i^\top J_i$ with
    $L_iL_i^\top = \nabla^2_{out}\ell_i$, C outputs, for losses convex in the output; under tracing, rows of examples
    where the loss is not are NaN.

    Args:
      op: Mean over N examples of matrices with C rows.

    Returns:
      A `Root`: products `(N, C)` with the rows, their transpose, and the weights `(N,)`.

    Raises:
      TypeError: If the operator has none.
      ValueError: If it is a GGN whose loss is not convex in the output.

    Example:
      >>> import influence_jax as ij
      >>> ij.root(ij.Identity({"w": jnp.ones(2)}))
      Traceback (most recent call last):
      ...
      influence_jax.curvature.capabilities.Unsupported: op: Identity has no root, ...
    """
    raise unsupported(root, op, "the sample-space or harmonic-mean solver")


@singledispatch
def settled(op: LinearOperator) -> LinearOperator:
    """The same operator, with `psd` found out on the host and kept, so that compiled programs can be chosen by it."""
    return op


@singledispatch
def not_convex_because(op: LinearOperator) -> str:
    """Why an operator that could be positive semi-definite is not known to be; empty if there is nothing to say."""
    return ""


@settled.register
def _(op: Sum) -> LinearOperator:
    return Sum(tuple(map(settled, op.terms)))


@not_convex_because.register
def _(op: Sum) -> str:
    return next(filter(None, map(not_convex_because, op.terms)), "")


@settled.register
def _(op: Scaled) -> LinearOperator:
    return dataclasses.replace(op, op=settled(op.op))


@not_convex_because.register
def _(op: Scaled) -> str:
    return not_convex_because(op.op)


@singledispatch
def spectral(op: LinearOperator) -> Spectral:
    """The eigendecomposition, where there is one in closed form.

    Args:
      op: The operator.

    Returns:
      A `Spectral`: maps of stacks, leaves `(K, *leaf)`, to coordinates and back, and the eigenvalues.

    Raises:
      TypeError: If there is none.

    Example:
      >>> import influence_jax as ij
      >>> ij.spectral(ij.Identity({"w": jnp.ones(2)})).values["w"].tolist()
      1.0
    """
    raise unsupported(spectral, op, "a closed-form solve")


@singledispatch
def sums(op: LinearOperator, V: PyTree) -> tuple[PyTree, Array]:
    r"""Products with a stack before dividing: $\sum_i w_i C_i v_k$ and $\sum_i w_i$.

    What is added up over batches that are not in memory at once.

    Args:
      op: Weighted mean over examples.
      V: Leaves `(K, *leaf)`.

    Returns:
      The summed products, in at least float32, and the total weight.

    Raises:
      TypeError: If the operator is not a mean over examples.

    Example:
      >>> import influence_jax as ij
      >>> op = ij.EmpiricalFisher(lambda params, z: params["w"] * z, {"w": jnp.array(1.0)}, jnp.array([1.0, 3.0]))
      >>> total, weight = ij.sums(op, {"w": jnp.array([1.0, 2.0])})
      >>> total["w"].tolist(), float(weight)
      ([10.0, 20.0], 2.0)
    """
    raise unsupported(sums, op, "accumulation over batches")


@singledispatch
def restrict(op: LinearOperator, block: Sequence[str]) -> LinearOperator:
    """The diagonal block of an operator on some of the parameters.

    Operators over data stay in their own class and cost what the block costs.

    Args:
      op: Operator on the whole space.
      block: Leaf names, e.g. `("head/bias", "head/kernel")`.

    Returns:
      An operator on flat dicts `{name: leaf}`.

    Raises:
      ValueError: If a name does not exist, or none is given.

    Example:
      >>> import influence_jax as ij
      >>> op = ij.restrict(ij.Identity({"a": {"w": jnp.ones(2)}, "b": jnp.ones(3)}), ("a/w",))
      >>> op.size
      2
    """
    if not isinstance(op, LinearOperator):
        raise unsupported(restrict, op, "a block-wise solve")
    return Restricted(op, blocks.as_block(block, op.space))


@singledispatch
def to_dense(op: LinearOperator) -> Array:
    """The matrix of an operator, `(P, P)`, rows and columns in the order of `flatten`.

    Memory is P²; the products are taken in at least float32.

    Args:
      op: The operator.

    Raises:
      TypeError: If `op` is no operator.

    Example:
      >>> import influence_jax as ij
      >>> ij.to_dense(ij.Identity({"w": jnp.ones(2)})).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    return symmetric(dense_by_products(checked(op)))


@singledispatch
def diagonal(op: LinearOperator) -> PyTree:
    """The diagonal of an operator, a tree shaped like the parameters; one product per parameter without closed form.

    Args:
      op: The operator.

    Returns:
      Tree like the parameters, leaves `(*leaf)`, float32 or wider.

    Raises:
      TypeError: If `op` is no operator.

    Example:
      >>> import influence_jax as ij
      >>> ij.diagonal(3.0 * ij.Identity({"w": jnp.ones(2)}))["w"].tolist()
      [3.0, 3.0]
    """
    return tree.unflatten(diagonal_by_products(checked(op)), op.space)


@singledispatch
def trace(op: LinearOperator, *, key: Key | None = None) -> Array:
    r"""The trace of an operator.

    Exact where there is a closed form or a factor per example, and up to 4096 parameters; else Hutchinson's estimate
    $\frac1{64}\sum_s z_s^\top A z_s$ with Rademacher $z_s$.

    Args:
      op: The operator.
      key: Needed for the estimate only.

    Returns:
      Scalar, float32 or wider.

    Raises:
      ValueError: If an estimate is needed and no key is given.

    Example:
      >>> import influence_jax as ij
      >>> float(ij.trace(3.0 * ij.Identity({"w": jnp.ones(2)})))
      6.0

    Reference: Hutchinson 1990, doi:10.1080/03610919008812866.
    """
    return trace_by_products(checked(op), key)


def trace_by_products(op: LinearOperator, key: Key | None) -> Array:
    """Exact up to `EXACT_TRACE_SIZE` parameters, else estimated with a key."""
    if op.size <= EXACT_TRACE_SIZE:
        return jnp.sum(diagonal_by_products(op))
    if key is None:
        raise ValueError(
            f"key: None, but the trace of {op!r} has to be estimated (more than {EXACT_TRACE_SIZE} parameters and no "
            "closed form; a RelativeDamping asks for it); pass key=jax.random.key(0), e.g. to invert"
        )
    return _hutchinson_trace(op, key)


@singledispatch
def check_losses(op: Any, *, gradients: bool = False) -> None:
    """Raise, on the host, if a loss in an operator's data is not finite; of another operator look at its parts.

    Args:
      op: The operator.
      gradients: Whether to look at gradients, too.

    Raises:
      ValueError: Saying how many, and which is the first.
    """
    is_part = lambda x: isinstance(x, LinearOperator) and x is not op
    for part in jax.tree.leaves(op, is_leaf=is_part):
        if isinstance(part, LinearOperator) and part is not op:
            check_losses(part, gradients=gradients)


def checked(op: Any) -> LinearOperator:
    """The operator, if it is one, and its losses are finite."""
    if not isinstance(op, LinearOperator):
        raise Unsupported(f"op: got a {type(op).__name__}, expected a LinearOperator")
    check_losses(op)
    return op


def wide_dtype(space: PyTree) -> np.dtype:
    """The dtype of flat vectors and dense matrices on a space."""
    return tree.accumulation_dtype(*(leaf.dtype for leaf in jax.tree.leaves(space)))


def symmetric(matrix: Array) -> Array:
    """The symmetric part, which removes what rounding broke."""
    return 0.5 * (matrix + matrix.swapaxes(-1, -2))


@compiled
def dense_by_products(op: LinearOperator) -> Array:
    """One product per column."""

    def column(index: Array) -> Array:
        return tree.flatten(op.mv(tree.basis_vector(index, op.space, wide_dtype(op.space))), op.space)

    return map_rows(column, jnp.arange(op.size), op.rhs_chunk)


@compiled
def diagonal_by_products(op: LinearOperator) -> Array:
    """One product per entry, flat."""

    def entry(index: Array) -> Array:
        vector = tree.basis_vector(index, op.space, wide_dtype(op.space))
        return tree.dot(vector, op.mv(vector))

    return map_rows(entry, jnp.arange(op.size), op.rhs_chunk)


@compiled
def _hutchinson_trace(op: LinearOperator, key: Key) -> Array:
    def quadratic(probe_key: Key) -> Array:
        signs = jax.random.rademacher(probe_key, (op.size,), wide_dtype(op.space))
        probe = tree.unflatten(signs, op.space)
        return tree.dot(probe, op.mv(probe))

    keys = jax.random.split(key, TRACE_PROBES)
    return jnp.mean(map_rows(quadratic, keys, op.rhs_chunk))


@dataclass
class Restricted(Wrapper):
    """The diagonal block of an operator that has no cheaper way to be restricted: embed zeros, apply, select.

    Vectors are flat dicts `{name: leaf}`.
    """

    op: LinearOperator
    block: blocks.Block = static()

    def mv(self, v: PyTree) -> PyTree:
        tree.check_vector(v, self.space, "v")
        return blocks.select(self.op.mv(blocks.embed(v, tree.cast_space(self.op.space, v))), self.block)

    def mm(self, V: PyTree) -> PyTree:
        tree.check_stack(V, self.space, "V")
        return (_embedded_product if self.on_host else _compiled_embedded_product)(self, V)

    @property
    def parts(self) -> tuple[LinearOperator, ...]:
        return (self.op,)

    @property
    def space(self) -> PyTree:
        return blocks.select(self.op.space, self.block)

    @property
    def fitted_at(self) -> tuple[PyTree, ...]:
        return tuple(blocks.select(at, self.block) for at in self.op.fitted_at)

    def __repr__(self) -> str:
        return _reprs.call(self, repr(self.op), _reprs.some(self.block))


def _embedded_product(op: Restricted, V: PyTree) -> PyTree:
    rows = tree.count(V)
    stacked = lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape), leaf.dtype)
    space = jax.tree.map(stacked, tree.cast_space(op.op.space, V))
    return blocks.select(op.op.mm(blocks.embed(V, space)), op.block)


_compiled_embedded_product = compiled(_embedded_product)


@settled.register
def _(op: Restricted) -> LinearOperator:
    return dataclasses.replace(op, op=settled(op.op))


@not_convex_because.register
def _(op: Restricted) -> str:
    return not_convex_because(op.op)
