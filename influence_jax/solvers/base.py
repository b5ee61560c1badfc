r"""What a solver is, and the inverse it makes of an operator."""

from __future__ import annotations

import abc
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _reprs, tree
from .._memory import SOLVE_KNOBS, memory_errors
from .._mesh import compiled, laid_out_like, on_auto_axes
from .._pytree import dataclass
from .._typing import Array, Key, PyTree
from ..batching import check_key
from ..blocks import Block, select
from ..curvature import LinearOperator, check_losses
from ..curvature.capabilities import not_convex_because, settled
from ..curvature.convexity import is_at_hand
from ..curvature.flat import Flat, can_be_flat
from ..curvature.loops import refuse_tracing
from ..curvature.operator import Scaled, Sum, Wrapper
from .damping import (
    Asked,
    BlockDamping,
    Damping,
    asked_by_block,
    check_damping,
    check_positive_means,
    damped_product,
    flat_damping,
    resolve,
    warn_of_noise,
)
from .info import NOT_FINITE, Info, is_nan, more_damping, solved, worst


class Solver(abc.ABC):
    r"""A way to solve $(A + \lambda I) x = v$.

    A frozen pytree dataclass: numbers such as `damping` are leaves, what shapes the program is static.  `solve` is all
    that one needs; `fit` computes once what does not depend on the right-hand side, and `advice` says what to change
    where a solve failed.  The operator and its damping are the `Inverse`'s: a solver is handed both, and keeps neither.

    Attributes:
      damping: What a person asks for: a number, a `RelativeDamping`, or a dict or tree of these; 0 if a solver has no
        such field.

    Raises:
      TypeError, ValueError: In `invert`, if a setting is of the wrong kind or out of range.

    Example:
      >>> import dataclasses
      >>> import influence_jax as ij
      >>> @jax.tree_util.register_dataclass
      ... @dataclasses.dataclass(frozen=True, repr=False)
      ... class OneStep(ij.Solver):
      ...     damping: float
      ...
      ...     def solve(self, op, damping, fit, V):
      ...         ones = jnp.ones(len(jax.tree.leaves(V)[0]))
      ...         info = ij.Info(jnp.int32(ones), None, ones > 0)  # None: not known
      ...         return jax.tree.map(lambda v: v / damping, V), info
      >>> inverse = ij.invert(ij.Identity({"w": jnp.ones(2)}), OneStep(2.0))
      >>> inverse.solver, inverse.mv({"w": jnp.ones(2)})["w"].tolist()
      (OneStep(damping=2.0), [0.5, 0.5])
    """

    def fit(self, op: LinearOperator, damping: Damping, *, key: Key | None = None) -> PyTree:
        """Compute what does not depend on the right-hand side, a tree of arrays; nothing by default.

        Args:
          op: What is to be inverted.
          damping: As `solve` gets it.
          key: For solvers that draw random numbers.
        """
        return ()

    @abc.abstractmethod
    def solve(self, op: LinearOperator, damping: Damping, fit: PyTree, V: PyTree) -> tuple[PyTree, Info]:
        """Solve for all rows of a stack.

        Args:
          op: Operator A.
          damping: Absolute: an array `()`, or a `BlockDamping` where there is one for each of several blocks, which
            `damped_product` takes too.
          fit: What `fit` returned.
          V: Right-hand sides, leaves `(K, *leaf)`.

        Returns:
          Solutions, float32 or wider, and Info with leaves `(K,)`.
        """

    def refit(self, inverse: Inverse, damping: Damping, *, key: Key | None = None) -> PyTree:
        """Return the fit of an `inverse` for another `damping`: the one that it has, by default; `key` as in `fit`."""
        return inverse.fit

    def advice(self, info: Info) -> str:
        """Say what to change about solves that did not converge; the end of a `ConvergenceWarning`.

        Args:
          info: Of the solves that failed, leaves `(F,)`; a curvature below zero means that the operator is indefinite.
        """
        return NOT_FINITE if is_nan(info) else f"{more_damping(self)}, or compute in 64-bit mode"

    def holds(self, op: LinearOperator) -> str:
        """Say, ending in a space, what takes most memory where it ran out; nothing by default.

        Args:
          op: What is to be inverted.
        """
        return ""

    @property
    def symmetric(self) -> bool:
        """Whether the map from v to x is self-adjoint, so that solving may move to the other side of a product."""
        return True

    @property
    def approximate(self) -> bool:
        """Whether `converged` promises no small residual, so that whoever asks for nothing else need not pay for it."""
        return False

    def asked(self, op: LinearOperator) -> OrderedDict[str, Asked]:
        """Return the dampings asked for of `op`, block by block."""
        return asked_by_block(getattr(self, "damping", 0.0), op)

    def damped_by(self, damping: Any, op: LinearOperator) -> Solver:
        """Return the same solver, asking for another `damping` of `op`."""
        if not hasattr(self, "damping"):
            raise ValueError(f"damping: got {damping!r}, but {self!r} has none")
        return dataclasses.replace(self, damping=damping)  # type: ignore[type-var]

    def by_block(self, inverse: Inverse) -> OrderedDict[str, Inverse]:
        """Return the inverses of the diagonal blocks of `inverse` that are treated apart; one block `""` by default."""
        return OrderedDict({"": inverse})

    def __repr__(self) -> str:
        return _reprs.settings(self)


