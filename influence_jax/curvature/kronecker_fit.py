r"""The two passes of a Kronecker-factored fit: moments of every layer, eigenvectors, and what is along them.

Each pass is a sum over examples, so whoever reads data batch by batch adds the sums up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from .. import tree
from .._pytree import dataclass, static
from .._typing import Array, PyTree
from .._words import ask
from ..batching import chunk_in_cache
from ..capture import (
    Layer,
    LayerFactors,
    Plan,
    arrange,
    einsum,
    held_entries,
    layer_factors,
    moments,
    rotated,
    squares,
)
from ..objective import LossOnly, Objective, as_objective, floating_output
from .capabilities import symmetric
from .exact import EmpiricalFisher, divide, sum_over_data
from .fisher import Keyed, drawn_cotangents, vector_square_root
from .kronecker import Kronecker, KroneckerLayer

Mask = Callable[[PyTree], Array]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What shapes the programs of a fit.

    Attributes:
      labels: Which loss gradients: `"exact"`, `"sampled"` or `"empirical"`.
      mask: Which positions of an example count; all if None.
      max_side: A side of a layer's matrix longer than this keeps its own basis.
    """

    labels: str
    mask: Mask | None
    max_side: int


@dataclass
class LayerMoments:
    """Sums over examples for one layer: of both sides' outer products, and of what they are to be divided by."""

    layer: Layer = static()
    sums: dict[str, tuple[Array, Array, Array]]


class _Captured:
    """The layers of a model, and what each of its examples holds of them."""

    def __init__(self, op: EmpiricalFisher, recipe: Recipe) -> None:
        self.objective, self.params, self.recipe = as_objective(op.objective), tree.promote(op.params), recipe
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), op.data)
        fn = captured_function(self.objective)
        self.plan, self.layers = arrange(lambda p, z: fn(p, z.example), self.params, shapes, recipe.max_side)
        if recipe.mask is not None:
            _check_mask(recipe.mask, self.plan, shapes.example)

    def chunk(self, *, whole: bool) -> int:
        """Examples at once."""
        columns = tree.size(self.plan.output) if self.recipe.labels == "exact" else 1
        held = (held_entries(self.plan, layer, cotangents=columns, whole=whole) for layer in self.layers)
        return chunk_in_cache(sum(held))

    def factors(self, batch: Keyed) -> list[LayerFactors]:
        """Inputs and output cotangents of every layer."""
        labels, mask = self.recipe.labels, self.recipe.mask
        pull = lambda out, z: _masked(_cotangents(self.objective, labels, out, z), out, mask, z.example)
        return layer_factors(self.plan, self.layers, self.params, batch, pull)


def moment_sums(op: EmpiricalFisher, recipe: Recipe) -> list[LayerMoments]:
    """The first pass, undivided."""
    model = _Captured(op, recipe)

    def one_chunk(batch: Keyed, weights: Array) -> list[LayerMoments]:
        counted = partial(_counted, recipe.mask, batch.example)
        pairs = zip(model.layers, model.factors(batch), strict=True)
        return [LayerMoments(layer, moments(layer, f, weights, counted)) for layer, f in pairs]

    return sum_over_data(op, one_chunk, op.chunk or model.chunk(whole=False))[0]


def eigenbases(params: PyTree, summed: Sequence[LayerMoments]) -> Kronecker:
    """K-FAC from the sums of the first pass."""
    return Kronecker(params, tuple(_eigenbasis(x.layer, x.sums) for x in summed))


def square_sums(op: EmpiricalFisher, recipe: Recipe, fitted: Kronecker) -> tuple[list[Array], Array]:
    """The second pass: squares of gradients in the basis, and the sum of the weights, undivided."""
    model = _Captured(op, recipe)

    def one_chunk(batch: Keyed, weights: Array) -> list[Array]:
        pairs = list(zip(fitted.layers, model.factors(batch), strict=True))
        return [squares(x.layer, rotated(x.layer, f, x.q_in, x.q_out), weights) for x, f in pairs]

    return sum_over_data(op, one_chunk, op.chunk or model.chunk(whole=True))


def corrected(fitted: Kronecker, summed: Sequence[Array], weight: Array) -> Kronecker:
    """EK-FAC from K-FAC and the sums of the second pass."""
    values = divide(list(summed), weight)
    layers = (dataclasses.replace(x, values=v) for x, v in zip(fitted.layers, values, strict=True))
    return Kronecker(fitted.params, tuple(layers))


def captured_function(objective: Objective | LossOnly) -> Callable[[PyTree, PyTree], PyTree]:
    """What is captured: the model's output, or of a bare function the loss."""
    return objective if isinstance(objective, LossOnly) else partial(floating_output, objective)


def _cotangents(objective: Objective | LossOnly, labels: str, out: PyTree, example: Keyed) -> PyTree:
    """Loss gradients in the output, leaves `(K, *output)`."""
    if isinstance(objective, LossOnly):
        return jnp.ones(1, out.dtype)
    if labels == "empirical":
        return tree.stack_of_one(jax.grad(lambda o: objective.cost(o, example.example))(out))
    if labels == "sampled":
        return tree.unflatten(drawn_cotangents(objective, out, example, samples=1), out)
    instead = "pass labels='sampled', with a sample function for outputs of several axes, or labels='empirical'"
    return tree.unflatten(vector_square_root(objective, out, example.example, instead).T, out)


def _masked(cotangents: PyTree, out: PyTree, mask: Mask | None, example: PyTree) -> PyTree:
    """Cotangents, zero at positions that do not count."""
    if mask is None:
        return cotangents
    counts = _positions(mask, example)

    def leaf_masked(d: Array, like: Array) -> Array:
        if like.ndim < 2 or like.shape[0] != counts.shape[0]:
            return d
        return d * counts.astype(d.dtype).reshape((1, -1) + (1,) * (like.ndim - 1))

    return jax.tree.map(leaf_masked, cotangents, out)


