"""Damping: what is added to an operator's eigenvalues before it is inverted."""

from __future__ import annotations

import dataclasses
import functools
import numbers
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from .. import _reprs
from .._pytree import dataclass
from .._typing import Array, Key, PyTree
from ..batching import check_positive
from ..curvature import LinearOperator, diagonal_blocks, trace
from ..curvature.capabilities import wide_dtype


@dataclass
class RelativeDamping:
    r"""Damping as a multiple c of the operator's mean eigenvalue, $\lambda = c\,\mathrm{tr}(A) / P$ of P parameters.

    Args:
      factor: Non-negative number; 0.1 is common for Kronecker-factored curvature.

    Raises:
      TypeError, ValueError: If it is not a non-negative number.

    Example:
      >>> import influence_jax as ij
      >>> inverse = ij.invert(3.0 * ij.Identity({"w": jnp.ones(2)}), ij.Direct(ij.RelativeDamping(0.5)))
      >>> float(inverse.state.damping)
      1.5

    Reference: Grosse et al. 2023, arXiv:2308.03296, section 3.2.
    """

    factor: float | Array

    def __post_init__(self) -> None:
        check_number(self.factor, "factor")

    def __repr__(self) -> str:
        return _reprs.call(self, _reprs.value(self.factor))


_T = TypeVar("_T")

CHOICES = (
    "a number >= 0 in units of the loss, influence_jax.RelativeDamping(0.1) for a tenth of the mean eigenvalue, or 0.0 "
    "if the matrix is known to be well conditioned"
)


def needs_damping(cls: type[_T]) -> type[_T]:
    """Make a solver that is called without a damping say which there are.

    None of them has a default: a network's curvature is singular, what to add to it is a modelling choice with the
    units of the loss, and an undamped solve of a singular system is the commonest wrong number of all.
    """
    make: Any = cls.__init__

    @functools.wraps(make)
    def init(self: Any, *args: Any, **options: Any) -> None:
        if not args and "damping" not in options:
            raise TypeError(f"damping: {cls.__name__} got none, expected {CHOICES}, e.g. {cls.__name__}(damping=1e-2)")
        make(self, *args, **options)

    setattr(cls, "__init__", init)  # noqa: B010
    return cls


def check_number(value: Any, name: str) -> None:
    """Raise unless `value` is a finite non-negative scalar; traced values pass unseen."""
    if isinstance(value, jax.core.Tracer):
        return
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Real | np.ndarray | jax.Array)
        or getattr(value, "shape", ()) != ()
    ):
        raise TypeError(f"{name}: got {value!r}, expected a non-negative number")
    if not 0 <= float(value) < float("inf"):
        raise ValueError(f"{name}: got {float(value)}, expected a finite non-negative number")


def check_tolerance(rtol: Any) -> None:
    """Raise unless `rtol` is a number in [0, 1); at 1 the zero vector would be an answer."""
    check_number(rtol, "rtol")
    if not isinstance(rtol, jax.core.Tracer) and float(rtol) >= 1:
        raise ValueError(f"rtol: got {float(rtol)}, expected a number below 1, e.g. 1e-5")


def check_damping(damping: Any, name: str = "damping") -> None:
    """Raise unless `damping` is a non-negative number or a `RelativeDamping`."""
    if isinstance(damping, RelativeDamping):
        return
    try:
        check_number(damping, name)
    except TypeError:
        raise TypeError(
            f"{name}: got {damping!r}, expected a non-negative number or influence_jax.RelativeDamping(factor)"
        ) from None


def check_iteration(solver: Any) -> None:
    """Raise unless the damping, the tolerances and the number of steps of conjugate gradients make sense."""
    check_damping(solver.damping)
    check_tolerance(solver.rtol)
    check_number(solver.atol, "atol")
    check_positive(solver.max_steps, "max_steps")


def resolve_damping(damping: float | Array | RelativeDamping, op: LinearOperator, key: Key | None) -> Array:
    """The absolute damping, an array in the dtype the solver computes in."""
    dtype = wide_dtype(op.space)
    if not isinstance(damping, RelativeDamping):
        return jnp.asarray(damping, dtype)
    if len(diagonal_blocks(op)) > 1:
        raise ValueError(
            f"damping: got {damping!r}, relative to the mean eigenvalue of each block of {op!r}, for a solver with one "
            "damping for all; use Direct, or Blockwise(solver)"
        )
    mean = (trace(op, key=key) / op.size).astype(dtype)
    # Under tracing nothing can raise: NaN turns into `converged=False`, and `invert` raises for it on the host.
    return jnp.where(mean > 0, jnp.asarray(damping.factor, dtype) * mean, jnp.nan)


def redamp(solver: Any, state: Any, damping: Any, key: Key | None) -> tuple[Any, Any]:
    """`with_damping` of a solver whose state is an operator, a damping, and what does not depend on it."""
    return dataclasses.replace(solver, damping=damping), state._replace(damping=resolve_damping(damping, state.op, key))


def damped_product(op: LinearOperator, damping: Array, X: PyTree) -> PyTree:
    """`(A + damping I) X` for a stack."""
    return jax.tree.map(lambda ax, x: ax + damping.astype(x.dtype) * x, op.mm(X), X)


def check_resolved(solver: Any, state: PyTree, op: LinearOperator) -> None:
    """Raise, on the host, if a `RelativeDamping` met a mean eigenvalue that is not positive."""
    is_relative = lambda x: isinstance(x, RelativeDamping)
    if not any(map(is_relative, jax.tree.leaves(solver, is_leaf=is_relative))):
        return
    for where, damping in _dampings(state):
        if not isinstance(damping, jax.core.Tracer) and not np.isfinite(damping):
            raise ValueError(
                f"damping: {solver!r} on {op!r} asks for a multiple of the mean eigenvalue{where}, which is not "
                "positive; give an absolute damping"
            )


def _dampings(state: PyTree) -> Iterator[tuple[str, Array]]:
    """The dampings in a state, those of preconditioners included, and the blocks they are for."""
    is_damped = lambda x: hasattr(x, "op") and (hasattr(x, "damping") or hasattr(x, "dampings"))
    for path, part in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_damped):
        if not is_damped(part):
            continue
        keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        where = f" of block '{'/'.join(keys)}'" if keys else ""
        if hasattr(part, "dampings"):
            yield from ((f" of block '{name}'", damping) for name, damping in part.dampings.items())
            continue
        yield where, part.damping
        yield from _dampings([getattr(part, name) for name in part._fields if name not in ("op", "damping")])