class Fitted(NamedTuple):
    """A solver within another, as a preconditioner, on the same operator: its damping and what it computed."""

    damping: Damping
    fit: PyTree


def implicit_solve(
    op: LinearOperator, damping: Damping, V: PyTree, solve: Callable[[PyTree], tuple[PyTree, Info]]
) -> tuple[PyTree, Info]:
    """Run `solve(V)` with the derivatives of the exact solution.

    Derivatives in damping, parameters, weights and V are one more solve; nothing inside `solve` is differentiated.
    An operator that reads data from outside has no derivatives.
    """
    V = tree.promote(V)
    if isinstance(damping, BlockDamping) and not op.on_host and can_be_flat(op, V):
        return _on_flat_vectors(op, damping, V, Flat(op).lifted_solve(solve))
    return _with_derivatives(op, damping, V, solve)


def iterate(
    op: LinearOperator,
    damping: Damping,
    V: PyTree,
    solve: Callable[[LinearOperator, Damping, PyTree], tuple[PyTree, Info]],
) -> tuple[PyTree, Info]:
    """Run a recurrence, `solve(op, damping, V)`, on flat vectors where these may be, as `implicit_solve` does.

    Algebra on one array instead of every leaf is half of what a recurrence compiles for.
    """
    V, (fixed, at) = tree.promote(V), lax.stop_gradient((op, damping))
    if not can_be_flat(op, V):
        return _with_derivatives(op, damping, V, lambda B: solve(fixed, at, B))
    return _on_flat_vectors(op, damping, V, lambda B: solve(Flat(fixed), flat_damping(at, op.space), B))


def _on_flat_vectors(
    op: LinearOperator, damping: Damping, V: PyTree, solve: Callable[[Array], tuple[Array, Info]]
) -> tuple[PyTree, Info]:
    """Solve for flat vectors.

    The derivative in the damping of one block is a right-hand side that is zero in the leaves of all others, and known
    to be: what JAX makes of a linear solve has no transpose for such leaves, but for one array it has.
    """
    rows = tree.flatten(V, op.space)
    X, info = _with_derivatives(Flat(op), flat_damping(damping, op.space), rows, solve)
    return tree.cast_like(tree.unflatten(X, op.space), V), info


def _with_derivatives(
    op: LinearOperator, damping: Damping, V: PyTree, solve: Callable[[PyTree], tuple[PyTree, Info]]
) -> tuple[PyTree, Info]:
    if op.on_host:
        return solve(V)
    product = lambda X: damped_product(op, damping, X)
    return lax.custom_linear_solve(product, V, lambda _, B: solve(B), symmetric=True, has_aux=True)


