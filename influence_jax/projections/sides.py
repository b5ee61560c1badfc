r"""Projections of both sides of every layer's matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import tree
from .._pytree import dataclass, static
from .._typing import Array, Key, LossFunction, PyTree
from ..batching import check_positive, chunk_for, map_chunks
from ..capture import Layer, LayerFactors, Plan, arrange, einsum, gradient, held_entries, layer_factors, rotate
from ..capture.contract import Factors
from ..objective import LossOnly, Objective, as_objective
from .base import KINDS, Projection, checked_key, checked_params, entries, joined, scaled, times_entries


@dataclass
class TwoSided(Projection):
    r"""A projection of each layer's inputs and outputs, $G \mapsto P_{in}^\top G\, P_{out}$.

    Made by `two_sided`.

    Attributes:
      layers: How the parameters are arranged as matrices; static.
      sides: Length of a projected side, of inputs and of outputs; a side that is no longer is kept.

    Example:
      >>> loss = lambda params, z: jnp.sum((z @ params["w"]) ** 2)
      >>> two_sided(loss, {"w": jnp.ones((20, 30))}, jnp.ones(20), (4, 8), jax.random.key(0)).widths
      (32,)
    """

    layers: tuple[Layer, ...] = static()
    sides: tuple[int, int] = static()

    def of_stack(self, stack: PyTree) -> Array:
        leaves = dict(tree.named_leaves(tree.promote(stack)))
        return joined([self._of_matrix(place, layer.matrix(leaves)) for place, layer in enumerate(self.layers)])

    def of_examples(self, objective: Objective | LossOnly, params: PyTree, batch: PyTree, chunk: int | None) -> Array:
        wide = tree.promote(params)
        example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
        plan, layers = arrange(objective, wide, example)
        if _arrangement(layers) != _arrangement(self.layers):  # another model of the same parameters: the same map
            return Projection.of_examples(self, objective, params, batch, chunk)
        sides = [self._sides(place) for place in range(len(layers))]
        formed = [_forming_is_less(plan, layer, *pair) for layer, pair in zip(layers, sides, strict=True)]

        def one_chunk(part: PyTree) -> Array:
            found = layer_factors(
                plan, layers, wide, part, lambda loss, _: jnp.ones(1, loss.dtype), lambda loss, _: loss
            )
            return joined(
                [
                    self._of_matrix(place, gradient(layer, f)[:, 0])
                    if formed[place]
                    else gradient(layer, _turned(layer, f, *sides[place]))[:, 0].reshape(tree.count(part), -1)
                    for place, (layer, f) in enumerate(zip(layers, found, strict=True))
                ]
            )

        held = sum(held_entries(plan, layer, whole=form) for layer, form in zip(layers, formed, strict=True))
        return map_chunks(one_chunk, batch, chunk=chunk or chunk_for(held + self.dim))

    @property
    def widths(self) -> tuple[int, ...]:
        widths = [_width(layer, self.sides) for layer in self.layers]
        return tuple(
            width // layer.groups for width, layer in zip(widths, self.layers, strict=True) for _ in range(layer.groups)
        )

    def _layout(self) -> Any:
        return self.sides, _arrangement(self.layers)

    def _sides(self, place: int) -> tuple[Array | None, Array | None]:
        """Projections `(G, n, k)` of both sides of a layer's matrices; None for one that is kept."""
        layer, key = self.layers[place], jax.random.fold_in(self.key, place)
        drawn: list[Array | None] = []
        for which, (length, side) in enumerate(zip((layer.rows, layer.columns), self.sides, strict=True)):
            if length <= side:
                drawn.append(None)
                continue
            drawn_entries = entries(self.kind, jax.random.fold_in(key, which), (layer.groups * length, side))
            drawn.append(scaled(drawn_entries.reshape(layer.groups, length, side), side))
        return drawn[0], drawn[1]

    def _of_matrix(self, place: int, matrix: Array) -> Array:
        """Gradients `(K, G, I, O)` of a layer's matrices, projected, `(K, ...)`."""
        layer, flat = self.layers[place], matrix.reshape(matrix.shape[0], -1)
        if not layer.of_entries:
            return rotate(matrix, *self._sides(place)).reshape(matrix.shape[0], -1)
        width = _width(layer, self.sides)
        if width == flat.shape[1]:
            return flat
        return scaled(times_entries(self.kind, jax.random.fold_in(self.key, place), flat, width), width)


