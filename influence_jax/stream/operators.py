r"""Curvature over a loader: the mean of an operator over batches that are never in memory at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from .. import _reprs, blocks, tree
from .._mesh import compiled
from .._pytree import dataclass, static
from .._sound import Unsound, is_finite, refusal
from .._typing import Array, Key, LossFunction, PyTree
from .._words import name_of
from ..bounds import lower_bound
from ..curvature import Identity, LinearOperator, Scaled, Sum
from ..curvature.capabilities import check_losses, diagonal, restrict, to_dense, trace, wide_dtype
from ..curvature.convexity import is_declared_convex
from ..curvature.exact import GGN, OverData
from ..curvature.loops import refuse_tracing
from ..curvature.losses import check_classes, unsound
from ..curvature.parts import examples_from
from ..objective import LossOnly, Objective, as_objective, constants_of
from .loaders import Blocks, paced

Curvature = Callable[[Any, PyTree, PyTree], LinearOperator]
# What has no data, and is the same for every batch.
CONSTANT = (Identity,)


@dataclass
class Streamed(LinearOperator):
    r"""The mean over a loader of the operator that `curvature` makes of one batch; made by `stream.operator`.

    $C v = \sum_b W_b C_b v / \sum_b W_b$ with $W_b$ the sum of the weights in batch b: what the operator on all data
    is, at one pass over the loader for each product with a stack.  A solver's loop then runs on the host.

    Attributes:
      objective: Loss of one example.
      params: Leaves `(*leaf)`.
      curvature: `(objective, params, batch) -> LinearOperator`; static.
      source: The loader; static, compared by identity.
      block: Names of the leaves it is restricted to; all if None; static.

    Example:
      >>> import influence_jax as ij
      >>> from influence_jax.stream.loaders import Blocks
      >>> f, loader = lambda params, z: 0.5 * (params["w"] * z) ** 2, [jnp.array([1.0, 2.0]), jnp.array([4.0])]
      >>> op = operator(ij.Hessian, f, {"w": jnp.array(1.0)}, Blocks(loader, "loader"))
      >>> op, op.mv({"w": jnp.array(1.0)})["w"].item()
      (Streamed(Hessian, 1 parameter), 7.0)
    """

    objective: Objective | LossOnly | LossFunction
    params: PyTree
    curvature: Curvature = static()
    source: Blocks = static()
    block: blocks.Block | None = static(default=None)

    @property
    def space(self) -> PyTree:
        return self.params if self.block is None else blocks.select(self.params, self.block)

    @property
    def on_host(self) -> bool:
        return True

    @property
    def psd(self) -> bool:
        """Whether it is on every block; where that depends on the data, they are read once, when somebody asks."""
        if self.source.psd is None:
            first = self.on(self.source.head(), 0)
            asked = [term for term in _terms(first) if isinstance(term, GGN) and not is_declared_convex(term.split)]
            self.source.psd = all(op.psd for op, _ in self.parts()) if asked else first.psd
        return self.source.psd

    @property
    def is_curvature(self) -> bool:
        return True

    @property
    def fitted_at(self) -> tuple[PyTree, ...]:
        return (self.space,)

    @property
    def fitted_with(self) -> tuple[PyTree, ...]:
        return constants_of(self.objective)

    def mv(self, v: PyTree) -> PyTree:
        tree.check_vector(v, self.space, "v")
        return tree.only(self.mm(tree.stack_of_one(v)))

    def mm(self, V: PyTree) -> PyTree:
        tree.check_stack(V, self.space, "V")
        refuse_tracing(self, V)
        return tree.cast_like(self._mean(_product, tree.promote(V)), V)

    def parts(self) -> Iterator[tuple[LinearOperator, int]]:
        """The operator on every block of the loader, and its examples; rows beyond them have weight zero."""
        for block in self.source:
            op = self.on(block.batch, block.start)
            if block.count < tree.count(block.batch) and not all(map(_can_mask, _terms(op))):
                batch = jax.tree.map(lambda x, count=block.count: x[:count], block.batch)
                op = self.on(batch, block.start)
            else:
                op = _masked(op, block.weights(wide_dtype(self.params)))
            if not self.source.sound:
                for term in (term for term in _terms(op) if isinstance(term, OverData)):
                    check_classes(term, block.start, self.source.name)
            yield op, block.count

    def on(self, batch: PyTree, start: int) -> LinearOperator:
        """The operator on one batch, whose first example is the loader's at `start`."""
        with examples_from(start):
            op = self.curvature(self.objective, self.params, batch)
        return op if self.block is None else restrict(op, self.block)

    def _mean(self, product: Callable[..., PyTree], *arguments: Any) -> PyTree:
        """The mean of something linear in the operator."""
        # Held by no name, which the traceback of an error would keep, and with it the loader and its bar.
        total = reduce(_added, paced(_sums(op, count, arguments, product) for op, count in self.parts()))
        if any(mass == 0 for _, mass in total):
            raise ValueError(f"weights: those of all batches of {self.source.name} sum to 0, expected a positive sum")
        mean = _divided(total)
        if not self.source.sound:
            self._judge(is_finite(mean))
        return mean

    def _judge(self, finite: bool) -> None:
        """Note that all losses have been found to be finite in a pass, or look which are not."""
        if not finite:
            self.look()
        self.source.sound = self.source.sound or finite

    def look(self) -> None:
        """Read the loader once, for the losses alone.

        Raises:
          ValueError: If one is not finite, saying how many, and which is the first.
        """
        found, start = Unsound(), 0
        for op, count in self.parts():
            over_data = [
                unsound(term, start, name=self.source.name) for term in _terms(op) if isinstance(term, OverData)
            ]
            found = found.then(max(over_data, key=lambda each: each.losses, default=Unsound()))
            start += count
        if found.losses:
            raise refusal(found, self.source.name)
        self.source.sound = True

    def __repr__(self) -> str:
        return _reprs.call(self, name_of(self.curvature), _reprs.parameters(self.space))


