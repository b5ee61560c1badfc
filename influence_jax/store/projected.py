"""The inverse of a second moment in projected space."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _reprs, tree
from .._typing import Array


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ProjectedInverse:
    """An inverse of a block-diagonal matrix on projected vectors; made by `GradientStore.inverse`.

    Called with vectors `(Q, dim)`, it gives vectors `(Q, dim)`.

    Attributes:
      moments: The blocks, without damping.
      damping: What was added to them.
      examples: How many examples they are of.
      factors: Their Cholesky factors, in float64 where the hardware has it.

    Raises:
      ValueError: When called, if the vectors are not of that shape.

    Example:
      >>> inverse = ProjectedInverse.of((3 * jnp.eye(2),), damping=1.0, examples=5)
      >>> inverse, inverse(jnp.ones((1, 2))).tolist()
      (ProjectedInverse(2, 5 examples, damping=1.0), [[0.25, 0.25]])
    """

    moments: tuple[Array, ...]
    damping: float
    examples: int
    factors: tuple[Array, ...]

    @classmethod
    def of(cls, moments: tuple[Array, ...], damping: float, examples: int) -> ProjectedInverse:
        """Factor the blocks.

        Args:
          moments: The blocks, `(dim, dim)` each.
          damping: What is added to them, not negative.
          examples: How many examples they are of.

        Raises:
          ValueError: If the damping is negative or no number, or a damped block is singular.
        """
        check_damping(damping)
        factors = []
        for number, moment in enumerate(moments):
            factor, regular = _cholesky(moment, damping)
            if not regular or (damping == 0 and examples < len(moment)):
                which = f"block {number} of {len(moments)}, " if len(moments) > 1 else ""
                size, mean = len(moment), float(jnp.trace(moment)) / len(moment)
                advice = f"raise the damping, e.g. to {mean / 10:.3g}" if mean else "every gradient in it is zero"
                raise ValueError(
                    f"damping: with {damping} the projected Fisher matrix is singular ({which}{size} x {size} from "
                    f"{examples} examples, mean eigenvalue {mean:.3g}); {advice}"
                )
            factors.append(factor)
        return cls(moments, damping, examples, tuple(factors))

    def with_damping(self, damping: float) -> ProjectedInverse:
        """The same with another damping, without another pass over the data.

        Raises:
          ValueError: As `GradientStore.inverse`.
        """
        return ProjectedInverse.of(self.moments, damping, self.examples)

    def __call__(self, vectors: Array) -> Array:
        """Apply it to projected vectors `(Q, dim)`.

        Raises:
          ValueError: If they are not of that shape.
        """
        vectors = jnp.asarray(vectors)
        widths = [len(moment) for moment in self.moments]
        if vectors.ndim != 2 or vectors.shape[1] != sum(widths):
            raise ValueError(f"vectors: got shape {vectors.shape}, expected projected vectors (Q, {sum(widths)})")
        parts = jnp.split(vectors, np.cumsum(widths)[:-1], axis=1)
        return jnp.concatenate([_solve(f, part) for f, part in zip(self.factors, parts, strict=True)], axis=1)

    def __repr__(self) -> str:
        widths = " + ".join(str(len(moment)) for moment in self.moments[:4]) + " + ..." * (len(self.moments) > 4)
        return _reprs.call(self, widths, _reprs.counted(self.examples, "example"), damping=self.damping)


def check_damping(damping: Any) -> None:
    """Raise unless it is a number that is not negative."""
    if not isinstance(damping, float | int | np.number) or isinstance(damping, bool):
        raise TypeError(f"damping: got {damping!r}, expected a number")
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping: got {damping}, expected a finite number that is not negative")


@jax.jit
def added_moments(moments: tuple[Array, ...], rows: Array) -> tuple[Array, ...]:
    """Second moments with those of some more rows, block by block."""
    ends = np.cumsum([len(moment) for moment in moments])[:-1]
    parts = jnp.split(rows.astype(moments[0].dtype), ends, axis=1)
    added = (jnp.matmul(part.T, part, precision=tree.HIGHEST) for part in parts)
    return tuple(moment + more for moment, more in zip(moments, added, strict=True))


def _cholesky(moment: Array, damping: float) -> tuple[Array, bool]:
    """Cholesky factor of a damped block, and whether that is regular to the precision the block is known to.

    In float64 wherever the hardware has it: small dampings are what is asked for.
    """
    with jax.enable_x64(True):
        dtype = moment.dtype if jax.default_backend() == "tpu" else np.dtype(np.float64)
        damped = moment.astype(dtype) + jnp.asarray(damping, dtype) * jnp.eye(len(moment), dtype=dtype)
        factor = jnp.linalg.cholesky(damped)
        rounding = math.sqrt(len(moment)) * float(jnp.finfo(moment.dtype).eps) * float(jnp.max(jnp.diagonal(moment)))
        least = float(jnp.min(jnp.diagonal(factor))) ** 2  # NaN where it broke down
        return factor, least > rounding


def _solve(factor: Array, vectors: Array) -> Array:
    with jax.enable_x64(True):
        solved = jax.scipy.linalg.cho_solve((factor, True), vectors.astype(factor.dtype).T).T
        return solved.astype(tree.accumulation_dtype(vectors.dtype))
