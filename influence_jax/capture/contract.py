r"""What is made of captured inputs and cotangents: gradients, second moments, scores; each without more than it needs.

For a batch of B examples and K cotangents of each one's output, a use has inputs `(B, G, T, I)` and output cotangents
`(B, K, G, T, O)`, and the gradient of its matrix is $\sum_t \mathrm{input}_t\, \mathrm{cotangent}_t^\top$.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import tree
from .._typing import Array, PyTree
from ..batching import each
from ..gradients import spoilt
from .analysis import Plan
from .layers import Layer
from .run import capture


class Factors(NamedTuple):
    """Of the gradients in one use of a layer.

    Attributes:
      inputs: `(B, G, T, I)`, a column of ones last if there is a bias; numbers of rows `(B, G, T)` for a lookup.
      outputs: Cotangents `(B, K, G, T, O)`.
    """

    inputs: Array
    outputs: Array

    @property
    def looked_up(self) -> bool:
        """Whether the inputs are numbers of rows."""
        return self.inputs.ndim == 3

    @property
    def positions(self) -> int:
        """T."""
        return self.outputs.shape[3]

    def oriented(self, matrix: Array, exchanged: bool) -> Array:
        """A matrix of the layer as this use has it, inputs first."""
        return matrix.swapaxes(-1, -2) if exchanged else matrix


class LayerFactors(NamedTuple):
    """Of the gradients in one layer: factors for each use, and gradients `(B, K, G, I, O)` from elsewhere, if any."""

    uses: list[Factors]
    rest: Array | None


def layer_factors(
    plan: Plan,
    layers: Sequence[Layer],
    params: PyTree,
    batch: PyTree,
    cotangents: Callable[[PyTree, PyTree], PyTree],
    loss: Callable[[PyTree, PyTree], Array],
    noise: Array | None = None,
) -> list[LayerFactors]:
    """Run a batch, leaves `(B, ...)`, and pull back `cotangents(output, example)`, leaves `(K, *output)`.

    Where `loss(output, example)` is not finite, what is pulled back is NaN.  `noise` as in `capture`.
    """
    needed = {layer.kernel for layer in layers if layer.of_entries} | {
        name for layer in layers if layer.live for name in layer.names
    }
    shapes = dict(zip(plan.names, plan.shapes, strict=True))

    def one(example: PyTree, params: PyTree) -> tuple[list[Array], list[Array], dict[str, Array]]:
        captured = capture(plan, params, example, noise)
        outputs, live = jax.vmap(captured.pull)(cotangents(captured.output, example))
        found = {plan.names[index]: gradient for index, gradient in live.items()}
        count = tree.count(outputs) if outputs else tree.count(live) if live else 1
        zero = lambda name: jnp.zeros((count, *shapes[name].shape), tree.accumulation_dtype(shapes[name].dtype))
        live = {name: found[name] if name in found else zero(name) for name in needed}
        return captured.inputs, *spoilt((outputs, live), loss(captured.output, example))

    inputs, outputs, live = each(one, batch, params) if needed else jax.vmap(one, (0, None))(batch, params)
    return [_of_layer(layer, inputs, outputs, live) for layer in layers]


def _of_layer(layer: Layer, inputs: list[Array], outputs: list[Array], live: dict[str, Array]) -> LayerFactors:
    rest = None
    if layer.of_entries or layer.live:
        lead = live[layer.kernel].shape[:2]
        merged = lambda leaf: leaf.reshape((lead[0] * lead[1], *leaf.shape[2:]))
        flat = layer.matrix({name: merged(live[name]) for name in layer.names})
        rest = flat.reshape(lead + flat.shape[1:])
    if layer.of_entries and rest is not None:  # one input that is always one
        return LayerFactors([Factors(jnp.ones((len(rest), layer.groups, 1, 1), rest.dtype), rest)], None)
    uses = []
    for index, _ in layer.uses:
        x = inputs[index]
        if layer.bias is not None:
            x = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)
        uses.append(Factors(x, outputs[index]))
    return LayerFactors(uses, rest)


def einsum(pattern: str, *operands: Array) -> Array:
    """`jnp.einsum`, in float32 at least and at the highest precision."""
    dtype = tree.accumulation_dtype(*(x.dtype for x in operands))
    return jnp.einsum(pattern, *(x.astype(dtype) for x in operands), precision=tree.HIGHEST)


def gradient(layer: Layer, factors: LayerFactors) -> Array:
    """The gradients of a layer's matrices, `(B, K, G, I, O)`."""
    parts = [] if factors.rest is None else [factors.rest]
    for (_, exchanged), use in zip(layer.uses, factors.uses, strict=True):
        rows = layer.columns if exchanged else layer.rows
        parts.append(use.oriented(_outer(use, rows), exchanged))
    return sum(parts[1:], parts[0])