def operator(curvature: Curvature, objective: Objective | LossFunction, params: PyTree, source: Blocks) -> Streamed:
    """Curvature over a loader, after trying it on the first block.

    `stream.invert` inverts it.

    Args:
      curvature: `(objective, params, batch) -> LinearOperator`, e.g. `GGN` or `partial(GGN, chunk=64)`.
      objective: Loss of one example.
      params: Leaves `(*leaf)`.
      source: The loader, as `influence_jax.stream.loaders.Blocks`.

    Returns:
      A `Streamed`.

    Raises:
      TypeError: If `curvature` returns no operator.
      ValueError: If the operators are of another space, or of data that are not the batch's.

    Example:
      >>> import influence_jax as ij
      >>> from influence_jax.stream.loaders import Blocks
      >>> f, data = lambda params, z: 0.5 * (params["w"] * z) ** 2, jnp.array([1.0, 2.0, 4.0])
      >>> operator(ij.GGN, ij.Objective(lambda p, z: p["w"] * z, lambda out, z: out**2), {"w": jnp.array(1.0)},
      ...          Blocks(data, "loader", rows=2))
      Streamed(GGN, 1 parameter)
    """
    params, objective = tree.check_params(params), as_objective(objective)
    op = Streamed(objective, params, curvature, source)
    first, _ = next(op.parts())
    _check_fixed(op)
    if not isinstance(first, LinearOperator):
        raise TypeError(f"curvature: returned a {type(first).__name__}, expected a LinearOperator such as GGN(...)")
    tree.check_vector(first.space, params, "params, against the space of curvature")
    return op


def _check_fixed(op: Streamed) -> None:
    """Raise if a term has data of its own, which would be weighted like those of each batch."""
    batch = next(iter(op.source)).batch
    own = {id(leaf) for leaf in jax.tree.leaves(batch)}
    terms = zip(_terms(op.on(batch, 0)), _terms(op.on(batch, 0)), strict=True)
    for one, two in terms:
        if isinstance(one, OverData) and isinstance(two, OverData):
            pairs = list(zip(jax.tree.leaves(one.data), jax.tree.leaves(two.data), strict=True))
            if all(a is b and id(a) not in own for a, b in pairs):
                raise ValueError(
                    f"curvature: its term {one!r} has data of its own; expected a function of the batch alone, whose "
                    "mean over batches is the curvature"
                )


