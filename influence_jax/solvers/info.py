"""How a solve went, and how to tell people."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

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
      residual: `||b - A x|| / ||b||` of the damped operator A, NaN where no extra product was spent on it.
      converged: Whether the answer can be relied on.
      min_curvature: Smallest `vᵀAv / vᵀv` met on the damped operator; negative means indefinite.
      block: Which block, counted in `inverse.blocks`, went worst; 0 where there is only one; int32.
      standard_error: Of a randomised solution over its repeats, relative to its length: 0 where nothing is random, NaN
        from a single repeat.

    Example:
      >>> import influence_jax as ij
      >>> inverse = ij.invert(ij.Identity({"w": jnp.ones(2)}), ij.Direct(1.0))
      >>> inverse.solve({"w": jnp.ones(2)})[1]
      Info(converged, steps 0, min_curvature 2)
    """

    steps: Array
    residual: Array
    converged: Array
    min_curvature: Array
    block: Array | int = 0
    standard_error: Array | float = 0.0

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
        spans = {name: _reprs.span(field) for name, field in told.items()}
        return _reprs.call(
            self, outcome, *(f"{name} {span}" for name, span in spans.items() if span not in ("", "NaN"))
        )


def solved(
    mm: Callable[[PyTree], PyTree], X: PyTree, B: PyTree, tolerance: Array, steps: Array, lowest: Array
) -> tuple[PyTree, Info]:
    """An iterative solution, and how good it is by its true residual, for which one product is spent.

    Args:
      mm: Product of the damped operator with a stack.
      X: Solutions, leaves `(K, *leaf)`.
      B: Right-hand sides.
      tolerance: On the relative residual, `(K,)`.
      steps: Iterations, `(K,)`.
      lowest: Smallest curvature met, `(K,)`; infinite if none was.
    """
    norm = tree.norms(B)
    unit = jnp.where(norm > 0, norm, 1)
    scaled = [tree.scale_rows(1 / unit, rows) for rows in (B, X)]  # a difference of tiny numbers is none
    residual = tree.norms(tree.subtract(scaled[0], mm(scaled[1])))
    # A product or a right-hand side that is not finite may leave X at 0, which would pass for an answer.
    X = tree.where_rows(jnp.isfinite(residual), X, jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), X))
    # Rounding lets a recurrence run ahead of the true residual; a factor of two is noise, more is not converged.
    converged = residual <= 2 * tolerance
    lowest = jnp.where(jnp.isinf(lowest), jnp.nan, lowest)
    return X, Info(steps, residual, converged, lowest, jnp.zeros_like(steps), jnp.zeros_like(residual))


def worst(infos: Sequence[Info]) -> Info | None:
    """Field by field the worst of several solves; None of none."""
    if not infos:
        return None
    steps, residual, converged, curvature, block, error = (jnp.stack(field) for field in zip(*infos, strict=True))
    return Info(
        jnp.max(steps, axis=0),
        jnp.max(residual, axis=0),
        jnp.all(converged, axis=0),
        jnp.nanmin(curvature, axis=0),
        jnp.max(block, axis=0),
        jnp.max(error, axis=0),
    )


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
    residuals, curvatures = np.asarray(info.residual)[failed], np.asarray(info.min_curvature)[failed]
    lowest = float(np.fmin.reduce(curvatures, axis=None))
    facts = [f"worst relative residual {np.max(residuals):.1e}"] if np.all(np.isfinite(residuals)) else []
    facts += [f"smallest curvature {lowest:.1e}"] if np.isfinite(lowest) else []
    details = f" ({', '.join(facts)})" if facts else ""
    names = list(getattr(inverse, "by_block", [""]))
    blocks = np.broadcast_to(info.block, failed.shape)[failed]
    where = sorted({names[index] for index in blocks}) if len(names) > 1 else []
    in_blocks = f" in block{'s' * (len(where) > 1)} {', '.join(map(repr, where))}" if where else ""
    if lowest < 0:
        why = not_convex_because(inverse) or "the operator is indefinite; use GGN"
        advice = f"{why}; raise the damping, or use Eigh, which is exact"
    else:
        advice = "raise the damping, the tolerance or max_steps, or compute in 64-bit mode"
    return (
        f"{inverse!r}: {failed.sum()} of {failed.size} solves did not converge{in_blocks}{details}, so what is "
        f"computed from them cannot be relied on: {advice}"
    )
