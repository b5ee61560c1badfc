r"""Scores from factors: inner products of solved vectors with per-example gradients, never held all at once."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _reprs, tree
from ._mesh import compiled
from ._typing import Array, PyTree
from .batching import chunk_for, chunk_in_cache, map_chunks, map_over, map_rows, scan_chunks
from .blocks import Block
from .capture import InBasis, Layer, arrange, held_entries, layer_factors, products, quadratic
from .gradients import _jacobian_product, _mixed_product, directional, matching, spoilt
from .objective import LossOnly, Objective, floating_output

# Up to this many factors, forward-mode passes are the cheaper way.
DIRECTIONAL = 2


class InfluenceMode(enum.StrEnum):
    """What is done to a training example: weighted up, or its input perturbed.

    Example:
      >>> InfluenceMode("up") is InfluenceMode.Up, str(InfluenceMode.Perturbation)
      (True, 'perturbation')
    """

    Up = "up"
    Perturbation = "perturbation"


Mode: TypeAlias = str | InfluenceMode
UpMode: TypeAlias = Literal["up", InfluenceMode.Up]


class TopK(NamedTuple):
    """The most helpful training examples of each query.

    A positive score means that training on the example lowers the query's loss.

    Attributes:
      values: Scores `(Q, k)`, descending.
      indices: Places in the training batch, `(Q, k)` int32.

    Example:
      >>> TopK(values=np.array([[2.5, -1.0]]), indices=np.array([[4, 0]]))
      TopK(1 query, k=2, values -1 to 2.5)
    """

    values: Array
    indices: Array

    def __repr__(self) -> str:
        shape = getattr(self.values, "shape", ())
        axes = [_reprs.counted(shape[0], "query"), f"k={shape[1]}"] if len(shape) == 2 else []
        return _reprs.call(self, *axes, f"values {_reprs.span(self.values, 3)}".rstrip())


def inner_products(
    objective: Objective | LossOnly,
    params: PyTree,
    factors: PyTree,
    batch: PyTree,
    chunk: int | None,
    rhs_chunk: int | None,
) -> Array:
    """Inner products of factors and per-example gradients, `(N, Q)`.

    One forward-mode pass per factor, or, of more than a few, one run of each example whose captured inputs and
    cotangents are contracted with all factors; gradients are formed of single layers at most, where that is less work.
    """
    if tree.count(factors) <= DIRECTIONAL:
        return finite_or_nan(_jacobian_product(objective, params, batch, factors, chunk, rhs_chunk))
    everything = tuple(name for name, _ in tree.named_leaves(params))
    return inner_products_by_block(objective, params, factors, batch, (everything,), chunk)[0]


def inner_products_by_block(
    objective: Objective | LossOnly,
    params: PyTree,
    factors: PyTree,
    batch: PyTree,
    groups: Sequence[Block],
    chunk: int | None,
) -> tuple[Array, ...]:
    """What each of several blocks of leaves contributes to the inner products, `(N, Q)` each, in one pass for all."""
    wide = tree.promote(params)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    plan, layers = arrange(objective, wide, example)
    leaves = dict(tree.named_leaves(tree.promote(factors)))
    vectors = [[(layer, _matrix_within(layer, leaves, group)) for layer in layers] for group in groups]

    def one_chunk(part: PyTree) -> tuple[Array, ...]:
        found = layer_factors(plan, layers, wide, part, lambda loss, _: jnp.ones(1, loss.dtype), lambda loss, _: loss)
        of_group = lambda pairs: [products(la, f, v) for f, (la, v) in zip(found, pairs, strict=True) if v is not None]
        return tuple(tree.total(of_group(pairs)) for pairs in vectors)

    queries = tree.count(factors)
    largest = max(held_entries(plan, layer, vectors=queries) for layer in layers)
    held = sum(held_entries(plan, layer) for layer in layers)
    fits = min(chunk_in_cache(held, wanted=queries), chunk_for(held + largest))
    return jax.tree.map(finite_or_nan, map_chunks(one_chunk, batch, chunk=chunk or fits))


def _matrix_within(layer: Layer, leaves: Mapping[str, Array], group: Block) -> Array | None:
    """Return a layer's matrix of vectors that are zero outside of some leaves; None if it has none of these."""
    inside = set(layer.names) & set(group)
    if not inside:
        return None
    return layer.matrix({n: leaves[n] if n in inside else jnp.zeros_like(leaves[n]) for n in layer.names})


def squares_in_basis(
    objective: Objective | LossOnly,
    params: PyTree,
    fitted: Sequence[InBasis],
    batch: PyTree,
    chunk: int | None,
) -> Array | None:
    r"""Inner products of gradients with themselves through a Kronecker-factored operator, `(N,)`.

    $\sum_{io} d_{io} (Q_{in}^\top G_n Q_{out})_{io}^2$, from captured inputs and cotangents, of which no gradient is
    made where an example uses a matrix once.  None if the loss uses other matrices than those fitted.
    """
    wide = tree.promote(params)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    plan, layers = arrange(objective, wide, example)
    form = lambda layer: (layer.view, layer.shape, layer.bias)
    found = {part.layer.kernel: part for part in fitted}
    if {layer.kernel: form(layer) for layer in layers} != {name: form(part.layer) for name, part in found.items()}:
        return None
    turned = lambda part: (part.q_in is not None, part.q_out is not None)
    sides = [side for la in layers for side in zip(la.own_basis, turned(found[la.kernel]), strict=True)]
    if (True, True) in sides:
        return None  # here rows are looked up, whose numbers cannot be rotated

    def one_chunk(part: PyTree) -> Array:
        held = layer_factors(plan, layers, wide, part, lambda loss, _: jnp.ones(1, loss.dtype), lambda loss, _: loss)
        return tree.total([quadratic(la, f, found[la.kernel]) for la, f in zip(layers, held, strict=True)])

    fits = chunk_in_cache(sum(held_entries(plan, layer, whole=True) for layer in layers))
    return map_chunks(one_chunk, batch, chunk=chunk or fits)


