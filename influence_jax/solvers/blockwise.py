r"""One solver per block of parameters."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import _reprs, tree
from .._pytree import dataclass, set_field, static
from .._typing import Array, Key, PyTree
from .._words import name_of
from ..blocks import as_blocks, by_layer, join, partition, select
from ..curvature import LinearOperator, diagonal_blocks, restrict
from .base import Inverse, Solver, check_solver
from .damping import block_dampings, check_positive_mean
from .info import Info, lowest_known

State = OrderedDict[str, Inverse]


@dataclass
class Blockwise(Solver):
    r"""Solve block by block: the inverse of the block-diagonal part, $x_b = (A_{bb} + \lambda_b I)^{-1} v_b$.

    Each block is the restriction of the operator, in its own class, with its own solver and damping; `RelativeDamping`
    is relative to the block, but to all for a block whose curvature is rounding beside that of the others.

    Args:
      solver: One solver for every block, or a dict from block names to solvers, which may differ.
      blocks: `by_layer`, `by_parameter`, `full`, a function from leaf name to block name, or a dict from block names to
        prefixes of leaf names, which have to cover every leaf exactly once.

    Raises:
      TypeError: If a solver is not a solver, or `blocks` not a partition.
      ValueError: In `invert`, if solvers and blocks are not of the same names, or prefixes do not cover every leaf
      once.

    Example:
      >>> import influence_jax as ij
      >>> op = ij.Diagonal({"a": jnp.array([1.0]), "b": jnp.array([3.0])})
      >>> inverse = ij.invert(op, ij.Blockwise({"a": ij.Direct(1.0), "b": ij.CG(0.0)}, blocks=ij.by_parameter))
      >>> solved = inverse.mv({"a": jnp.array([1.0]), "b": jnp.array([1.5])})
      >>> solved["a"].item(), solved["b"].item()
      (0.5, 0.5)
    """

    solver: Solver | Mapping[str, Solver]
    blocks: Any = static(default=by_layer)

    def __post_init__(self) -> None:
        if isinstance(self.solver, Mapping) and not self.solver:
            raise ValueError("solver: got an empty dict, expected a solver per block, e.g. {'layers_0': Direct(0.1)}")
        for solver in self._solvers:
            check_solver(solver)
        if isinstance(self.solver, Mapping):
            set_field(self, "solver", OrderedDict(self.solver))
        set_field(self, "blocks", as_blocks(self.blocks))

    @property
    def _solvers(self) -> list[Solver]:
        return list(self.solver.values()) if isinstance(self.solver, Mapping) else [self.solver]

    @property
    def symmetric(self) -> bool:
        """Whether every block's solver is."""
        return all(solver.symmetric for solver in self._solvers)

    @property
    def approximate(self) -> bool:
        """Whether every block's solver is."""
        return all(solver.approximate for solver in self._solvers)

    def init(self, op: LinearOperator, *, key: Key | None = None) -> State:
        return self.init_noting(op, key=key)[0]

    def init_noting(self, op: LinearOperator, *, key: Key | None = None) -> tuple[State, OrderedDict[str, Array]]:
        groups = partition(op.space, self.blocks)
        if isinstance(self.solver, Mapping) and set(self.solver) != set(groups):
            raise ValueError(f"solver: got solvers for {list(self.solver)}, expected one for each of {list(groups)}")
        for name, block in groups.items():
            if not any(leaf.size for leaf in select(op.space, block).values()):
                raise ValueError(f"blocks: block '{name}' has no entries {block}; put its leaves into another block")
        keys = _keys(groups, key)
        parts = OrderedDict((name, restrict(op, block)) for name, block in groups.items())
        solvers = dict(self.solver) if isinstance(self.solver, Mapping) else dict.fromkeys(groups, self.solver)
        wanted = {name: getattr(solver, "damping", None) for name, solver in solvers.items()}
        dampings, noise = block_dampings(_of_one_block(wanted, parts), parts, keys)
        inverses = OrderedDict()
        for name, part in parts.items():
            resolved = copy.copy(solvers[name])
            if name in dampings:
                set_field(resolved, "damping", dampings[name])
            inverses[name] = Inverse(part, solvers[name], resolved.init(part, key=keys[name]))
        return inverses, noise

    def apply_many(self, state: State, V: PyTree) -> tuple[PyTree, Info]:
        rhs = {name: select(V, tuple(part.space)) for name, part in state.items()}
        solved = {name: part.solve_many(rhs[name]) for name, part in state.items()}
        infos = [info for _, info in solved.values()]
        lengths = [(tree.norms(rhs[name]), tree.norms(x)) for name, (x, _) in solved.items()]
        info = _merge(infos, *zip(*lengths, strict=True))
        worst = _worst(infos, [part.solver.approximate for part in state.values()])
        return join({name: x for name, (x, _) in solved.items()}, V), info._replace(block=worst)

    def advice(self, info: Info) -> str:
        """Return the advice of every block's solver, for whoever does not know which block failed."""
        return "; ".join(dict.fromkeys(solver.advice(info) for solver in self._solvers))

    def holds(self, op: LinearOperator) -> str:
        """Return what the largest block holds."""
        groups = partition(op.space, self.blocks)
        solvers = self.solver if isinstance(self.solver, Mapping) else dict.fromkeys(groups, self.solver)
        largest = max(groups, key=lambda name: tree.size(select(op.space, groups[name])))
        told = solvers[largest].holds(restrict(op, groups[largest]))
        return f"Of block '{largest}', {told}" if told else ""

    def with_damping(self, state: State, damping: Any, *, key: Key | None = None) -> tuple[Blockwise, State]:
        keys, parts = _keys(state, key), {name: part.op for name, part in state.items()}
        dampings, _ = block_dampings(_of_one_block(dict.fromkeys(parts, damping), parts), parts, keys)
        for name, absolute in dampings.items():
            check_positive_mean(absolute, self, parts[name], f" of block '{name}'")
        moved: State = OrderedDict()
        for name, part in state.items():
            try:
                moved[name] = part.with_damping(dampings.get(name, damping), key=keys[name])
            except ValueError as error:
                raise ValueError(f"{error} (block '{name}')") from None
            if name in dampings:
                solver = copy.copy(moved[name].solver)
                set_field(solver, "damping", damping)  # as it was asked for: relative
                moved[name] = dataclasses.replace(moved[name], solver=solver)
        return Blockwise({name: part.solver for name, part in moved.items()}, self.blocks), moved

    def by_block(self, inverse: Inverse) -> State:
        return inverse.state

    def __repr__(self) -> str:
        solvers = list(dict.fromkeys(map(repr, self._solvers)))
        told = " and ".join(solvers if len(solvers) < 3 else [solvers[0], f"{len(solvers) - 1} others"])
        return _reprs.call(self, told, f"blocks={name_of(self.blocks)}")