def _outer(use: Factors, rows: int) -> Array:
    """Sums over positions of outer products, `(B, K, G, I, O)`."""
    if not use.looked_up:
        return einsum("bgti,bkgto->bkgio", use.inputs, use.outputs)
    add = lambda numbers, d: jnp.zeros((rows, d.shape[-1]), d.dtype).at[numbers].add(d, mode="drop")
    by_group = jax.vmap(jax.vmap(add), (None, 0))  # over groups, then over cotangents
    return jax.vmap(by_group)(use.inputs, use.outputs)


def rotated(layer: Layer, factors: LayerFactors, left: Array | None, right: Array | None) -> LayerFactors:
    """The factors of `leftᵀ gradient right`, with orthogonal `(G, n, n)` or None for the identity."""
    uses = []
    for (_, exchanged), use in zip(layer.uses, factors.uses, strict=True):
        before, after = (right, left) if exchanged else (left, right)
        inputs = use.inputs if before is None else einsum("bgti,gij->bgtj", use.inputs, before)
        outputs = use.outputs if after is None else einsum("bkgto,gop->bkgtp", use.outputs, after)
        uses.append(Factors(inputs, outputs))
    return LayerFactors(uses, None if factors.rest is None else rotate(factors.rest, left, right))


def rotate(matrix: Array, left: Array | None, right: Array | None) -> Array:
    """`leftᵀ matrix right` for matrices `(..., G, I, O)`."""
    if left is not None:
        matrix = einsum("...gio,gij->...gjo", matrix, left)
    return matrix if right is None else einsum("...gio,gop->...gip", matrix, right)


def squares(layer: Layer, factors: LayerFactors, weights: Array) -> Array:
    """`sum_b w_b sum_k gradient²`, entry by entry, `(G, I, O)`."""
    if factors.rest is None and len(factors.uses) == 1:
        ((_, exchanged),), (use,) = layer.uses, factors.uses
        if use.positions == 1 and not use.looked_up:  # the square of one product is a product of squares
            inputs, outputs = use.inputs[:, :, 0] ** 2, jnp.sum(use.outputs[:, :, :, 0] ** 2, axis=1)
            return use.oriented(einsum("b,bgi,bgo->gio", weights, inputs, outputs), exchanged)
    return einsum("b,bkgio->gio", weights, gradient(layer, factors) ** 2)


class InBasis(NamedTuple):
    r"""An operator that is diagonal in a basis of a layer's matrices.

    $v \mapsto Q_{in} (d \odot (Q_{in}^\top v\, Q_{out})) Q_{out}^\top$

    Attributes:
      layer: The layer.
      q_in: `(G, I, I)`; None for the identity.
      q_out: `(G, O, O)`; None for the identity.
      values: d, `(G, I, O)`.
    """

    layer: Layer
    q_in: Array | None
    q_out: Array | None
    values: Array


def quadratic(layer: Layer, factors: LayerFactors, through: InBasis) -> Array:
    """Each gradient's inner product with itself, for the first cotangent, through an operator, `(B,)`."""
    factors, weights = rotated(layer, factors, through.q_in, through.q_out), through.values
    if factors.rest is None and len(factors.uses) == 1:
        ((_, exchanged),), (use,) = layer.uses, factors.uses
        if use.positions == 1 and not use.looked_up:  # the square of one product is a product of squares
            inputs, outputs = use.inputs[:, :, 0] ** 2, use.outputs[:, 0, :, 0] ** 2
            return einsum("bgi,bgo,gio->b", inputs, outputs, use.oriented(weights, exchanged))
    return einsum("bgio,gio->b", gradient(layer, factors)[:, 0] ** 2, weights)


def products(layer: Layer, factors: LayerFactors, vectors: Array) -> Array:
    """Inner products of the layer's gradients for the first cotangent with matrices `(Q, G, I, O)`, `(B, Q)`."""
    parts = [] if factors.rest is None else [einsum("bgio,qgio->bq", factors.rest[:, 0], vectors)]
    for (_, exchanged), use in zip(layer.uses, factors.uses, strict=True):
        parts.append(_use_products(use, use.oriented(vectors, exchanged)))
    return sum(parts[1:], parts[0])


