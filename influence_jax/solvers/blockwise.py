r"""One solver per block of parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .. import tree
from .._pytree import dataclass, set_field, static
from .._typing import Array, Key, PyTree
from ..blocks import as_blocks, by_layer, join, partition, select
from ..curvature import LinearOperator, restrict
from .base import Info, Inverse, Solver

State = OrderedDict[str, Inverse]


@dataclass
class Blockwise(Solver):
    r"""Solve block by block: the inverse of the block-diagonal part, $x_b = (A_{bb} + \lambda_b I)^{-1} v_b$.

    Each block is the restriction of the operator, in its own class, with its own solver and damping; `RelativeDamping`
    is relative to the block.

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
        solvers = self.solver.values() if isinstance(self.solver, Mapping) else [self.solver]
        for solver in solvers:
            if not isinstance(solver, Solver) or isinstance(solver, type):
                raise TypeError(
                    f"solver: got {solver!r}, expected a solver such as CG(damping=1e-3), or a dict of them"
                )
        if isinstance(self.solver, Mapping):
            set_field(self, "solver", OrderedDict(self.solver))
        set_field(self, "blocks", as_blocks(self.blocks))

    def init(self, op: LinearOperator, *, key: Key | None = None) -> State:
        groups = partition(op.space, self.blocks)
        if isinstance(self.solver, Mapping) and set(self.solver) != set(groups):
            raise ValueError(f"solver: got solvers for {list(self.solver)}, expected one for each of {list(groups)}")
        keys = [None] * len(groups) if key is None else list(jax.random.split(key, len(groups)))
        inverses = OrderedDict()
        for (name, block), block_key in zip(groups.items(), keys, strict=True):
            solver = self.solver[name] if isinstance(self.solver, Mapping) else self.solver
            restricted = restrict(op, block)
            inverses[name] = Inverse(restricted, solver, solver.init(restricted, key=block_key))
        return inverses

    def apply_many(self, state: State, V: PyTree) -> tuple[PyTree, Info]:
        solved = {name: part.solve_many(select(V, tuple(part.space))) for name, part in state.items()}
        squares = {name: tree.dots(*[select(V, tuple(part.space))] * 2) for name, part in state.items()}
        infos = OrderedDict((name, info) for name, (_, info) in solved.items())
        return join({name: x for name, (x, _) in solved.items()}, V), _merge(infos, squares)

    def with_damping(self, state: State, damping: Any, *, key: Key | None = None) -> tuple[Blockwise, State]:
        keys = [None] * len(state) if key is None else list(jax.random.split(key, len(state)))
        moved = OrderedDict(
            (name, part.with_damping(damping, key=block_key))
            for (name, part), block_key in zip(state.items(), keys, strict=True)
        )
        return Blockwise({name: part.solver for name, part in moved.items()}, self.blocks), moved

    def by_block(self, inverse: Inverse) -> State:
        return inverse.state

    def __repr__(self) -> str:
        solvers = dict(self.solver) if isinstance(self.solver, Mapping) else self.solver
        return f"Blockwise({solvers!r}, blocks={getattr(self.blocks, '__name__', self.blocks)})"


def _merge(infos: Mapping[str, Info], squares: Mapping[str, Array]) -> Info:
    """How the solve as a whole went; `squares` are the squared norms of the blocks' right-hand sides."""
    parts = list(infos.values())
    total = sum(squares.values(), jnp.zeros_like(next(iter(squares.values()))))
    missed = jnp.stack([infos[name].residual ** 2 * squares[name] for name in infos])
    return Info(
        steps=jnp.max(jnp.stack([part.steps for part in parts]), axis=0),
        residual=jnp.sqrt(jnp.sum(missed, axis=0) / jnp.where(total > 0, total, 1)),
        converged=jnp.all(jnp.stack([part.converged for part in parts]), axis=0),
        min_curvature=jnp.nanmin(jnp.stack([part.min_curvature for part in parts]), axis=0),
    )