def _positions(mask: Mask, example: PyTree) -> Array:
    counts = ask("mask", mask, {"example": example}, "it returns one entry per position of ONE example, (T,)")
    if counts is None or isinstance(counts, str):
        raise TypeError(f"mask: returned a {type(counts).__name__} for one example, expected an array (T,)")
    counts = jnp.asarray(counts).astype(bool)
    if counts.ndim != 1:
        raise ValueError(f"mask: returned shape {counts.shape} for one example, expected (T,), one entry per position")
    return counts


def _check_mask(mask: Mask, plan: Plan, example: PyTree) -> None:
    """Raise if nothing in the model has as many positions as the mask."""
    (length,) = jax.eval_shape(partial(_positions, mask), example).shape
    positions = {use.positions for use in plan.uses}
    positions |= {leaf.shape[0] for leaf in jax.tree.leaves(plan.output) if leaf.ndim > 1}
    if any(leaf.shape == (length,) for leaf in jax.tree.leaves(plan.output)):
        raise ValueError(
            f"mask: the output of shape ({length},) may have an entry for each position, or be something else of that "
            f"length; give positions an axis of their own, an output of shape ({length}, 1)"
        )
    if length not in positions:
        raise ValueError(
            f"mask: returned {length} entries for one example, but the model's layers and outputs have "
            f"{sorted(positions)} positions; return one entry for each of them"
        )


def _counted(mask: Mask | None, examples: PyTree, positions: int) -> Array:
    """Which positions count, `(B, T)`."""
    count = tree.count(examples)
    if mask is not None:
        counts = jax.vmap(partial(_positions, mask))(examples)
        if counts.shape[1] == positions:
            return counts
    return jnp.ones((count, positions), bool)


def _eigenbasis(layer: Layer, sums: dict[str, tuple[Array, Array, Array]]) -> KroneckerLayer:
    """Eigenvectors of both sides' moments, and products of their eigenvalues."""
    sums = {way: (rows, columns, jnp.where(count > 0, count, 1)) for way, (rows, columns, count) in sums.items()}
    if "elsewhere" in sums:  # both sides are sums over the other: of one of them the trace is enough
        rows, columns, count = sums["elsewhere"]
        trace = _traces(columns)
        scale = jnp.where(trace > 0, trace, 1).reshape((-1,) + (1,) * (columns.ndim - 1))
        sums["elsewhere"] = (rows, columns / scale * count.astype(columns.dtype), count)
    means = [
        (rows / count.astype(rows.dtype), columns / count.astype(rows.dtype)) for rows, columns, count in sums.values()
    ]
    rows, columns = means[0] if len(means) == 1 else _nearest_product(means)
    (q_in, rows), (q_out, columns) = _eigenvectors(rows), _eigenvectors(columns)
    return KroneckerLayer(layer, q_in, q_out, rows[:, :, None] * columns[:, None, :])


def _nearest_product(means: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    r"""One Kronecker product for the sum of several, by partial traces, which keeps the trace.

    For a parameter that is used both ways, as an embedding tied to the output layer: the two uses' moments differ by
    orders of magnitude, and neither may drown in the other's.
    """
    traces = [(_traces(rows), _traces(columns)) for rows, columns in means]
    total = jnp.sum(jnp.stack([left * right for left, right in traces]), axis=0)
    root = jnp.sqrt(jnp.where(total > 0, total, 1))
    like = lambda factor, x: factor.reshape((-1,) + (1,) * (x.ndim - 1))
    rows = [like(right / root, x) * x for (x, _), (_, right) in zip(means, traces, strict=True)]
    columns = [like(left / root, x) * x for (_, x), (left, _) in zip(means, traces, strict=True)]
    return jnp.sum(jnp.stack(rows), axis=0), jnp.sum(jnp.stack(columns), axis=0)


def _traces(moment: Array) -> Array:
    return jnp.sum(moment, axis=1) if moment.ndim == 2 else jnp.trace(moment, axis1=1, axis2=2)


def _eigenvectors(moment: Array) -> tuple[Array | None, Array]:
    """Eigenvectors `(G, n, n)` and eigenvalues `(G, n)`; a diagonal `(G, n)` is its own eigenvalues."""
    if moment.ndim == 2:
        return None, moment
    vectors, values = _eigh(moment)
    return vectors, jnp.maximum(values, 0)


@jax.custom_jvp
def _eigh(moment: Array) -> tuple[Array, Array]:
    """Eigenvectors and eigenvalues, in float64 wherever the hardware has it.

    Single precision turns the many small eigenvectors into each other, which moved scores by 1e-4 for a side of 256.
    """
    if jax.default_backend() == "tpu":
        values, vectors = jnp.linalg.eigh(symmetric(moment))
        return vectors, values
    with jax.enable_x64(True):
        values, vectors = jnp.linalg.eigh(symmetric(moment.astype(np.float64)))
        return vectors.astype(moment.dtype), values.astype(moment.dtype)


@_eigh.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """In the precision of the moment; equal eigenvalues, whose vectors are arbitrary, do not turn into each other."""
    vectors, values = _eigh(*primals)
    inner = einsum("gji,gjk,gkl->gil", vectors, symmetric(tangents[0]), vectors).astype(values.dtype)
    gaps = values[:, None, :] - values[:, :, None]
    turn = jnp.where(gaps == 0, 0, inner / jnp.where(gaps == 0, 1, gaps))
    moved = einsum("gij,gjk->gik", vectors, turn).astype(vectors.dtype)
    return (vectors, values), (moved, jnp.diagonal(inner, axis1=1, axis2=2))
