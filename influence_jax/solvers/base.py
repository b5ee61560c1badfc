r"""What a solver is, what it reports, and the inverse it makes of an operator."""

from __future__ import annotations

import dataclasses
import numbers
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import tree
from .._pytree import dataclass
from .._typing import Array, Key, PyTree
from ..blocks import Block, select
from ..curvature import LinearOperator, trace
from ..curvature.capabilities import wide_dtype


class Info(NamedTuple):
    """How a solve went; leaves are scalars, or `(K,)` for stacked right-hand sides.

    Attributes:
      steps: Iterations spent, 0 for closed forms; int32.
      residual: `||b - A x|| / ||b||` of the damped operator A, NaN where no extra product was spent on it.
      converged: Whether the answer can be relied on.
      min_curvature: Smallest `vᵀAv / vᵀv` met on the damped operator; negative means indefinite.
    """

    steps: Array
    residual: Array
    converged: Array
    min_curvature: Array


class ConvergenceWarning(UserWarning):
    """Some solves did not converge, and what was computed from them cannot be relied on."""


def warn_unconverged(info: Info | None, inverse: LinearOperator) -> None:
    """Warn, on the host, about solves that did not converge; silent under tracing."""
    if info is None or isinstance(info.converged, jax.core.Tracer) or bool(np.all(info.converged)):
        return
    failed = ~np.asarray(info.converged)
    residuals = np.asarray(info.residual)[failed]
    residual = f"worst relative residual {np.max(residuals):.1e}, " if np.all(np.isfinite(residuals)) else ""
    lowest = float(np.fmin.reduce(np.asarray(info.min_curvature)[failed], axis=None))
    if lowest < 0:
        advice = "the operator is indefinite; use GGN, more damping, or Eigh, which is exact"
    else:
        advice = "raise the damping, the tolerance or max_steps, or compute in 64-bit mode"
    warnings.warn(
        f"{inverse!r}: {failed.sum()} of {failed.size} solves did not converge ({residual}smallest curvature "
        f"{lowest:.1e}), so their scores cannot be relied on: {advice}; inverse.solve_many reports each",
        ConvergenceWarning,
        stacklevel=3,
    )


@runtime_checkable
class Solver(Protocol):
    """A way to solve `(A + damping I) x = v`.

    A frozen pytree dataclass: numbers such as damping are leaves, what shapes the program is static.  `init` does what
    needs the operator only, `apply_many` solves for a stack of right-hand sides.

    Attributes:
      symmetric: Whether the map from v to x is self-adjoint, so that solving may move to the other side of a product.
    """

    symmetric: ClassVar[bool] = True

    def init(self, op: LinearOperator, *, key: Key | None = None) -> PyTree:
        """Whatever can be computed before the right-hand side is known."""
        ...

    def apply_many(self, state: PyTree, V: PyTree) -> tuple[PyTree, Info]:
        """Solve for every row of a stack, leaves `(K, *leaf)`; solutions are float32 or wider."""
        ...

    def apply(self, state: PyTree, v: PyTree) -> tuple[PyTree, Info]:
        """Solve for one vector, the K = 1 case of `apply_many`."""
        return tree.only(self.apply_many(state, tree.stack_of_one(v)))

    def with_damping(self, state: PyTree, damping: Any, *, key: Key | None = None) -> tuple[Solver, PyTree]:
        """The solver and its state at another damping, where that needs no new fit.

        Raises:
          ValueError: If the state cannot serve another damping.
        """
        ...

    def by_block(self, inverse: Inverse) -> OrderedDict[str, Inverse]:
        """The inverses of the diagonal blocks that the solver treats apart; one block `""` unless it says otherwise."""
        return OrderedDict({"": inverse})


