r"""Conjugate gradients on stacked right-hand sides."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import tree
from .._pytree import dataclass, static
from .._typing import Array, Key, PyTree
from ..curvature import LinearOperator
from ..curvature.flat import Flat
from ..curvature.loops import while_loop
from .base import Fitted, Solver, iterate, resolve_damping
from .damping import Damping, DampingLike, check_iteration, damped_product, needs_damping
from .info import Info, iterative_advice, solved


@needs_damping
@dataclass
class CG(Solver):
    r"""Solve $(A + \lambda I) x = v$ by conjugate gradients, all right-hand sides in one loop.

    Every right-hand side stops on its own, at $\|r\| \le \max(\mathrm{rtol}\,\|v\|, \mathrm{atol})$ from $x_0 = 0$,
    when it meets non-positive curvature (the operator is indefinite: keeps the last iterate and reports it), or after
    `max_steps`. One product more is spent on the true residual, which `Info` reports and `converged` is judged by.
    Differentiable in damping, parameters, weights and v.

    Args:
      damping: $\lambda \ge 0$, a `RelativeDamping`, or a dict or tree of these by block or leaf.
      rtol: Relative tolerance.
      atol: Absolute tolerance.
      max_steps: Most iterations; static.
      preconditioner: A solver, fitted to the same operator, or a positive definite operator that approximates the
        inverse; None for none.

    Raises:
      TypeError, ValueError: If an argument is not of that form; in `invert`, of a `RelativeDamping` if the mean
        eigenvalue is not positive.

    Example:
      >>> import influence_jax as ij
      >>> inverse = ij.invert(ij.Diagonal({"w": jnp.array([1.0, 3.0])}), ij.CG(damping=1.0))
      >>> x, info = inverse.solve({"w": jnp.array([2.0, 4.0])})
      >>> int(info.steps), bool(info.converged)
      (2, True)

    Reference: Hestenes & Stiefel 1952.
    """

    damping: DampingLike
    rtol: float | Array = dataclasses.field(default=1e-5, kw_only=True)
    atol: float | Array = dataclasses.field(default=0.0, kw_only=True)
    max_steps: int = static(default=1000, kw_only=True)
    preconditioner: Solver | LinearOperator | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_iteration(self)
        if self.preconditioner is not None and not isinstance(self.preconditioner, Solver | LinearOperator):
            raise TypeError(f"preconditioner: got {self.preconditioner!r}, expected a solver, a LinearOperator or None")
        if isinstance(self.preconditioner, LinearOperator) and self.preconditioner.is_curvature:
            raise TypeError(
                f"preconditioner: got a curvature, {self.preconditioner!r}, expected what approximates the inverse: "
                f"invert({self.preconditioner!r}, Direct(damping))"
            )
        if self.preconditioner is not None and not self.preconditioner.symmetric:
            raise ValueError(
                f"preconditioner: got {self.preconditioner!r}, whose answers are random, expected a fixed self-adjoint "
                "map such as Nystrom(damping, rank=100)"
            )

    def fit(self, op: LinearOperator, damping: Damping, *, key: Key | None = None) -> Fitted | tuple[()]:
        preconditioner = self.preconditioner
        if isinstance(preconditioner, Solver):
            key_damping, key_fit = (None, None) if key is None else jax.random.split(key)
            fixed = lax.stop_gradient(op)
            own = resolve_damping(preconditioner, fixed, key_damping)
            return Fitted(own, preconditioner.fit(fixed, own, key=key_fit))
        if preconditioner is not None:
            tree.check_vector(preconditioner.space, op.space, "preconditioner")
            if preconditioner.on_host and not op.on_host:
                raise TypeError(
                    f"preconditioner: got an {type(preconditioner).__name__} that reads its data from a loader at "
                    "every step, expected one in memory, such as the inverse of a Kronecker"
                )
        return ()

    def solve(self, op: LinearOperator, damping: Damping, fit: Any, V: PyTree) -> tuple[PyTree, Info]:
        of_leaves, fit, rtol, atol = lax.stop_gradient((op, fit, self.rtol, self.atol))
        precondition = self._precondition(of_leaves, fit)

        def solve(op: LinearOperator, damping: Damping, B: PyTree) -> tuple[PyTree, Info]:
            return conjugate_gradients(
                partial(damped_product, op, damping),
                B,
                precondition=op.lifted(precondition) if precondition and isinstance(op, Flat) else precondition,
                rtol=rtol,
                atol=atol,
                max_steps=self.max_steps,
                while_loop=while_loop(op),
            )

        return iterate(op, damping, V, solve)

    def _precondition(self, op: LinearOperator, fit: Any) -> Callable[[PyTree], PyTree] | None:
        preconditioner = self.preconditioner
        if preconditioner is None:
            return None
        if isinstance(preconditioner, LinearOperator):
            return lax.stop_gradient(preconditioner).mm
        return lambda R: preconditioner.solve(op, fit.damping, fit.fit, R)[0]

    def advice(self, info: Info) -> str:
        return iterative_advice(self, info)


class _Iterate(NamedTuple):
    """State of K independent recurrences."""

    x: PyTree  # (K, *leaf) solution
    r: PyTree  # (K, *leaf) residual by recurrence
    p: PyTree  # (K, *leaf) search direction
    rz: Array  # (K,) <r, M r>
    active: Array  # (K,) bool
    steps: Array  # (K,) int32
    lowest: Array  # (K,) smallest curvature met
    highest: Array  # (K,) largest curvature met
    step: Array  # () int32


def conjugate_gradients(
    mm: Callable[[PyTree], PyTree],
    B: PyTree,
    *,
    precondition: Callable[[PyTree], PyTree] | None = None,
    rtol: float | Array = 1e-5,
    atol: float | Array = 0.0,
    max_steps: int = 1000,
    while_loop: Callable[..., Any] = lax.while_loop,
) -> tuple[PyTree, Info]:
    """Conjugate gradients for a stack of right-hand sides.

    Args:
      mm: Product of the damped operator with a stack.
      B: Right-hand sides, leaves `(K, *leaf)`, float32 or wider.
      precondition: Product of an approximate inverse with a stack.
      rtol: Relative tolerance.
      atol: Absolute tolerance.
      max_steps: Most iterations.
      while_loop: `lax.while_loop`, or a host loop of the same signature, when `mm` reads data from outside.

    Returns:
      Solutions, and Info with leaves `(K,)`.
    """
    precondition = precondition or (lambda R: R)
    # Of unit length, so that inner products stay in range whatever the right-hand sides are measured in.
    norm = tree.norms(B)
    unit = jnp.where(norm > 0, norm, 1)
    tolerance = jnp.maximum(rtol, atol / unit).astype(norm.dtype)
    rhs = tree.scale_rows(1 / unit, B)
    z = precondition(rhs)
    count = norm.shape[0]
    start = _Iterate(
        x=tree.zeros_like(rhs),
        r=rhs,
        p=z,
        rz=tree.dots(rhs, z),
        active=(norm > 0) & (tolerance < 1),
        steps=jnp.zeros(count, jnp.int32),
        lowest=jnp.full(count, jnp.inf, norm.dtype),
        highest=jnp.zeros(count, norm.dtype),
        step=jnp.zeros((), jnp.int32),
    )
    end = while_loop(
        lambda it: jnp.any(it.active) & (it.step < max_steps),
        lambda it: _step(it, mm, precondition, tolerance),
        start,
    )
    x = tree.scale_rows(unit, end.x)
    return solved(mm, x, B, tolerance, end.steps, end.lowest)


def _step(
    it: _Iterate, mm: Callable[[PyTree], PyTree], precondition: Callable[[PyTree], PyTree], tolerance: Array
) -> _Iterate:
    ap = mm(it.p)
    pap, pp = tree.dots(it.p, ap), tree.dots(it.p, it.p)
    curvature = pap / jnp.where(pp > 0, pp, 1)
    lowest = jnp.where(it.active, jnp.minimum(it.lowest, curvature), it.lowest)
    highest = jnp.where(it.active, jnp.maximum(it.highest, curvature), it.highest)
    # Curvature at rounding level, zero or negative: dividing by it would throw the iterate away.
    usable = it.active & (curvature > jnp.finfo(pap.dtype).eps * highest) & (it.rz > 0) & jnp.isfinite(pap)
    alpha = jnp.where(usable, it.rz / jnp.where(usable, pap, 1), 0)
    x = tree.add_scaled_rows(it.x, alpha, it.p)
    r = tree.where_rows(usable, tree.add_scaled_rows(it.r, -alpha, ap), it.r)
    z = precondition(r)
    rz = jnp.where(usable, tree.dots(r, z), it.rz)
    beta = jnp.where(usable, rz / jnp.where(usable, it.rz, 1), 0)
    p = tree.where_rows(usable, tree.add_scaled_rows(z, beta, it.p), it.p)
    active = usable & (tree.norms(r) > tolerance)
    return _Iterate(x, r, p, rz, active, it.steps + usable.astype(jnp.int32), lowest, highest, it.step + 1)
