r"""Preconditioners for conjugate gradients; `Nystrom` is another."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import tree
from .._pytree import dataclass, static
from .._typing import Array, Key, PyTree
from ..batching import check_key, check_positive, map_rows
from ..curvature import LinearOperator, diagonal
from ..curvature.capabilities import wide_dtype
from .base import Solver, measured
from .damping import RelativeDamping, check_damping, needs_damping, redamp, resolve_damping
from .info import Info


class JacobiState(NamedTuple):
    """The operator and its diagonal."""

    op: LinearOperator
    damping: Array  # ()
    entries: PyTree  # leaves (*leaf), non-negative


@needs_damping
@dataclass
class Jacobi(Solver):
    r"""Divide by the diagonal, $x = v / (|d| + \lambda)$.

    A preconditioner, `CG(damping, preconditioner=Jacobi(damping))`.  Entries are never smaller than
    rounding allows, so it is positive definite whatever the operator.  As a solver of its own it is the diagonal
    approximation of the inverse; the residual says how good.  Its entries are constants to differentiation.  Measure
    before you use it: on tanh networks it made conjugate gradients take three times the iterations.

    Args:
      damping: $\lambda \ge 0$, or a `RelativeDamping`.
      probes: Estimate the diagonal by Hutchinson with that many Rademacher vectors, $\frac1S\sum_s z_s \odot A z_s$;
        the exact diagonal if None; static.

    Raises:
      ValueError: In `invert`, if probes are to be drawn and no key is given.

    Example:
      >>> import influence_jax as ij
      >>> op = ij.Diagonal({"w": jnp.array([1.0, 3.0])})
      >>> ij.invert(op, ij.Jacobi(1.0)).mv({"w": jnp.array([2.0, 4.0])})["w"].tolist()
      [1.0, 1.0]

    Reference: Bekas, Kokiopoulou & Saad 2007, doi:10.1016/j.apnum.2007.01.003.
    """

    damping: float | Array | RelativeDamping
    probes: int | None = static(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_damping(self.damping)
        if self.probes is not None:
            check_positive(self.probes, "probes")

    @property
    def approximate(self) -> bool:
        return True

    def init(self, op: LinearOperator, *, key: Key | None = None) -> JacobiState:
        key_damping, key_probes = (None, None) if key is None else jax.random.split(key)
        fixed = lax.stop_gradient(op)
        if self.probes is None:
            entries = diagonal(fixed)
        else:
            entries = _hutchinson(fixed, self.probes, check_key(key_probes, "Jacobi draws probes; pass it to invert"))
        entries = jax.tree.map(jnp.abs, tree.promote(entries))
        largest = jnp.max(jnp.stack([jnp.max(leaf, initial=0) for leaf in jax.tree.leaves(entries)]))
        floor = largest * jnp.finfo(largest.dtype).eps
        entries = jax.tree.map(lambda leaf: jnp.maximum(leaf, floor.astype(leaf.dtype)), entries)
        return JacobiState(op, resolve_damping(self.damping, op, key_damping), entries)

    def apply_many(self, state: JacobiState, V: PyTree) -> tuple[PyTree, Info]:
        V, damping = tree.promote(V), state.damping
        damped = jax.tree.map(lambda d: d + damping.astype(d.dtype), state.entries)
        # Without curvature and damping there is nothing to divide by: one keeps the preconditioner positive.
        X = jax.tree.map(lambda v, d: v / jnp.broadcast_to(jnp.where(d > 0, d, 1), v.shape), V, damped)
        return X, measured(state.op, damping, X, V)

    def with_damping(self, state: JacobiState, damping: Any, *, key: Key | None = None) -> tuple[Any, JacobiState]:
        return redamp(self, state, damping, key)


def _hutchinson(op: LinearOperator, probes: int, key: Key) -> PyTree:
    def one(probe_key: Key) -> PyTree:
        signs = tree.unflatten(jax.random.rademacher(probe_key, (op.size,), wide_dtype(op.space)), op.space)
        return jax.tree.map(jnp.multiply, signs, op.mv(signs))

    products = map_rows(one, jax.random.split(key, probes), op.rhs_chunk)
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), products)