@dataclass
class RelativeDamping:
    """Damping as a multiple of the operator's mean eigenvalue, `factor * trace / size`.

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
        return f"RelativeDamping({self.factor})"


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


def check_damping(damping: Any) -> None:
    """Raise unless `damping` is a non-negative number or a `RelativeDamping`."""
    if isinstance(damping, RelativeDamping):
        return
    try:
        check_number(damping, "damping")
    except TypeError:
        raise TypeError(
            f"damping: got {damping!r}, expected a non-negative number or influence_jax.RelativeDamping(factor)"
        ) from None


def resolve_damping(damping: float | Array | RelativeDamping, op: LinearOperator, key: Key | None) -> Array:
    """The absolute damping, an array in the dtype the solver computes in."""
    dtype = wide_dtype(op.space)
    if not isinstance(damping, RelativeDamping):
        return jnp.asarray(damping, dtype)
    mean = (trace(op, key=key) / op.size).astype(dtype)
    # Under tracing nothing can raise: NaN turns into `converged=False`, and `invert` raises for it on the host.
    return jnp.where(mean > 0, jnp.asarray(damping.factor, dtype) * mean, jnp.nan)


def redamp(solver: Any, state: Any, damping: Any, key: Key | None) -> tuple[Any, Any]:
    """`with_damping` of a solver whose state is an operator, a damping, and what does not depend on it."""
    return dataclasses.replace(solver, damping=damping), state._replace(damping=resolve_damping(damping, state.op, key))


def damped_product(op: LinearOperator, damping: Array, X: PyTree) -> PyTree:
    """`(A + damping I) X` for a stack."""
    return jax.tree.map(lambda ax, x: ax + damping.astype(x.dtype) * x, op.mm(X), X)


def implicit_solve(
    op: LinearOperator, damping: Array, V: PyTree, solve: Callable[[PyTree], tuple[PyTree, Info]]
) -> tuple[PyTree, Info]:
    """Run `solve(V)` with the derivatives of the exact solution.

    Derivatives in damping, parameters, weights and V are one more solve; nothing inside `solve` is differentiated.
    """
    return lax.custom_linear_solve(
        lambda X: damped_product(op, damping, X), tree.promote(V), lambda _, B: solve(B), symmetric=True, has_aux=True
    )


@dataclass
class Inverse(LinearOperator):
    r"""An operator inverted by a solver, $v \mapsto (A + \lambda I)^{-1} v$: itself a linear operator.

    Made by `invert`.

    Attributes:
      op: The operator A.
      solver: How it is inverted.
      state: What the solver computed from A.
    """

    op: LinearOperator
    solver: Solver
    state: PyTree

    def mv(self, v: PyTree) -> PyTree:
        return tree.cast_like(self.solve(v)[0], v)

    def mm(self, V: PyTree) -> PyTree:
        return tree.cast_like(self.solve_many(V)[0], V)

    def solve(self, v: PyTree) -> tuple[PyTree, Info]:
        """The solution for one vector, float32 or wider, and how the solve went.

        Raises:
          ValueError: If `v` is not shaped like the parameters.
        """
        tree.check_vector(v, self.space, "v")
        return _solve(self.solver, self.state, v)

    def solve_many(self, V: PyTree) -> tuple[PyTree, Info]:
        """Solutions for a stack, leaves `(K, *leaf)`; Info leaves `(K,)`.

        Raises:
          ValueError: If `V` is not a stack of vectors shaped like the parameters.
        """
        tree.check_stack(V, self.space, "V")
        return _solve_many(self.solver, self.state, V)

    def with_damping(self, damping: float | Array | RelativeDamping, *, key: Key | None = None) -> Inverse:
        """The inverse at another damping from the same fit; `vmap` over it sweeps a grid.

        Args:
          damping: Non-negative number, or a `RelativeDamping`.
          key: For a `RelativeDamping` whose trace has to be estimated.

        Raises:
          ValueError: If the solver's state is tied to its damping (Cholesky), or the damping is negative.
        """
        check_damping(damping)
        solver, state = self.solver.with_damping(self.state, damping, key=key)
        _check_resolved(solver, state, self.op)
        return Inverse(self.op, solver, state)

    @property
    def by_block(self) -> OrderedDict[str, Inverse]:
        """The inverses of the diagonal blocks that the solver treats apart; one block `""` for most solvers."""
        return self.solver.by_block(self)

    @property
    def blocks(self) -> OrderedDict[str, Block]:
        """Names of the leaves in each block."""
        names = {block: tuple(n for n, _ in tree.named_leaves(part.space)) for block, part in self.by_block.items()}
        return OrderedDict(names)

    def solve_by_block(self, v: PyTree) -> OrderedDict[str, tuple[PyTree, Info]]:
        """Each block's solution, a flat dict `{name: leaf}`, and how its solve went.

        Raises:
          ValueError: If `v` is not shaped like the parameters.
        """
        tree.check_vector(v, self.space, "v")
        solved = OrderedDict()
        for block, part in self.by_block.items():
            x, info = part.solve(v if part is self else select(v, self.blocks[block]))
            solved[block] = (select(x, self.blocks[block]), info)
        return solved

    @property
    def space(self) -> PyTree:
        return self.op.space

    @property
    def psd(self) -> bool:
        return self.op.psd

    @property
    def symmetric(self) -> bool:
        """Whether the solver's map is self-adjoint."""
        return self.solver.symmetric

    def __repr__(self) -> str:
        return f"Inverse({self.op!r}, {self.solver!r})"


