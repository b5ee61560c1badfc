r"""One solver per block of parameters."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import _reprs, tree
from .._pytree import dataclass, set_field, static
from .._typing import Array, Key, PyTree
from .._words import name_of
from ..blocks import Block, as_blocks, by_layer, join, partition, select
from ..curvature import LinearOperator, restrict
from .base import Inverse, Solver, check_solver
from .damping import Asked, Damping, RelativeDamping, asked_by_block, of_leaves
from .info import Info, lowest_known


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

    def _parts(self, op: LinearOperator) -> OrderedDict[str, _Part]:
        """Return the operator on each block, and its solver."""
        groups = partition(op.space, self.blocks)
        if isinstance(self.solver, Mapping) and set(self.solver) != set(groups):
            raise ValueError(f"solver: got solvers for {list(self.solver)}, expected one for each of {list(groups)}")
        for name, block in groups.items():
            if not any(leaf.size for leaf in select(op.space, block).values()):
                raise ValueError(f"blocks: block '{name}' has no entries {block}; put its leaves into another block")
        parts = OrderedDict((name, restrict(op, block)) for name, block in groups.items())
        if isinstance(self.solver, Mapping):
            solvers: Mapping[str, Solver] = self.solver
        else:
            solvers = dict.fromkeys(groups, self.solver)
            damping = getattr(self.solver, "damping", 0.0)
            if isinstance(damping, Mapping):  # of the whole, whose blocks each have a share of it
                each = _spread(damping, op, groups)
                solvers = {name: self.solver.damped_by(each[name], part) for name, part in parts.items()}
        return OrderedDict((name, _Part(block, parts[name], solvers[name])) for name, block in groups.items())

    def asked(self, op: LinearOperator) -> OrderedDict[str, Asked]:
        found: OrderedDict[str, Asked] = OrderedDict()
        for name, part in self._parts(op).items():
            inner = part.solver.asked(part.op)
            for own, asked in inner.items():
                block = name if len(inner) == 1 else f"{name}/{own}"
                if block in found:
                    raise ValueError(f"blocks: '{block}' is both a block and a part of another; give it another name")
                found[block] = asked
        return found

    def fit(self, op: LinearOperator, damping: Damping, *, key: Key | None = None) -> OrderedDict[str, PyTree]:
        parts = self._parts(op)
        keys = [None] * len(parts) if key is None else list(jax.random.split(key, len(parts)))
        return OrderedDict(
            (name, part.solver.fit(part.op, of_leaves(damping, part.block), key=own))
            for (name, part), own in zip(parts.items(), keys, strict=True)
        )

    def refit(self, inverse: Inverse, damping: Damping, *, key: Key | None = None) -> OrderedDict[str, PyTree]:
        parts = self.by_block(inverse)
        keys = [None] * len(parts) if key is None else list(jax.random.split(key, len(parts)))
        return OrderedDict(
            (name, part.solver.refit(part, of_leaves(damping, tuple(part.space)), key=own))
            for (name, part), own in zip(parts.items(), keys, strict=True)
        )

    def solve(self, op: LinearOperator, damping: Damping, fit: Mapping[str, PyTree], V: PyTree) -> tuple[PyTree, Info]:
        parts = self._parts(op)
        rhs = {name: select(V, part.block) for name, part in parts.items()}
        solved = {
            name: part.solver.solve(part.op, of_leaves(damping, part.block), fit[name], rhs[name])
            for name, part in parts.items()
        }
        lengths = [(tree.norms(rhs[name]), tree.norms(x)) for name, (x, _) in solved.items()]
        infos = [_filled(info, norms) for (_, info), (norms, _) in zip(solved.values(), lengths, strict=True)]
        info = _merge(infos, *zip(*lengths, strict=True))
        worst = _worst(infos, [part.solver.approximate for part in parts.values()])
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

    def damped_by(self, damping: Any, op: LinearOperator) -> Blockwise:
        parts = self._parts(op)
        each = _spread(damping, op, {name: part.block for name, part in parts.items()})
        return Blockwise({n: part.solver.damped_by(each[n], part.op) for n, part in parts.items()}, self.blocks)

    def by_block(self, inverse: Inverse) -> OrderedDict[str, Inverse]:
        return OrderedDict(
            (name, Inverse(part.op, part.solver, of_leaves(inverse.damping, part.block), inverse.fit[name]))
            for name, part in self._parts(inverse.op).items()
        )

    def __repr__(self) -> str:
        solvers = list(dict.fromkeys(map(repr, self._solvers)))
        told = " and ".join(solvers if len(solvers) < 3 else [solvers[0], f"{len(solvers) - 1} others"])
        return _reprs.call(self, told, f"blocks={name_of(self.blocks)}")


class _Part(NamedTuple):
    """A block: its leaves, the operator on them, and how that is inverted."""

    block: Block
    op: LinearOperator
    solver: Solver


def _spread(damping: Any, op: LinearOperator, blocks: Mapping[str, Block]) -> Mapping[str, Any]:
    """Return what of a damping is asked for of each block: given by block, by part of the parameters, or for all."""
    is_one = lambda x: isinstance(x, RelativeDamping) or jax.tree_util.all_leaves([x])
    if is_one(damping):
        return dict.fromkeys(blocks, damping)
    by_block = isinstance(damping, Mapping) and set(damping) == set(blocks)
    if by_block and all(map(is_one, damping.values())):
        return damping
    try:
        asked = asked_by_block(damping, op)
    except ValueError:
        if by_block:
            return damping
        raise
    within = lambda block: {name: x.damping for name, x in asked.items() if set(x.leaves) <= set(block)}
    spread = {name: within(block) for name, block in blocks.items()}
    if sum(map(len, spread.values())) != len(asked):
        raise ValueError(
            f"damping: got one for each of {list(asked)}, expected a number, one for each of the blocks "
            f"{list(blocks)}, or one for each part of the parameters within a block"
        )
    return spread


def _filled(info: Info, norms: Array) -> Info:
    """Return what a solver says of all right-hand sides at once as one number for each."""
    return jax.tree.map(lambda field: jnp.broadcast_to(field, norms.shape), info)


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
