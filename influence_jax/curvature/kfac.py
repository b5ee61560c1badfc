r"""Fitting Kronecker-factored curvature: K-FAC and EK-FAC of any model that JAX can trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from .. import tree
from .._typing import Array, Key, LossFunction, PyTree
from ..batching import as_batch, check_finite, check_key, check_positive, chunk_in_cache
from ..capture import (
    MAX_SIDE,
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
from ..objective import LossOnly, Objective, as_objective, check_hashable, floating_output
from .capabilities import symmetric
from .exact import EmpiricalFisher, divide, sum_over_data
from .fisher import Keyed, drawn_cotangents, vector_square_root
from .kronecker import Kronecker, KroneckerLayer

LABELS = ("exact", "sampled", "empirical")
Mask = Callable[[PyTree], Array]


def kfac(
    objective: Objective | LossFunction,
    params: PyTree,
    data: PyTree,
    *,
    weights: Array | None = None,
    labels: str = "exact",
    key: Key | None = None,
    mask: Mask | None = None,
    max_side: int = MAX_SIDE,
    chunk: int | None = None,
) -> Kronecker:
    r"""Kronecker-factored Fisher matrix: for every layer, $A \otimes S$.

    $A = \frac1n\sum a a^\top$ over inputs and $S = \frac1n\sum s s^\top$ over output cotangents of the layer, both
    averaged over the n positions of all examples; a bias is one more input that is always one.  Layers are found in
    the jaxpr: products, convolutions and look-ups with a parameter, wherever they are; see `coverage`.  A parameter
    used in another way is a block of its own: exact up to 1024 entries, its diagonal beyond.

    Args:
      objective: An `Objective`; a bare `f(params, example) -> scalar` with `labels="empirical"` only.
      params: Leaves `(*leaf)`, real floating.
      data: Leaves `(N, ...)`.
      weights: `(N,)`, non-negative; ones if None.
      labels: Which loss gradients s come from.  `"exact"`: all columns of the square root of the loss Hessian in the
        output, an average over the model's own labels; for outputs of one axis and at most 1024 entries.
        `"sampled"`: labels drawn from the model, one per example and position.  `"empirical"`: those of the data.
      key: For `"sampled"`.
      mask: `mask(example) -> (T,)`, which of T positions count; padding does not.  For uses and outputs with T
        positions.  Static.
      max_side: A side of a layer's matrix longer than this keeps its own basis.
      chunk: Examples at once; chosen from the sizes if None.

    Returns:
      A `Kronecker` operator, to be inverted by `Direct`.

    Raises:
      TypeError, ValueError: If an argument is not of that form, or with `"exact"` the loss of an example is not convex
        in the output.

    Example:
      >>> import influence_jax as ij
      >>> objective = ij.Objective(lambda p, z: z["x"] @ p["w"], lambda out, z: 0.5 * jnp.sum((out - z["y"]) ** 2))
      >>> params, data = {"w": jnp.ones((2, 1))}, {"x": jnp.eye(2), "y": jnp.zeros((2, 1))}
      >>> ij.kfac(objective, params, data).mv({"w": jnp.array([[2.0], [4.0]])})["w"].round(4).tolist()
      [[1.0], [2.0]]

    Reference: Martens & Grosse 2015, arXiv:1503.05671; Grosse & Martens 2016, arXiv:1602.01407; positions are averaged
    in A and in S, as in Grosse et al. 2023, arXiv:2308.03296.
    """
    return _checked_fit(objective, params, data, weights, labels, key, mask, max_side, chunk, corrected=False)


def ekfac(
    objective: Objective | LossFunction,
    params: PyTree,
    data: PyTree,
    *,
    weights: Array | None = None,
    labels: str = "exact",
    key: Key | None = None,
    mask: Mask | None = None,
    max_side: int = MAX_SIDE,
    chunk: int | None = None,
) -> Kronecker:
    r"""Eigenvalue-corrected K-FAC: its eigenvectors, and the right second moment along each.

    $\Lambda_{io} = \frac1N\sum_n \big(Q_A^\top G_n Q_S\big)_{io}^2$ with the gradient $G_n$ of a whole example: so
    the diagonal of the Fisher matrix in the basis is exact, and so is its trace, however many positions share a
    parameter.  Takes a second pass over the data.

    Args:
      objective: An `Objective`; a bare `f(params, example) -> scalar` with `labels="empirical"` only.
      params: Leaves `(*leaf)`, real floating.
      data: Leaves `(N, ...)`.
      weights: `(N,)`, non-negative; ones if None.
      labels: `"exact"`, `"sampled"` or `"empirical"`, as in `kfac`.
      key: For `"sampled"`.
      mask: `mask(example) -> (T,)`, which of T positions count, as in `kfac`.
      max_side: A side of a layer's matrix longer than this keeps its own basis.
      chunk: Examples at once; chosen from the sizes if None.

    Returns:
      A `Kronecker` operator, to be inverted by `Direct`.

    Raises:
      TypeError, ValueError: As `kfac`.

    Example:
      >>> import influence_jax as ij
      >>> objective = ij.Objective(lambda p, z: z["x"] @ p["w"], lambda out, z: 0.5 * jnp.sum((out - z["y"]) ** 2))
      >>> params, data = {"w": jnp.ones((2, 1))}, {"x": jnp.eye(2), "y": jnp.zeros((2, 1))}
      >>> curvature = ij.ekfac(objective, params, data)
      >>> ij.invert(curvature, ij.Direct(0.5)).mv({"w": jnp.array([[2.0], [4.0]])})["w"].round(4).tolist()
      [[2.0], [4.0]]

    Reference: George et al. 2018, arXiv:1806.03884, eq. 10; Grosse et al. 2023, arXiv:2308.03296, section 3.1.
    """
    return _checked_fit(objective, params, data, weights, labels, key, mask, max_side, chunk, corrected=True)


def _checked_fit(
    objective: Objective | LossFunction,
    params: PyTree,
    data: PyTree,
    weights: Array | None,
    labels: str,
    key: Key | None,
    mask: Mask | None,
    max_side: int,
    chunk: int | None,
    *,
    corrected: bool,
) -> Kronecker:
    if labels not in LABELS:
        raise ValueError(f"labels: got {labels!r}, expected one of {list(LABELS)}")
    if labels != "empirical" and not isinstance(as_objective(objective), Objective):
        raise TypeError(
            f"objective: labels={labels!r} got the bare function {objective!r}, expected an Objective(predict, loss), "
            "because labels are drawn from the model's output; or pass labels='empirical', those of the data"
        )
    if mask is not None:
        if not callable(mask):
            raise TypeError(f"mask: got {mask!r}, expected a function mask(example) -> (T,), or None")
        check_hashable(mask, "mask")
    check_positive(max_side, "max_side")
    data, keys = as_batch(data, "data"), cast(Key, None)  # only drawn labels look at keys
    if labels == "sampled":
        keys = jax.random.split(check_key(key, 'labels="sampled" draws labels from the model'), tree.count(data))
    op = EmpiricalFisher(objective, params, Keyed(data, keys), weights=weights, chunk=chunk)
    curvature = _fit(op, labels, mask, max_side, corrected)
    if not _finite(curvature):
        check_finite(op.params, "params")
        check_finite(data, "data")
    _check(curvature, labels)
    return curvature


def _finite(curvature: Kronecker) -> bool:
    """Whether all eigenvalues are, as far as is known on the host."""
    values = [layer.values for layer in curvature.layers if not isinstance(layer.values, jax.core.Tracer)]
    return all(bool(jnp.all(jnp.isfinite(x))) for x in values)


def _check(curvature: Kronecker, labels: str) -> None:
    """Raise, on the host, if a layer's curvature is not finite, naming the layer."""
    for layer in curvature.layers:
        if not _finite(Kronecker(curvature.params, (layer,))):
            why = (
                "the loss of an example may not be convex in the output, use labels='empirical'; or "
                if labels == "exact"
                else ""
            )
            raise ValueError(
                f"data: the curvature of {list(layer.layer.names)} is not finite; {why}parameters, data or weights "
                "hold NaN or infinite numbers"
            )