def two_sided(
    objective: Objective | LossFunction,
    params: PyTree,
    example: PyTree,
    sides: int | tuple[int, int],
    key: Key,
    *,
    kind: str = "rademacher",
) -> TwoSided:
    r"""A projection of every layer's inputs and outputs.

    $P_{in}^\top G\, P_{out} = \sum_t (P_{in}^\top a_t) (P_{out}^\top s_t)^\top$ over positions t, with inputs a and
    output cotangents s of the layer: the gradient G need not be formed.  Layers are those that `coverage` lists; a bias
    is one more input.  Each side has its own scale, $1/\sqrt{k}$, so layers of all shapes count alike, and a side that
    is no longer than k is kept.  A leaf that is no matrix is kept if it has no more entries than a projected layer, and
    is projected to as many as that otherwise.

    Args:
      objective: Objective, or a bare `f(params, example) -> scalar`; where the layers are found.
      params: The parameters, or their shapes; leaves `(*leaf)`.
      example: ONE example, without a batch axis, or its shapes.
      sides: Length k of projected inputs and outputs, or one of each.
      key: A threefry key, which `jax.random.key(seed)` makes.
      kind: `"rademacher"` or `"gaussian"`.

    Returns:
      A `Projection`; its `dim` is the number of entries of all projected layers.

    Raises:
      TypeError, ValueError: If an argument is not of that form.

    Example:
      >>> loss = lambda params, z: jnp.sum((z @ params["w"] + params["b"]) ** 2)
      >>> params = {"w": jnp.ones((20, 30)), "b": jnp.zeros(30)}
      >>> projection = two_sided(loss, params, jnp.ones(20), 8, jax.random.key(0))
      >>> projection
      TwoSided(rademacher, 630 parameters to 64)
      >>> projection.project_grads(loss, params, jnp.ones((5, 20))).shape
      (5, 64)

    Reference: Choe et al. 2024 (LoGra), arXiv:2405.13954, section 3.1.
    """
    objective, shapes, key = as_objective(objective), checked_params(params), checked_key(key)
    pair = sides if isinstance(sides, tuple) else (sides, sides)
    if len(pair) != 2:
        raise ValueError(f"sides: got {sides!r}, expected one length, or a pair for inputs and outputs")
    for side in pair:
        check_positive(side, "sides")
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {list(KINDS)}")
    jax.eval_shape(objective, shapes, example)  # a batch in place of an example is found out here
    _, layers = arrange(objective, tree.promote_shapes(shapes), example)
    leaves, structure = jax.tree.flatten(shapes)
    dim = sum(_width(layer, pair) for layer in layers)
    return TwoSided(key, kind, dim, structure, tuple(leaf.shape for leaf in leaves), layers, pair)


def _width(layer: Layer, sides: tuple[int, int]) -> int:
    """How many entries a layer is projected to."""
    if layer.of_entries:
        return layer.groups * min(layer.columns, sides[0] * sides[1])
    return layer.groups * min(layer.rows, sides[0]) * min(layer.columns, sides[1])


def _arrangement(layers: Sequence[Layer]) -> tuple:
    """Where the entries of the layers' matrices are, apart from what is done with them."""
    return tuple((layer.kernel, layer.view, layer.shape, layer.bias, layer.of_entries) for layer in layers)


def _forming_is_less(plan: Plan, layer: Layer, left: Array | None, right: Array | None) -> bool:
    """Whether to form a layer's gradients and project them, for less work than projecting each position's factors."""
    if layer.of_entries:
        return True
    rows, columns = layer.rows, layer.columns
    side_in, side_out = rows if left is None else left.shape[2], columns if right is None else right.shape[2]
    positions = sum(plan.uses[index].positions for index, _ in layer.uses)
    per_position = side_in * side_out + (rows * side_in if left is not None else 0)
    per_position += columns * side_out if right is not None else 0
    afterwards = (rows * side_in * columns if left is not None else 0) + (
        side_in * columns * side_out if right is not None else 0
    )
    return positions * rows * columns + afterwards < positions * per_position


def _turned(layer: Layer, factors: LayerFactors, left: Array | None, right: Array | None) -> LayerFactors:
    """The factors of `leftᵀ gradient right`; of a looked up row, that row of the projection."""
    uses = []
    for (_, exchanged), use in zip(layer.uses, factors.uses, strict=True):
        before, after = (right, left) if exchanged else (left, right)
        inputs, outputs = use.inputs, use.outputs
        if before is not None and use.looked_up:
            row = lambda table, numbers: table.at[numbers].get(mode="fill", fill_value=0)
            inputs = jax.vmap(row, (0, 1), 1)(before, inputs)
        elif before is not None:
            inputs = einsum("bgti,gij->bgtj", inputs, before)
        if after is not None:
            outputs = einsum("bkgto,gop->bkgtp", outputs, after)
        uses.append(Factors(inputs, outputs))
    return LayerFactors(uses, None if factors.rest is None else rotate(factors.rest, left, right))