def _keys(blocks: Mapping[str, Any], key: Key | None) -> dict[str, Key | None]:
    """Return a key for each block, None if there is none."""
    keys = [None] * len(blocks) if key is None else list(jax.random.split(key, len(blocks)))
    return dict(zip(blocks, keys, strict=True))


def _of_one_block(wanted: Mapping[str, Any], parts: Mapping[str, LinearOperator]) -> dict[str, Any]:
    """Return the dampings of blocks that are one block to their solver, too; others it resolves itself."""
    return {name: damping for name, damping in wanted.items() if len(diagonal_blocks(parts[name])) == 1}


def _merge(infos: Sequence[Info], rhs: Sequence[Array], solutions: Sequence[Array]) -> Info:
    """How the solve as a whole went; the lengths of right-hand sides and solutions weigh the blocks.

    Blocks solved in closed form, whose residual is not known, count as solved exactly.
    """
    residuals = [info.residual for info in infos]
    exact = [
        jnp.zeros_like(norm) if residual is None else residual for residual, norm in zip(residuals, rhs, strict=True)
    ]
    errors = [jnp.asarray(info.standard_error) for info in infos if info.standard_error is not None]
    return Info(
        steps=jnp.max(jnp.stack([info.steps for info in infos]), axis=0),
        residual=None if all(residual is None for residual in residuals) else _weighted(jnp.stack(exact), rhs),
        converged=jnp.all(jnp.stack([info.converged for info in infos]), axis=0),
        min_curvature=lowest_known([info.min_curvature for info in infos]),
        standard_error=_weighted(jnp.stack(errors), solutions) if len(errors) == len(infos) else None,
    )


def _weighted(errors: Array, lengths: Sequence[Array]) -> Array:
    """The relative error of a whole from those of its parts, whose lengths are given."""
    sizes = jnp.stack(lengths).astype(errors.dtype)
    total = jnp.sum(sizes**2, axis=0)
    # A part of length zero has no error, even where it is infinite relative to it.
    parts = jnp.where(sizes > 0, errors * sizes, 0)
    return jnp.sqrt(jnp.sum(parts**2, axis=0) / jnp.where(total > 0, total, 1))


def _worst(infos: Sequence[Info], approximate: Sequence[bool]) -> Array:
    """Which block: failed ones first, and among equals that with the largest residual, of approximations none."""
    ranks = []
    for info, skip in zip(infos, approximate, strict=True):
        missed = 0.0 if skip or info.residual is None else 1 - 1 / (1 + info.residual)
        ranks.append(jnp.where(info.converged, 0, 2) + missed)
    return jnp.argmax(jnp.stack(ranks), axis=0).astype(jnp.int32)