@partial(jax.jit, static_argnames=("labels", "mask", "max_side", "corrected"))
def _fit(op: EmpiricalFisher, labels: str, mask: Mask | None, max_side: int, corrected: bool) -> Kronecker:
    """One pass for the moments of all layers, eigenvectors, and one more for what is along them."""
    objective, params = as_objective(op.objective), tree.promote(op.params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), op.data)
    fn = captured_function(objective)
    plan, layers = arrange(lambda p, z: fn(p, z.example), params, shapes, max_side)
    if mask is not None:
        _check_mask(mask, plan, shapes.example)
    columns = tree.size(plan.output) if labels == "exact" else 1
    held = partial(held_entries, plan, cotangents=columns)
    chunk = lambda whole: chunk_in_cache(sum(held(layer, whole=whole) for layer in layers))

    def factors(batch: Keyed) -> list[LayerFactors]:
        pull = lambda out, z: _masked(_cotangents(objective, labels, out, z), out, mask, z.example)
        return layer_factors(plan, layers, params, batch, pull)

    def first(batch: Keyed, weights: Array) -> list[Any]:
        counted = partial(_counted, mask, batch.example)
        return [moments(layer, f, weights, counted) for layer, f in zip(layers, factors(batch), strict=True)]

    summed, _ = sum_over_data(op, first, op.chunk or chunk(whole=False))
    fitted = [_eigenbasis(layer, sums) for layer, sums in zip(layers, summed, strict=True)]
    if not corrected:
        return Kronecker(op.params, tuple(fitted))

    def second(batch: Keyed, weights: Array) -> list[Array]:
        turned = [rotated(x.layer, f, x.q_in, x.q_out) for x, f in zip(fitted, factors(batch), strict=True)]
        return [squares(layer, f, weights) for layer, f in zip(layers, turned, strict=True)]

    values = divide(*sum_over_data(op, second, op.chunk or chunk(whole=True)))
    corrected_layers = [dataclasses.replace(x, values=v) for x, v in zip(fitted, values, strict=True)]
    return Kronecker(op.params, tuple(corrected_layers))


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
    counts = jnp.asarray(mask(example)).astype(bool)
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
