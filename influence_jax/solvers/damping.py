"""Damping: what is added to an operator's eigenvalues before it is inverted."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from .. import _reprs
from .._pytree import dataclass
from .._typing import Array, Key, PyTree
from .._words import levels_inside
from ..batching import check_positive
from ..curvature import LinearOperator, diagonal_blocks, trace
from ..curvature.capabilities import EXACT_TRACE_SIZE, wide_dtype


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

# A parameter that the loss does not depend on, as in front of a normalisation, has a gradient of rounding only, some
# multiple c of the machine epsilon times the gradients of others, and hence a curvature of c² eps² times theirs.
# Measured on instance, layer and RMS norms (8 to 64 channels, up to 200 positions): mean eigenvalues of such a block
# are 8e-16 to 7e-12 of the largest block's in float32, bfloat16 parameters included, whose gradients are taken in
# float32, and 1e-33 to 1e-29 in float64; so c is 0.2 to 22, the most for K-FAC with many positions.  64 is three times
# that, 6e-11 in float32, where a block that is small but real, 1e-8 of the largest, keeps a damping of its own.
NOISE = 64

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


def block_dampings(
    wanted: Mapping[str, Any], parts: Mapping[str, LinearOperator], keys: Mapping[str, Key | None]
) -> tuple[OrderedDict[str, Array], OrderedDict[str, Array]]:
    r"""Return the absolute dampings that are relative in `wanted`, and which blocks hold nothing but rounding.

    Relative to the mean eigenvalue of each block.  Of a block without curvature, to rounding, any multiple of its own
    mean would make its scores as loud as all others: it is damped by the mean of all blocks.
    """
    relative = {name: damping for name, damping in wanted.items() if isinstance(damping, RelativeDamping)}
    if not relative:
        return OrderedDict(), OrderedDict()
    found = {name: _known_trace(part, keys[name], name in relative) for name, part in parts.items()}
    traces = {name: total for name, total in found.items() if total is not None}
    means = {name: total / parts[name].size for name, total in traces.items()}
    whole = jnp.sum(jnp.stack(list(traces.values()))) / sum(parts[name].size for name in traces)
    largest = jnp.max(jnp.stack(list(means.values())))
    dampings: OrderedDict[str, Array] = OrderedDict()
    noise: OrderedDict[str, Array] = OrderedDict()
    for name, damping in relative.items():
        dtype = wide_dtype(parts[name].space)
        dead = jnp.abs(means[name]) <= (NOISE * float(jnp.finfo(dtype).eps)) ** 2 * largest
        mean = jnp.where(dead, whole, means[name])
        # Under tracing nothing can raise: NaN turns into `converged=False`, and `invert` raises for it on the host.
        dampings[name] = jnp.where(mean > 0, damping.factor * mean, jnp.nan).astype(dtype)
        noise[name] = dead & (means[name] != 0)
    return dampings, noise


def _known_trace(op: LinearOperator, key: Key | None, needed: bool) -> Array | None:
    """Return the trace of a block; None where it is only compared with and would have to be estimated without a key."""
    if not needed and key is None and not op.on_host and op.size > EXACT_TRACE_SIZE:
        try:
            return trace(op)
        except ValueError:
            return None
    return trace(op, key=key)


def warn_of_noise(noise: Mapping[str, Array], op: LinearOperator) -> None:
    """Name, on the host, the blocks whose curvature is rounding beside that of the others."""
    if any(isinstance(is_noise, jax.core.Tracer) for is_noise in noise.values()):
        return
    named = [repr(name) for name, is_noise in noise.items() if np.asarray(is_noise)]
    if named:
        blocks, their = ("block", "its") if len(named) == 1 else ("blocks", "their")
        warnings.warn(
            f"damping: in {op!r} the curvature of {blocks} {', '.join(named)} is rounding beside that of the others, "
            "as of parameters that the loss does not depend on, e.g. in front of a normalisation; "
            f"{their} RelativeDamping is relative to the mean eigenvalue of all blocks",
            stacklevel=levels_inside(),
        )


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
        check_positive_mean(damping, solver, op, where)


def check_positive_mean(damping: Array, solver: Any, op: LinearOperator, where: str) -> None:
    """Raise if a `RelativeDamping` came to nothing; traced values pass unseen."""
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
