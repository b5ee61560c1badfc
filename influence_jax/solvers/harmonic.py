r"""The inverse harmonic mean, also known as DataInf."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .. import tree
from .._pytree import dataclass
from .._typing import Array, Key, PyTree
from ..batching import chunk_for
from ..curvature import EmpiricalFisher, Fisher, LinearOperator
from ..curvature.exact import sum_over_data
from ..curvature.per_example import root_factors
from .base import Solver, measured
from .damping import Damping, DampingLike, check_damping, divide, needs_damping
from .info import Info, more_damping


@needs_damping
@dataclass
class HarmonicMean(Solver):
    r"""Average the inverses instead of inverting the average: $x = \sum_i \omega_i (\lambda I + g_i g_i^\top)^{-1} v$.

    In closed form, $\frac1\lambda \sum_i \omega_i \big(v - \frac{\langle g_i, v\rangle}{\lambda + \|g_i\|^2} g_i\big)$
    with $\omega$ the weights over their sum: one pass over the data for all right-hand sides, and each solution is
    independent of the others.  Not the damped inverse of the mean, from which it differs by $O(P^2)$; the residual
    says how much, and `converged` only that it is finite.  Differentiable in everything.

    Args:
      damping: $\lambda > 0$, a `RelativeDamping`, or a dict or tree of these by block or leaf; the authors take
        0.1 of the mean eigenvalue, block by block.

    Raises:
      TypeError: In `invert`, unless the operator is an `EmpiricalFisher`, or a `Fisher` with one sample.

    Example:
      >>> import influence_jax as ij
      >>> fisher = ij.EmpiricalFisher(lambda p, z: p["w"] @ z, {"w": jnp.ones(2)}, jnp.eye(2))
      >>> ij.invert(fisher, ij.HarmonicMean(1.0)).mv({"w": jnp.array([4.0, 8.0])})["w"].tolist()
      [3.0, 6.0]

    Reference: Kwon et al. 2024, arXiv:2310.00902, eq. 5.
    """

    damping: DampingLike

    def __post_init__(self) -> None:
        check_damping(self.damping)

    @property
    def approximate(self) -> bool:
        return True

    def fit(self, op: LinearOperator, damping: Damping, *, key: Key | None = None) -> tuple[()]:
        if not (isinstance(op, EmpiricalFisher) or (isinstance(op, Fisher) and op.samples == 1)):
            raise TypeError(
                f"op: HarmonicMean got {op!r}, expected a mean of rank-one matrices: EmpiricalFisher, or Fisher with "
                "samples=1"
            )
        return ()

    def solve(self, op: Any, damping: Damping, fit: PyTree, V: PyTree) -> tuple[PyTree, Info]:
        V = tree.promote(V)
        over = divide(V, damping)

        def chunk_sum(batch: PyTree, weights: Array) -> tuple[PyTree, Array]:
            grads = root_factors(op, batch)
            along = tree.gram(over, grads) * (weights / (1 + tree.dots(grads, divide(grads, damping))))[None]
            return tree.combine(along, grads), jnp.sum(weights)

        (along, weight), total = sum_over_data(op, chunk_sum, min(op.chunk or chunk_for(op.size), op.count))
        share = weight / total  # one, except for minibatches of weighted data
        X = jax.tree.map(lambda v, g: (share * v - g / total).astype(v.dtype), over, divide(along, damping))
        return X, measured(op, damping, X, V)

    def advice(self, info: Info) -> str:
        """Point to the damping, which the solution is divided by."""
        return f"{more_damping(self)}, which it divides by: it has to be positive, and gradients finite"