def measured(op: LinearOperator, damping: Damping, X: PyTree, V: PyTree, lowest: Array | None = None) -> Info:
    """How far an approximation in closed form is from the exact solution; `converged` says only that it is finite."""
    op, damping, X, V = lax.stop_gradient((op, damping, X, V))
    norm = tree.norms(V)
    unlimited, none = jnp.full_like(norm, jnp.inf), jnp.zeros(norm.shape, jnp.int32)
    lowest = None if lowest is None else jnp.broadcast_to(jnp.asarray(lowest, norm.dtype), norm.shape)
    finite = jnp.isfinite(tree.norms(X))
    if not op.at_hand:
        return Info(none, None, finite, lowest, none, jnp.zeros_like(norm))
    info = solved(lambda Y: damped_product(op, damping, Y), X, V, unlimited, none, lowest)[1]
    return info._replace(converged=finite)


@dataclass
class Inverse(Wrapper):
    r"""An operator inverted by a solver, $v \mapsto (A + \lambda I)^{-1} v$: itself a linear operator.

    Made by `invert`.

    Attributes:
      op: The operator A, which maps vectors, leaves `(*leaf)`, or stacks of them, leaves `(K, *leaf)`.
      solver: How it is inverted.
      damping: $\lambda$, absolute: an array `()`, or a `BlockDamping` where there is one for each of several blocks.
      fit: What the solver computed from A, and nothing of A itself.

    Example:
      >>> import influence_jax as ij
      >>> inverse = ij.invert(ij.Diagonal({"w": jnp.array([1.0, 3.0])}), ij.Eigh(damping=1.0))
      >>> inverse
      Inverse(Diagonal(2 parameters), Eigh(damping=1.0))
      >>> x, info = inverse.solve_many({"w": jnp.array([[2.0, 4.0]])})  # leaves (K, *leaf)
      >>> x["w"].round(3).tolist(), info.converged.tolist()
      ([[1.0, 1.0]], [True])
    """

    op: LinearOperator
    solver: Solver
    damping: Damping
    fit: PyTree

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
        refuse_tracing(self.op, v)
        if self.on_host:
            X, info = self.solve_many(tree.stack_of_one(v))
            return tree.only(X), jax.tree.map(lambda field: field[0], info)
        return _solve(self.solver, self.op, self.damping, self.fit, v)

    @memory_errors("Inverse.solve_many", SOLVE_KNOBS)
    def solve_many(self, V: PyTree) -> tuple[PyTree, Info]:
        """Solutions for a stack, leaves `(K, *leaf)`; Info leaves `(K,)`.

        Raises:
          ValueError: If `V` is not a stack of vectors shaped like the parameters.
        """
        tree.check_stack(V, self.space, "V")
        refuse_tracing(self.op, V)
        if self.on_host:
            X, info = _solution(self.solver, self.op, self.damping, self.fit, on_auto_axes(V))
            return laid_out_like(X, V), info
        return _solve_many(self.solver, self.op, self.damping, self.fit, V)

    def with_damping(self, damping: Any, *, key: Key | None = None) -> Inverse:
        """The inverse at another damping; `vmap` over it sweeps a grid.

        From the same fit, but for a factorisation of the damped matrix, as `Direct` makes of an operator without a
        closed form, which is computed anew: `Eigh` serves every damping.

        Args:
          damping: As the solver's: a non-negative number, a `RelativeDamping`, or a dict or tree of these.
          key: For a `RelativeDamping` whose trace has to be estimated.

        Raises:
          TypeError, ValueError: If it is not of that form, or negative.
        """
        check_damping(damping)
        refuse_tracing(self.op, damping)
        solver = self.solver.damped_by(damping, self.op)
        resolved = resolve_damping(solver, self.op, key)
        return Inverse(self.op, solver, resolved, solver.refit(self, resolved, key=key))

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
        leaves = self.blocks
        for block, part in self.by_block.items():
            x, info = part.solve(v if part is self else select(v, leaves[block]))
            solved[block] = (select(x, leaves[block]), info)
        return solved

    @property
    def holds(self) -> str:
        """What of it takes most memory, in words, for errors that say that it ran out."""
        return self.solver.holds(self.op)

    @property
    def parts(self) -> tuple[LinearOperator, ...]:
        return (self.op,)

    @property
    def symmetric(self) -> bool:
        """Whether the solver's map is self-adjoint."""
        return self.solver.symmetric

    @property
    def is_curvature(self) -> bool:
        return isinstance(self.op, Inverse) and self.op.op.is_curvature  # inverted twice, it is one again

    @property
    def at_hand(self) -> bool:
        return True

    def __repr__(self) -> str:
        blocks = _reprs.counted(len(self.fit), "block") if isinstance(self.fit, dict) else ""  # as Blockwise has
        return _reprs.call(self, repr(self.op), repr(self.solver), blocks)


