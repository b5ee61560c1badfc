"""How a solve went, and how to tell people."""

from __future__ import annotations

import pathlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import tree
from .._typing import Array, PyTree
from ..curvature import LinearOperator

PACKAGE = str(pathlib.Path(__file__).parent.parent)


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
    """

    steps: Array
    residual: Array
    converged: Array
    min_curvature: Array
    block: Array | int = 0
    standard_error: Array | float = 0.0


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
    """Some solves did not converge, and what was computed from them cannot be relied on."""


class ConvergenceError(RuntimeError):
    """Some solves did not converge, where `throw=True` asks for an error."""


def report(info: Info | None, inverse: LinearOperator, throw: bool) -> None:
    """Warn or raise, on the host, about solves that did not converge; silent under tracing."""
    if info is None or isinstance(info.converged, jax.core.Tracer) or bool(np.all(info.converged)):
        return
    message = f"{describe_failure(info, inverse)}; inverse.solve_many reports each"
    if throw:
        raise ConvergenceError(message)
    warnings.warn(message, ConvergenceWarning, stacklevel=_levels_inside())


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
        advice = "the operator is indefinite; use GGN, more damping, or Eigh, which is exact"
    else:
        advice = "raise the damping, the tolerance or max_steps, or compute in 64-bit mode"
    return (
        f"{inverse!r}: {failed.sum()} of {failed.size} solves did not converge{in_blocks}{details}, so what is "
        f"computed from them cannot be relied on: {advice}"
    )


def _levels_inside() -> int:
    """Stack levels between the caller and the first frame outside this package, which a warning is about."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        level, frame = level + 1, frame.f_back
    return level