def _terms(op: LinearOperator) -> list[LinearOperator]:
    """What a sum of multiples is made of."""
    if isinstance(op, Sum):
        return [part for term in op.terms for part in _terms(term)]
    return _terms(op.op) if isinstance(op, Scaled) else [op]


def _can_mask(op: LinearOperator) -> bool:
    return isinstance(op, (OverData, *CONSTANT))


def _masked(op: LinearOperator, mask: Array) -> LinearOperator:
    """The operator with a weight for each example."""

    def weighted(part: Any) -> Any:
        if not isinstance(part, OverData):
            return part
        if part.count != len(mask):
            raise ValueError(
                f"curvature: has a term over {part.count} examples for a batch of {len(mask)}; expected a function of "
                "the batch alone, whose mean over batches is the curvature"
            )
        return dataclasses.replace(part, weights=mask if part.weights is None else part.weights * mask)

    with examples_from(0):
        return jax.tree.map(weighted, op, is_leaf=lambda part: isinstance(part, OverData))


def _product(op: LinearOperator, V: PyTree) -> PyTree:
    return tree.promote(op.mm(V))


def _traces(op: LinearOperator, key: Key | None) -> Array:
    return trace(op, key=key)


def _mass(op: LinearOperator, count: Array | int) -> Array:
    """How much a term counts: by its weights, or by its examples."""
    if isinstance(op, OverData):
        weights = jnp.ones(op.count, wide_dtype(op.space)) if op.weights is None else op.weights
        return jnp.sum(weights) if op.total is None else op.total
    return jnp.asarray(count, wide_dtype(op.space))


@partial(compiled, static_argnames="product")
def _sums(
    op: LinearOperator, count: Array | int, arguments: tuple, product: Callable[..., PyTree]
) -> list[tuple[PyTree, Array]]:
    """Of every term, what is linear in it times its mass, and the mass."""

    def term_sums(term: LinearOperator, factor: Array | float) -> list[tuple[PyTree, Array]]:
        if isinstance(term, Sum):
            return [pair for part in term.terms for pair in term_sums(part, factor)]
        if isinstance(term, Scaled):
            return term_sums(term.op, factor * term.factor)
        mass = _mass(term, count)
        if isinstance(term, OverData):  # undivided, for the weights of one batch may sum to zero
            return [
                (tree.scale(factor, product(dataclasses.replace(term, total=jnp.ones_like(mass)), *arguments)), mass)
            ]
        return [(tree.scale(mass, tree.scale(factor, product(term, *arguments))), mass)]

    return term_sums(op, 1.0)


@partial(jax.jit, donate_argnums=0)
def _added(total: PyTree, summed: PyTree) -> PyTree:
    return tree.add(total, summed)


@compiled
def _divided(sums: Sequence[tuple[PyTree, Array]]) -> PyTree:
    means = [jax.tree.map(lambda x, m=mass: x / m.astype(x.dtype), summed) for summed, mass in sums]
    return tree.total(means)


@check_losses.register
def _(op: Streamed, *, gradients: bool = False) -> None:
    if not op.source.sound:
        op.look()


@restrict.register
def _(op: Streamed, block: Sequence[str]) -> LinearOperator:
    return dataclasses.replace(op, block=blocks.as_block(block, op.space))


@to_dense.register
def _(op: Streamed) -> Array:
    return op._mean(to_dense)


@diagonal.register
def _(op: Streamed) -> PyTree:
    return op._mean(diagonal)


@trace.register
def _(op: Streamed, *, key: Key | None = None) -> Array:
    return op._mean(_traces, key)


@lower_bound.register
def _(op: Streamed) -> Array:
    # No eigenvalue of a mean is below all of those averaged.
    return jnp.min(jnp.stack([lower_bound(part) for part, _ in op.parts()]))