@check_losses.register
def _(op: Inverse, *, gradients: bool = False) -> None:
    """Look at nothing: `invert` has."""


@not_convex_because.register
def _(op: Inverse) -> str:
    return not_convex_because(op.op)


def check_inverse(inverse: LinearOperator, params: PyTree, constants: tuple[PyTree, ...] = ()) -> Array | None:
    """Raise unless an operator may stand for an inverse curvature at `params`, of a loss with these `constants`.

    A curvature itself is never meant, nor an inverse that was fitted at other parameters, as after training on, or with
    other constants, as the statistics of before the training.  Under tracing nothing can be raised: whether traced
    arrays are those of the fit is returned, () bool, for what comes of it to be NaN if not; None where there is nothing
    to compare.  What cannot be read here passes unseen, and so do constants of another model, or none.
    """
    if inverse.is_curvature:
        raise TypeError(
            f"inverse: got a curvature, {inverse!r}; expected its inverse: {_its_inverse(inverse)}, or another solver"
        )
    alike = []
    for fitted in inverse.fitted_at:
        pairs = _pairs(params, fitted)
        alike += _check_same(pairs, f"where {inverse!r} was fitted", "params", "parameters it was fitted at", "at")
    for fitted in inverse.fitted_with:
        pairs = [pair for ours in constants if _have_shapes(ours, fitted) for pair in _pairs(ours, fitted)]
        alike += _check_same(pairs, f"those that {inverse!r} was fitted with", "constants", "same ones", "with")
    return jnp.all(jnp.stack(alike)) if alike else None


def _its_inverse(curvature: LinearOperator) -> str:
    """Say how to invert a curvature; what was inverted twice is one of which the inner inverse is meant."""
    if isinstance(curvature, Inverse) and isinstance(curvature.op, Inverse):
        return f"what is inverted there once, {curvature.op!r}"
    return f"invert({curvature!r}, BlockCG(damping))"


def _have_shapes(tree_: PyTree, other: PyTree) -> bool:
    """Tell whether two trees are alike but for what their arrays hold."""
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(x)] for x in (tree_, other)]
    return jax.tree.structure(tree_) == jax.tree.structure(other) and shapes[0] == shapes[1]


def _pairs(ours: PyTree, theirs: PyTree) -> list[tuple[str, Any, Any]]:
    both = zip(tree.named_leaves(ours), tree.named_leaves(theirs), strict=True)
    return [(name, leaf, at) for (name, leaf), (_, at) in both]


def _check_same(pairs: list[tuple[str, Any, Any]], there: str, argument: str, expected: str, how: str) -> list[Array]:
    """Raise if arrays differ from those of a fit; return of which traced ones, () bool each, it is to be seen."""
    alike = []
    for name, leaf, at in pairs:
        if leaf is at:
            continue
        if _is_traced(leaf, at):
            alike.append(_alike(leaf, at))
            continue
        apart = _distance(leaf, at)
        if apart is not None:
            raise ValueError(
                f"{argument}: leaf '{name}' is up to {apart:.1e} away from {there}, expected the {expected}; fit the "
                f"inverse again {how} these, or pass those"
            )
    return alike


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _is_traced(leaf: Any, other: Any) -> bool:
    """Tell whether two arrays can be compared inside of a program only."""
    arrays = all(isinstance(x, jax.Array | np.ndarray) and not _is_key(x) for x in (leaf, other))
    return arrays and any(isinstance(x, jax.core.Tracer) for x in (leaf, other))