def finite_or_nan(scores: Array) -> Array:
    """Turn scores of gradients that are infinite somewhere, by which they may be infinite or NaN, into NaN."""
    return scores * jnp.where(jnp.isfinite(scores), 1, jnp.nan).astype(scores.dtype)


@partial(compiled, static_argnames=("wrt", "chunk", "rhs_chunk"))
def perturbed(
    objective: Objective | LossOnly,
    params: PyTree,
    factors: PyTree,
    batch: PyTree,
    wrt: str | int,
    chunk: int | None,
    rhs_chunk: int | None,
) -> PyTree:
    """Derivatives of the inner products in a part of each example, leaves `(Q, N, *x.shape)`."""
    products = _mixed_product(objective, params, batch, factors, wrt, chunk, rhs_chunk)
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), products)


def check_positions(objective: Objective, params: PyTree, batch: PyTree) -> None:
    """Raise unless the model's output has a row for each position."""
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    output = jax.eval_shape(objective.output, tree.shapes(params), example)
    if not isinstance(output, jax.ShapeDtypeStruct) or len(output.shape) != 2:
        got = jax.tree.map(jnp.shape, output)
        raise ValueError(
            f"objective: its output has shape {got} for one example, expected one array (T, C), a row for each "
            "position; use influences for scores of whole examples"
        )


@partial(compiled, static_argnames=("chunk", "rhs_chunk"))
def by_position(
    objective: Objective, params: PyTree, factors: PyTree, batch: PyTree, chunk: int | None, rhs_chunk: int | None
) -> Array:
    """What each row of the output contributes to the inner products, `(Q, N, T)`."""
    params, factors = matching(params, tree.promote(factors))

    def one(example: PyTree) -> Array:
        out = floating_output(objective, params, example)
        value, slope = jax.value_and_grad(lambda out: objective.cost(out, example))(out)

        def along(vector: PyTree) -> Array:
            tangent = directional(lambda p: floating_output(objective, p, example), params, vector)[1]
            by_row = jnp.sum(tree.promote(slope) * tree.promote(tangent), axis=-1)
            return finite_or_nan(spoilt(by_row, value))

        return map_rows(along, factors, rhs_chunk)

    return jnp.swapaxes(map_over(one, batch, chunk=chunk), 0, 1)


@partial(compiled, static_argnames=("k", "chunk", "rhs_chunk"))
def top_k(
    objective: Objective | LossOnly,
    params: PyTree,
    factors: PyTree,
    batch: PyTree,
    k: int,
    chunk: int | None,
    rhs_chunk: int | None,
) -> tuple[TopK, Array]:
    """The k largest inner products of each factor, merged chunk by chunk, and how many examples have no finite one."""
    total, queries = tree.count(batch), tree.count(factors)

    def merge(carry: tuple[Best, Array], part: PyTree, indices: Array) -> tuple[Best, Array]:
        scores = inner_products(objective, params, factors, part, chunk, rhs_chunk).T
        unsound = jnp.all(jnp.isnan(scores), axis=0) & (indices < total)
        return merge_best(carry[0], scores, indices, indices >= total), carry[1] + jnp.sum(unsound, dtype=jnp.int32)

    dtype = tree.accumulation_dtype(*(leaf.dtype for leaf in jax.tree.leaves(factors)))
    start = Best.none(queries, k, dtype), jnp.zeros((), jnp.int32)
    best, unsound = scan_chunks(merge, start, batch, chunk=chunk)
    return best.top_k(), unsound


class Best(NamedTuple):
    """The best of the examples seen so far, `(Q, k)` each; columns are in the order of `top_k`."""

    missing: Array  # bool: padding, or fewer than k seen
    losses: Array  # scores with the other sign, so that ascending is best first
    places: Array  # int32

    @staticmethod
    def none(queries: int, k: int, dtype: np.dtype) -> Best:
        """Before any example."""
        last = jnp.full((queries, k), jnp.iinfo(jnp.int32).max, jnp.int32)
        return Best(jnp.ones((queries, k), bool), jnp.zeros((queries, k), dtype), last)

    def top_k(self) -> TopK:
        """As scores."""
        return TopK(-self.losses, self.places)


def merge_best(best: Best, scores: Array, places: Array, padding: Array) -> Best:
    """The best with more examples: scores `(Q, N)`, their places and whether they are padding `(N,)`."""
    seen = (jnp.broadcast_to(padding, scores.shape), -scores, jnp.broadcast_to(places, scores.shape))
    together = [jnp.concatenate(pair, axis=1) for pair in zip(best, seen, strict=True)]
    # Real examples before padding, then by score with NaN last, then the lower index, whatever the chunks.
    kept = lax.sort(together, dimension=1, num_keys=3)
    return Best(*(column[:, : best.places.shape[1]] for column in kept))


def as_mode(mode: Any) -> InfluenceMode:
    """The influence mode, from itself or its name.

    Raises:
      ValueError: If there is no such mode.
    """
    if isinstance(mode, str) and mode in tuple(InfluenceMode):
        return InfluenceMode(mode)
    raise ValueError(f"mode: got {mode!r}, expected one of {[str(m) for m in InfluenceMode]}")
