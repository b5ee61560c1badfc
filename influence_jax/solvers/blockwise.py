r"""One solver per block of parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import tree
from .._pytree import dataclass, set_field, static
from .._typing import Array, Key, PyTree
from ..blocks import as_blocks, by_layer, join, partition, select
from ..curvature import LinearOperator, restrict
from .base import Inverse, Solver
from .info import Info

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
        for name, block in groups.items():
            if not any(leaf.size for leaf in select(op.space, block).values()):
                raise ValueError(f"blocks: block '{name}' has no entries {block}; put its leaves into another block")
        keys = [None] * len(groups) if key is None else list(jax.random.split(key, len(groups)))
        inverses = OrderedDict()
        for (name, block), block_key in zip(groups.items(), keys, strict=True):
            solver = self.solver[name] if isinstance(self.solver, Mapping) else self.solver
            restricted = restrict(op, block)
            inverses[name] = Inverse(restricted, solver, solver.init(restricted, key=block_key))
        return inverses

    def apply_many(self, state: State, V: PyTree) -> tuple[PyTree, Info]:
        rhs = {name: select(V, tuple(part.space)) for name, part in state.items()}
        solved = {name: part.solve_many(rhs[name]) for name, part in state.items()}
        infos = [info for _, info in solved.values()]
        return join({name: x for name, (x, _) in solved.items()}, V), _merge(
            infos, [tree.norms(b) for b in rhs.values()]
        )

    def with_damping(self, state: State, damping: Any, *, key: Key | None = None) -> tuple[Blockwise, State]:
        keys = [None] * len(state) if key is None else list(jax.random.split(key, len(state)))
        moved: State = OrderedDict()
        for (name, part), block_key in zip(state.items(), keys, strict=True):
            try:
                moved[name] = part.with_damping(damping, key=block_key)
            except ValueError as error:
                raise ValueError(f"{error} (block '{name}')") from None
        return Blockwise({name: part.solver for name, part in moved.items()}, self.blocks), moved

    def by_block(self, inverse: Inverse) -> State:
        return inverse.state

    def __repr__(self) -> str:
        solvers = dict(self.solver) if isinstance(self.solver, Mapping) else self.solver
        return f"Blockwise({solvers!r}, blocks={getattr(self.blocks, '__name__', self.blocks)})"


def _merge(infos: Sequence[Info], norms: Sequence[Array]) -> Info:
    """How the solve as a whole went; `norms` are those of the blocks' right-hand sides.

    Blocks solved in closed form, whose residual is not known, count as solved exactly.
    """
    steps, residuals, converged, curvatures = (jnp.stack(field) for field in list(zip(*infos, strict=True))[:4])
    sizes = jnp.stack([norm.astype(residuals.dtype) for norm in norms])
    total, missed = jnp.sum(sizes**2, axis=0), jnp.nansum((residuals * sizes) ** 2, axis=0)
    residual = jnp.sqrt(missed / jnp.where(total > 0, total, 1))
    return Info(
        steps=jnp.max(steps, axis=0),
        residual=jnp.where(jnp.all(jnp.isnan(residuals), axis=0), jnp.nan, residual),
        converged=jnp.all(converged, axis=0),
        min_curvature=jnp.nanmin(curvatures, axis=0),
        # Failed blocks first, and among equals the one with the largest residual.
        block=jnp.argmax(jnp.where(converged, 0, 2) + jnp.nan_to_num(residuals / (1 + residuals)), axis=0).astype(
            jnp.int32
        ),
    )