def _alike(leaf: Array, other: Array) -> Array:
    """Tell, inside of a program, whether two leaves are equal as `_distance` understands it."""
    left, right = lax.stop_gradient((jnp.asarray(leaf), jnp.asarray(other)))
    if not _are_floating(left, right):
        return jnp.array_equal(left, right)
    infos = [jnp.finfo(x.dtype) for x in (left, right)]
    if infos[0].bits == infos[1].bits and left.dtype != right.dtype:
        rounding = float(max(info.eps for info in infos))
        return jnp.allclose(left.astype(jnp.float32), right.astype(jnp.float32), rounding, 1e-6, equal_nan=True)
    narrow, wide = sorted(infos, key=lambda info: info.bits)
    # Compilers leave out a cast to fewer bits and back.
    rounded = [lax.reduce_precision(x.astype(wide.dtype), narrow.nexp, narrow.nmant) for x in (left, right)]
    return jnp.array_equal(*rounded, equal_nan=True)


def _are_floating(*arrays: Any) -> bool:
    return all(jnp.issubdtype(x.dtype, jnp.floating) for x in arrays)


def _distance(leaf: Any, other: Any) -> float | None:
    """Return how far two leaves are apart where they differ in the narrower of their dtypes, else None."""
    left, right = _on_this_host(leaf), _on_this_host(other)
    if left is None or right is None:
        return None
    if not _are_floating(left, right):
        one, two = (x if x.dtype.kind == "c" else x.astype(np.float64) for x in (left, right))
        return None if np.array_equal(one, two) else float(np.max(np.abs(one - two)))
    widths = [jnp.finfo(x.dtype).bits for x in (left, right)]
    if widths[0] == widths[1] and left.dtype != right.dtype:  # bfloat16 and float16 of one number differ by rounding
        rounding = float(max(jnp.finfo(x.dtype).eps for x in (left, right)))
        if np.allclose(left.astype(np.float32), right.astype(np.float32), rounding, 1e-6, equal_nan=True):
            return None
    narrow = left.dtype if widths[0] <= widths[1] else right.dtype
    if np.array_equal(left.astype(narrow), right.astype(narrow), equal_nan=True):
        return None
    return float(np.max(np.abs(left.astype(np.float64) - right.astype(np.float64))))


def _on_this_host(x: Any) -> np.ndarray | None:
    """Return what an array holds; None of what is traced, abstract, deleted, or spread over processes."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array | np.ndarray) or _is_key(x):
        return None
    if isinstance(x, jax.Array) and (x.is_deleted() or not (x.is_fully_addressable or x.is_fully_replicated)):
        return None
    return np.asarray(x)


def check_solver(solver: object) -> None:
    """Raise unless it is a solver, and not its class."""
    if not isinstance(solver, Solver) or isinstance(solver, type):
        raise TypeError(
            f"solver: got {solver!r}, expected a solver such as influence_jax.BlockCG(damping=1e-3); your own "
            "subclasses influence_jax.Solver"
        )


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
      >>> inverse.mv({"w": jnp.array([2.0, 4.0])})["w"].round(3).tolist()
      [1.0, 1.0]
    """
    if not isinstance(op, LinearOperator):
        raise TypeError(
            f"op: got a {type(op).__name__}, expected a LinearOperator such as GGN(objective, params, data)"
        )
    check_solver(solver)
    if key is not None:
        check_key(key, "solvers and dampings may draw random numbers")
    with memory_errors("invert", lambda: f"{solver.holds(op)}Less is taken by {SOLVE_KNOBS}"):
        if not op.on_host:
            check_losses(op)
            op = _with_sign(op, solver)
        damping, noise = resolve(solver.asked(op), op, key)
        check_positive_means(damping, solver, op)
        fit = fitted(solver, op, damping, key)
        if op.on_host:
            check_losses(op)  # unless a pass over the loader has shown them
    is_fitted = lambda x: isinstance(x, Fitted)
    for part in filter(is_fitted, jax.tree.leaves(fit, is_leaf=is_fitted)):
        check_positive_means(part.damping, solver, op)
    warn_of_noise(noise, op)
    return Inverse(op, solver, damping, fit)


