"""How a solve went, and how to tell people."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _reprs, tree
from .._typing import Array, PyTree
from .._words import levels_inside
from ..curvature import LinearOperator
from ..curvature.capabilities import not_convex_because


class Info(NamedTuple):
    """How a solve went; leaves are scalars, or `(K,)` for stacked right-hand sides.

    Attributes:
      steps: Iterations spent, 0 for closed forms; int32.
      residual: `||b - A x|| / ||b||` of the damped operator A; None if no extra product was spent on it.
      converged: Whether the answer can be relied on.
      min_curvature: Smallest `vᵀAv / vᵀv` met on the damped operator, negative means indefinite; None if the solver
        meets none, and infinite, the least of nothing, for a right-hand side of zero that took no step.
      block: Which block, counted in `inverse.blocks`, went worst; 0 where there is only one; int32.
      standard_error: Of a randomised solution over its repeats, relative to its length: 0 where nothing is random, None
        from a single repeat.

    Example:
      >>> import influence_jax as ij
      >>> inverse = ij.invert(ij.Identity({"w": jnp.ones(2)}), ij.Direct(1.0))
      >>> inverse.solve({"w": jnp.ones(2)})[1]
      Info(converged, steps 0, min_curvature 2)
    """

    steps: Array
    residual: Array | None
    converged: Array
    min_curvature: Array | None = None
    block: Array | int = 0
    standard_error: Array | float | None = 0.0

    def __repr__(self) -> str:
        converged, block, error = map(_reprs.numbers, (self.converged, self.block, self.standard_error))
        if converged is None:
            outcome = f"converged {_reprs.array(self.converged)}"
        elif converged.ndim:
            outcome = f"{converged.sum()} of {converged.size} converged"
        else:
            outcome = "converged" if converged else "not converged"
        told = {"steps": self.steps, "residual": self.residual, "min_curvature": self.min_curvature}
        told |= {"block": self.block} if block is None or block.any() else {}
        told |= {"standard_error": self.standard_error} if error is None or error.any() else {}
        spans = {name: _reprs.span(field) for name, field in told.items() if field is not None}
        return _reprs.call(self, outcome, *(f"{name} {span}" for name, span in spans.items() if span))


def solved(
    mm: Callable[[PyTree], PyTree], X: PyTree, B: PyTree, tolerance: Array, steps: Array, lowest: Array | None
) -> tuple[PyTree, Info]:
    """An iterative solution, and how good it is by its true residual, for which one product is spent.

    Args:
      mm: Product of the damped operator with a stack.
      X: Solutions, leaves `(K, *leaf)`.
      B: Right-hand sides.
      tolerance: On the relative residual, `(K,)`.
      steps: Iterations, `(K,)`.
      lowest: Smallest curvature met, `(K,)`; infinite where none was, None if the solver meets none.
    """
    norm = tree.norms(B)
    unit = jnp.where(norm > 0, norm, 1)
    scaled = [tree.scale_rows(1 / unit, rows) for rows in (B, X)]  # a difference of tiny numbers is none
    residual = tree.norms(tree.subtract(scaled[0], mm(scaled[1])))
    # A product or a right-hand side that is not finite may leave X at 0, which would pass for an answer.
    X = tree.where_rows(
        jnp.isfinite(residual), X, jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), X)
    )
    # Rounding lets a recurrence run ahead of the true residual; a factor of two is noise, more is not converged.
    converged = residual <= 2 * tolerance
    return X, Info(steps, residual, converged, lowest, jnp.zeros_like(steps), jnp.zeros_like(residual))


def worst(infos: Sequence[Info]) -> Info | None:
    """Field by field the worst of several solves; None of none."""
    if not infos:
        return None
    steps, residual, converged, curvature, block, error = zip(*infos, strict=True)
    return Info(
        jnp.max(jnp.stack(steps), axis=0),
        None if _unknown(residual) else jnp.max(jnp.stack(residual), axis=0),
        jnp.all(jnp.stack(converged), axis=0),
        lowest_known(curvature),
        jnp.max(jnp.stack(block), axis=0),
        None if _unknown(error) else jnp.max(jnp.stack(error), axis=0),
    )


def _unknown(fields: Sequence[Any]) -> bool:
    """Tell whether one of several is not known, and so not the worst of them either."""
    return any(field is None for field in fields)


def lowest_known(curvatures: Sequence[Array | None]) -> Array | None:
    """The smallest of the curvatures that are known; None of none."""
    known = [curvature for curvature in curvatures if curvature is not None]
    return functools.reduce(jnp.fmin, known) if known else None


class ConvergenceWarning(UserWarning):
    """Some solves did not converge, and what was computed from them cannot be relied on.

    Example:
      >>> import influence_jax as ij
      >>> inverse = ij.invert(ij.Diagonal({"w": jnp.array([1.0, 3.0])}), ij.CG(0.0, max_steps=1))
      >>> influence = ij.Influence(lambda params, z: params["w"] @ z, {"w": jnp.ones(2)}, inverse)
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     scores = influence.influences(jnp.ones((1, 2)), jnp.ones((1, 2)))
      >>> caught[0].category is ij.ConvergenceWarning
      True
    """


class ConvergenceError(RuntimeError):
    """Some solves did not converge, where `throw=True` asks for an error.

    Example:
      >>> import influence_jax as ij
      >>> inverse = ij.invert(ij.Diagonal({"w": jnp.array([1.0, 3.0])}), ij.CG(0.0, max_steps=1))
      >>> influence = ij.Influence(lambda params, z: params["w"] @ z, {"w": jnp.ones(2)}, inverse, throw=True)
      >>> influence.influences(jnp.ones((1, 2)), jnp.ones((1, 2)))
      Traceback (most recent call last):
      ...
      influence_jax.solvers.info.ConvergenceError: ...1 of 1 solves did not converge...
    """


def report(info: Info | None, inverse: LinearOperator, throw: bool) -> None:
    """Warn or raise, on the host, about solves that did not converge; silent under tracing."""
    if info is None or isinstance(info.converged, jax.core.Tracer) or all_converged(info):
        return
    message = f"{describe_failure(info, inverse)}; inverse.solve_many reports each"
    if throw:
        raise ConvergenceError(message)
    warnings.warn(message, ConvergenceWarning, stacklevel=levels_inside())


def all_converged(info: Info) -> bool:
    """Ask numpy, which compiles nothing; where some are on the devices of other processes, a program of all."""
    converged = info.converged
    return bool(np.all(np.asarray(converged) if getattr(converged, "is_fully_addressable", True) else converged))


def describe_failure(info: Info, inverse: LinearOperator) -> str:
    """Which solves failed, how badly, and what to change."""
    failed = ~np.asarray(info.converged)
    told: Any = jax.tree.map(lambda field: np.broadcast_to(np.asarray(field), failed.shape)[failed], info)
    facts = []
    if told.residual is not None and np.isfinite(told.residual).all():
        facts.append(f"worst relative residual {np.max(told.residual):.1e}")
    if np.isfinite(lowest_of(told)):
        facts.append(f"smallest curvature {lowest_of(told):.1e}")
    details = f" ({', '.join(facts)})" if facts else ""
    by_block: Mapping[str, Any] = getattr(inverse, "by_block", {})
    names = list(by_block)
    where = sorted({names[index] for index in told.block}) if len(names) > 1 else []
    in_blocks = f" in block{'s' * (len(where) > 1)} {', '.join(map(repr, where))}" if where else ""
    if where:
        advice = [_advice(by_block[name], told, told.block == names.index(name)) for name in where]
    else:
        advice = [_advice(part, told, np.ones(len(told.block), bool)) for part in _inverses(inverse)]
    return (
        f"{inverse!r}: {failed.sum()} of {failed.size} solves did not converge{in_blocks}{details}, so what is "
        f"computed from them cannot be relied on: {'; '.join(dict.fromkeys(advice))}"
    )


NOT_FINITE = (
    "a right-hand side or a product with the operator is NaN or infinite: look for an example whose loss or gradient "
    "is not finite"
)
USE_GGN = "the operator is indefinite; use GGN"
INDEFINITE = USE_GGN + "; raise the damping by more than {needed:.1e}, or use Eigh, which is exact"


def lowest_of(info: Info) -> float:
    """Return the smallest curvature that is known of several solves; infinite if none is."""
    known = np.zeros(0) if info.min_curvature is None else np.asarray(info.min_curvature)
    return float(np.fmin.reduce(known, axis=None, initial=np.inf))


def is_nan(info: Info) -> bool:
    """Tell whether what is known of solves says that numbers in them were not finite."""
    known = [field for field in (info.residual, info.min_curvature) if field is not None]
    return any(bool(np.isnan(field).any()) for field in known)


def more_damping(solver: Any) -> str:
    """Ask for more damping, and say so where there is none."""
    damping = _reprs.numbers(getattr(solver, "damping", None))
    return "raise the damping" + (", which is 0" if damping is not None and damping.ndim == 0 and damping == 0 else "")


def iterative_advice(solver: Any, info: Info) -> str:
    """Advise on conjugate gradients: out of steps, indefinite, or stopped by rounding."""
    if is_nan(info):
        return NOT_FINITE
    if lowest_of(info) < 0:
        return INDEFINITE.format(needed=-lowest_of(info))
    if np.max(info.steps) >= solver.max_steps:
        return f"{more_damping(solver)}, or rtol, or max_steps, all {solver.max_steps} of which were spent"
    return f"rounding stopped it: {more_damping(solver)}, or rtol, or compute in 64-bit mode"


def _inverses(op: Any) -> list[Any]:
    """Return the inverses that an operator is made of: itself, or those in a sum or a multiple."""
    if hasattr(op, "solver"):
        return [op]
    terms = getattr(op, "terms", (op.op,) if hasattr(op, "op") else ())
    return [part for term in terms for part in _inverses(term)]


def _advice(inverse: Any, info: Any, rows: np.ndarray) -> str:
    """Ask the solver what to change; curvature below zero is rounding where the operator has none."""
    told = jax.tree.map(lambda field: field[rows], info)
    if inverse.op.psd and told.min_curvature is not None:
        told = told._replace(min_curvature=np.maximum(told.min_curvature, 0))
    why = not_convex_because(inverse.op)  # of a GGN, which is not told to be one
    advice = inverse.solver.advice(told)
    return advice.replace(USE_GGN, why) if why else advice
