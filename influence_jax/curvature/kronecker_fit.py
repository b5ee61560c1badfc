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
from ..batching import chunk_in_cache
from ..capture import (
    Factors,
    Layer,
    LayerFactors,
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
from .masks import Mask, Named, counted, disagreeing, kept, of_layers, silence, sizes


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What shapes the programs of a fit.

    Attributes:
      labels: Which loss gradients: `"exact"`, `"sampled"` or `"empirical"`.
      mask: Which positions of an example count, by layers or for those that agree with it; all if None.
      max_side: A side of a layer's matrix longer than this keeps its own basis.
    """

    labels: str
    mask: Mask | Named | None
    max_side: int


@dataclass
class LayerMoments:
    """Sums over examples for one layer: of both sides' outer products, and of what they are to be divided by.

    Attributes:
      layer: The layer.
      sums: As `capture.moments` gives them.
      leaks: In how many examples the loss depends on positions that a mask leaves out; None if nothing was to be
        looked at.
      silence: Of each use that has positions, what `masks.silence` says of them; not of what a mask names.
    """

    layer: Layer = static()
    sums: dict[str, tuple[Array, Array, Array]]
    leaks: Array | None
    silence: list[Array | None]


class _Captured:
    """The layers of a model, and what each of its examples holds of them."""

    def __init__(self, op: EmpiricalFisher, recipe: Recipe) -> None:
        self.objective, self.params, self.recipe = as_objective(op.objective), tree.promote(op.params), recipe
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), op.data)
        fn = captured_function(self.objective)
        self.plan, self.layers = arrange(lambda p, z: fn(p, z.example), self.params, shapes, recipe.max_side)
        self.masks = of_layers(recipe.mask, self.plan, self.layers, shapes.example)

    def chunk(self, *, whole: bool) -> int:
        """Examples at once."""
        columns = tree.size(self.plan.output) if self.recipe.labels == "exact" else 1
        held = (held_entries(self.plan, layer, cotangents=columns, whole=whole) for layer in self.layers)
        return chunk_in_cache(sum(held))

    def factors(self, batch: Keyed, noise: Array | None = None) -> list[tuple[Layer, LayerFactors, list[Array | None]]]:
        """Every layer, inputs and output cotangents of its uses, and which of their positions count."""
        pull = lambda out, z: _cotangents(self.objective, self.recipe, out, z)
        found = layer_factors(self.plan, self.layers, self.params, batch, pull, partial(_loss, self.objective), noise)
        return list(zip(self.layers, found, counted(self.masks, batch.example), strict=True))


def heard_at(op: EmpiricalFisher, recipe: Recipe, noise: Array) -> list[list[Array | None]]:
    """Tell at which positions of each use the loss has a gradient, `(B, T)`, if noise is added to all outputs of uses.

    What a mask leaves out has none whatever the model computes, unlike what a ReLU or a maximum leaves out.
    """
    model = _Captured(op, dataclasses.replace(recipe, labels="empirical"))

    def of_use(use: Factors) -> Array | None:
        size = sizes(use)
        return None if use.positions == 1 else jnp.isfinite(size) & (size != 0)

    found = model.factors(op.data, noise)
    return [[] if layer.of_entries else [of_use(use) for use in factors.uses] for layer, factors, _ in found]


def kept_at(op: EmpiricalFisher, recipe: Recipe) -> list[list[Array | None]]:
    """Tell which positions of each use the mask keeps, `(B, T)`, as `heard_at`; None where there is no such axis."""
    model = _Captured(op, recipe)
    kept = counted(model.masks, op.data.example)
    return [[] if layer.of_entries else of_uses for layer, of_uses in zip(model.layers, kept, strict=True)]


def moment_sums(op: EmpiricalFisher, recipe: Recipe) -> list[LayerMoments]:
    """The first pass, undivided."""
    model = _Captured(op, recipe)

    def one_chunk(batch: Keyed, weights: Array) -> list[LayerMoments]:
        def of_layer(layer: Layer, factors: LayerFactors, counts: Sequence[Array | None]) -> LayerMoments:
            sums = moments(layer, kept(factors, counts), weights, counts)
            named = isinstance(recipe.mask, Named)  # and so taken at its word
            leaks = None if named else disagreeing(factors, counts, weights)
            pairs = [] if named or layer.of_entries else list(zip(factors.uses, counts, strict=True))
            heard = [silence(use, of_use, weights) for use, of_use in pairs if not recipe.mask or of_use is not None]
            return LayerMoments(layer, sums, leaks, heard)

        return [of_layer(*each) for each in model.factors(batch)]

    return sum_over_data(op, one_chunk, op.chunk or model.chunk(whole=False))[0]


def eigenbases(params: PyTree, summed: Sequence[LayerMoments]) -> Kronecker:
    """K-FAC from the sums of the first pass."""
    return Kronecker(params, tuple(_eigenbasis(x.layer, x.sums) for x in summed))


def square_sums(op: EmpiricalFisher, recipe: Recipe, fitted: Kronecker) -> tuple[list[Array], Array]:
    """The second pass: squares of gradients in the basis, and the sum of the weights, undivided."""
    model = _Captured(op, recipe)

    def one_chunk(batch: Keyed, weights: Array) -> list[Array]:
        pairs = zip(fitted.layers, model.factors(batch), strict=True)
        return [squares(la, rotated(la, kept(f, c), x.q_in, x.q_out), weights) for x, (la, f, c) in pairs]

    return sum_over_data(op, one_chunk, op.chunk or model.chunk(whole=True))


def corrected(fitted: Kronecker, summed: Sequence[Array], weight: Array) -> Kronecker:
    """EK-FAC from K-FAC and the sums of the second pass."""
    values = divide(list(summed), weight)
    layers = (dataclasses.replace(x, values=v) for x, v in zip(fitted.layers, values, strict=True))
    return Kronecker(fitted.params, tuple(layers))


def captured_function(objective: Objective | LossOnly) -> Callable[[PyTree, PyTree], PyTree]:
    """What is captured: the model's output, or of a bare function the loss."""
    return objective if isinstance(objective, LossOnly) else partial(floating_output, objective)


def _cotangents(objective: Objective | LossOnly, recipe: Recipe, out: PyTree, example: Keyed) -> PyTree:
    """Loss gradients in the output, leaves `(K, *output)`."""
    if isinstance(objective, LossOnly):
        return jnp.ones(1, out.dtype)
    if recipe.labels == "empirical":
        return tree.stack_of_one(jax.grad(lambda o: objective.cost(o, example.example))(out))
    if recipe.labels == "sampled":
        return tree.unflatten(drawn_cotangents(objective, out, example, 1, recipe.mask), out)
    instead = "pass labels='sampled' and give Objective sample=influence_jax.softmax_labels('y'), or labels='empirical'"
    return tree.unflatten(vector_square_root(objective, out, example.example, instead).T, out)


def _loss(objective: Objective | LossOnly, out: PyTree, example: Keyed) -> Array:
    """Return the loss of one example, from what is captured."""
    return out if isinstance(objective, LossOnly) else objective.cost(out, example.example)


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