def resolve_damping(solver: Solver, op: LinearOperator, key: Key | None) -> Damping:
    """Return the absolute damping of a solver on an operator."""
    damping = resolve(solver.asked(op), op, key)[0]
    check_positive_means(damping, solver, op)
    return damping


def _with_sign(op: LinearOperator, solver: Solver) -> LinearOperator:
    """The operator, with its sign found out on the host where a solver's program depends on it.

    Raises:
      ValueError: If the solver needs a positive semi-definite operator, and it is known not to be one.
    """
    inside = list(_solvers(solver))
    if not any(getattr(part, "asks_sign", False) for part in inside):
        return op
    op = settled(op)
    needing = [part for part in inside if getattr(part, "needs_psd", False)]
    why = not_convex_because(op) if needing and is_at_hand(op) else ""
    if why:
        raise ValueError(
            f"op: {needing[0]!r} needs a positive semi-definite operator, but {why}; use Direct or Eigh, which are "
            "exact for indefinite ones, or BlockCG at a larger damping"
        )
    return op


def _solvers(solver: Any) -> Iterator[Solver]:
    """A solver, and those that it is made of: its preconditioner, or those of its blocks."""
    yield solver
    for value in getattr(solver, "__dict__", {}).values():
        for part in value.values() if isinstance(value, Mapping) else (value,):
            if isinstance(part, Solver) and not isinstance(part, type):
                yield from _solvers(part)


def solve_with_info(op: LinearOperator, V: PyTree) -> tuple[PyTree, Info | None]:
    """The product of an operator with a stack, and how the solves within it went, if there are any.

    Of several inverses in a sum, the Info is the worst of each.  An approximation is not measured: what nobody asks
    for is not computed under `jit`.
    """
    if isinstance(op, Inverse):
        X, info = op.solve_many(V)
        return X, info._replace(residual=None) if op.solver.approximate else info
    if isinstance(op, Scaled):
        X, info = solve_with_info(op.op, V)
        return tree.scale(op.factor, X), info
    if isinstance(op, Sum):
        parts = [solve_with_info(term, V) for term in op.terms]
        return tree.total([x for x, _ in parts]), worst([info for _, info in parts if info is not None])
    return op.mm(V), None


def fitted(solver: Solver, op: LinearOperator, damping: Damping, key: Key | None) -> PyTree:
    """Return what a solver computes from an operator, by a compiled program if that can be."""
    if op.on_host or type(solver).fit is Solver.fit:  # which computes nothing
        return solver.fit(op, damping, key=key)
    return _fit(solver, op, damping, key=key)


@partial(compiled, keep_unused=True)
def _fit(solver: Solver, op: LinearOperator, damping: Damping, *, key: Key | None) -> PyTree:
    return solver.fit(op, damping, key=key)


@compiled
def _solve(solver: Solver, op: LinearOperator, damping: Damping, fit: PyTree, v: PyTree) -> tuple[PyTree, Info]:
    X, info = _solution(solver, op, damping, fit, tree.stack_of_one(v))
    return tree.only(X), jax.tree.map(lambda field: field[0], info)


def _solution(solver: Solver, op: LinearOperator, damping: Damping, fit: PyTree, V: PyTree) -> tuple[PyTree, Info]:
    X, info = solver.solve(op, damping, fit, V)
    return X, jax.tree.map(lambda field: jnp.broadcast_to(field, info.converged.shape), info)


_solve_many = compiled(_solution)