def invert(op: LinearOperator, solver: Solver, *, key: Key | None = None) -> Inverse:
    r"""Invert an operator: fit the solver once, then apply $(A + \lambda I)^{-1}$ as often as needed.

    Args:
      op: Operator A.
      solver: `Direct(damping)`, `Eigh(damping)`, `CG(damping)`, ...
      key: For solvers and dampings that draw random numbers.

    Returns:
      An `Inverse`, which is a linear operator.

    Raises:
      TypeError: If an argument is of the wrong kind, or damping is not a number.
      ValueError: If damping is negative, or a `RelativeDamping` meets a non-positive mean eigenvalue.

    Example:
      >>> import influence_jax as ij
      >>> inverse = ij.invert(ij.Diagonal({"w": jnp.array([1.0, 3.0])}), ij.CG(damping=1.0))
      >>> inverse.mv({"w": jnp.array([2.0, 4.0])})["w"].tolist()
      [1.0, 1.0]
    """
    if not isinstance(op, LinearOperator):
        raise TypeError(
            f"op: got a {type(op).__name__}, expected a LinearOperator such as GGN(objective, params, data)"
        )
    if not isinstance(solver, Solver) or isinstance(solver, type):
        raise TypeError(
            f"solver: got {solver!r}, expected a solver such as influence_jax.CG(damping=1e-3); your own subclasses "
            "influence_jax.Solver"
        )
    if key is not None and not isinstance(key, jax.Array):
        raise TypeError(f"key: got {key!r}, expected a random key; use jax.random.key(0)")
    state = _init(solver, op, key)
    _check_resolved(solver, state, op)
    return Inverse(op, solver, state)


def _check_resolved(solver: Solver, state: PyTree, op: LinearOperator) -> None:
    """Raise, on the host, if a `RelativeDamping` met a mean eigenvalue that is not positive."""
    is_relative = lambda x: isinstance(x, RelativeDamping)
    if not any(map(is_relative, jax.tree.leaves(solver, is_leaf=is_relative))):
        return
    is_state = lambda x: hasattr(x, "op") and hasattr(x, "damping")
    for damping in (part.damping for part in jax.tree.leaves(state, is_leaf=is_state) if is_state(part)):
        if not isinstance(damping, jax.core.Tracer) and not np.isfinite(damping):
            raise ValueError(
                f"damping: {solver!r} on {op!r} asks for a multiple of the mean eigenvalue, which is not positive; "
                "give an absolute damping"
            )


@jax.jit
def _init(solver: Solver, op: LinearOperator, key: Key | None) -> PyTree:
    return solver.init(op, key=key)


@jax.jit
def _solve(solver: Solver, state: PyTree, v: PyTree) -> tuple[PyTree, Info]:
    return solver.apply(state, v)


@jax.jit
def _solve_many(solver: Solver, state: PyTree, V: PyTree) -> tuple[PyTree, Info]:
    return solver.apply_many(state, V)