def _use_products(use: Factors, vectors: Array) -> Array:
    inputs, outputs = use.inputs, use.outputs[:, 0]
    (queries, _, rows, columns), positions = vectors.shape, use.positions
    if use.looked_up:
        if queries * positions <= rows:
            picked = jax.vmap(lambda table, n: table.at[:, n].get(mode="fill", fill_value=0), (1, 1), 2)(
                vectors, inputs
            )
            return einsum("qbgto,bgto->bq", picked, outputs)
        return einsum("bgio,qgio->bq", _outer(use, rows)[:, 0], vectors)
    # Gradients once, or every position with every vector: whichever is less work; then the smallest thing to hold.
    if positions > 1 and positions * queries > positions + queries:
        return einsum("bgio,qgio->bq", _outer(use, rows)[:, 0], vectors)
    if queries * min(rows, columns) > rows * columns:
        return einsum("bgio,qgio->bq", einsum("bgti,bgto->bgio", inputs, outputs), vectors)
    if rows < columns:
        return einsum("gbtqi,bgti->bq", einsum("bgto,qgio->gbtqi", outputs, vectors), inputs)
    return einsum("gbtqo,bgto->bq", einsum("bgti,qgio->gbtqo", inputs, vectors), outputs)


def moments(
    layer: Layer, factors: LayerFactors, weights: Array, counted: Sequence[Array | None]
) -> dict[str, tuple[Array, Array, Array]]:
    """Second moments of both sides, undivided, summed over positions and cotangents.

    Args:
      layer: The layer.
      factors: Its factors.
      weights: `(B,)`.
      counted: For each use, which of its T positions count, `(B, T)`; all if None.

    Returns:
      For uses as they are, `"straight"` or `"exchanged"`: moments of the matrices' rows and columns, `(G, n, n)`, or
      `(G, n)` for a side that keeps its basis, and the weight of all positions that count.  `"elsewhere"`: of the
      gradients from elsewhere, products summed over the other side.
    """
    sums: dict[str, tuple[Array, Array, Array]] = {}
    if factors.rest is not None:
        rows = "b,bkgio,bkgio->gi" if layer.own_basis[0] else "b,bkgio,bkgjo->gij"
        columns = "b,bkgio,bkgio->go" if layer.own_basis[1] else "b,bkgio,bkgip->gop"
        squared = lambda pattern: einsum(pattern, weights, factors.rest, factors.rest)
        sums["elsewhere"] = (squared(rows), squared(columns), jnp.sum(weights))
    for (_, exchanged), use, counts in zip(layer.uses, factors.uses, counted, strict=True):
        own_in, own_out = layer.own_basis[::-1] if exchanged else layer.own_basis
        counts = jnp.ones((len(weights), use.positions), bool) if counts is None else counts
        positions = counts.astype(weights.dtype) * weights[:, None]
        if use.looked_up:
            inputs = _frequencies(use, positions, layer.columns if exchanged else layer.rows)
        else:
            inputs = einsum("bt,bgti,bgti->gi" if own_in else "bt,bgti,bgtj->gij", positions, use.inputs, use.inputs)
        pattern = "bt,bkgto,bkgto->go" if own_out else "bt,bkgto,bkgtp->gop"
        outputs = einsum(pattern, positions, use.outputs, use.outputs)
        rows, columns = (outputs, inputs) if exchanged else (inputs, outputs)
        new = (rows, columns, jnp.sum(positions))
        way = "exchanged" if exchanged else "straight"
        known = sums.get(way)
        sums[way] = new if known is None else (known[0] + new[0], known[1] + new[1], known[2] + new[2])
    return sums


def _frequencies(use: Factors, weights: Array, rows: int) -> Array:
    """How often each row is looked up, `(G, n)`: the second moment of one-hot inputs is diagonal."""
    add = lambda numbers: jnp.zeros(rows, weights.dtype).at[numbers].add(weights, mode="drop")
    return jax.vmap(add, 1)(use.inputs)


def held_entries(plan: Plan, layer: Layer, *, cotangents: int = 1, vectors: int = 0, whole: bool = False) -> int:
    """How many numbers one example holds of a layer, at most: to choose how many examples to take at once.

    Args:
      plan: Where the layer is from.
      layer: The layer.
      cotangents: K.
      vectors: How many vectors the gradients are multiplied with.
      whole: Whether gradients are formed where that takes more than factors.
    """
    size = layer.groups * layer.rows * layer.columns
    uses = [plan.uses[index] for index, _ in layer.uses] if not layer.of_entries else []
    positions = max([use.positions for use in uses], default=1)
    held = layer.groups * positions * (layer.rows + cotangents * layer.columns) + cotangents * size * layer.live
    if vectors:
        side = min(layer.rows, layer.columns)
        held += min(size, layer.groups * vectors * positions * side)
    return held + cotangents * size * (whole and (positions > 1 or len(uses) > 1 or layer.live))
