r"""Fitting Kronecker-factored curvature: K-FAC and EK-FAC of any model that JAX can trace."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp

from .. import tree
from .._mesh import compiled
from .._sound import is_finite
from .._typing import Array, Key, LossFunction, PyTree
from ..batching import as_batch, check_finite, check_key, check_positive
from ..capture import MAX_SIDE
from ..objective import Objective, as_objective
from .capabilities import check_losses, not_convex_because
from .convexity import is_at_hand
from .exact import GGN, EmpiricalFisher
from .fisher import Keyed
from .kronecker import Kronecker
from .kronecker_fit import Recipe, corrected, eigenbases, moment_sums, square_sums
from .labels import check_sample, why_no_softmax
from .losses import check_classes
from .masks import Mask, as_masks, check_agreement
from .parts import example_keys
from .unmasked import warn_of_padding

LABELS = ("exact", "sampled", "empirical")


def kfac(
    objective: Objective | LossFunction,
    params: PyTree,
    data: PyTree,
    *,
    weights: Array | None = None,
    labels: str = "exact",
    key: Key | None = None,
    mask: Mask | Mapping[str, Mask] | None = None,
    max_side: int = MAX_SIDE,
    chunk: int | None = None,
) -> Kronecker:
    r"""Kronecker-factored Fisher matrix: for every layer, $A \otimes S$.

    $A = \frac1n\sum a a^\top$ over inputs and $S = \frac1n\sum s s^\top$ over output cotangents of the layer, both
    averaged over the n positions of all examples; a bias is one more input that is always one.  Layers are found in
    the jaxpr: products, convolutions and look-ups with a parameter, wherever they are; see `coverage`.  A parameter
    used in another way is a block of its own: exact up to 1024 entries, its diagonal beyond; but a stack of matrices
    that products take by number is $A \otimes S$ for each, of the rows and columns of gradients of whole examples.

    Args:
      objective: An `Objective`; a bare `f(params, example) -> scalar` with `labels="empirical"` only.
      params: Leaves `(*leaf)`, real floating.
      data: Leaves `(N, ...)`.
      weights: `(N,)`, non-negative; ones if None.
      labels: Which loss gradients s come from.  `"exact"`: all columns of the square root of the loss Hessian in the
        output, an average over the model's own labels; for outputs of at most 1024 entries.
        `"sampled"`: labels drawn from the model, one per example and position, by the objective's `sample` for larger
        outputs.  `"empirical"`: those of the data.
      key: For `"sampled"`.
      mask: Which positions count; padding does not, and where none is given for a loss that masks some, a warning says
        so.  A mapping from prefixes of parameter names (`""` for all) to
        functions `mask(example) -> (T,)`: of the layers named, and of no others, exactly those positions count.  Or
        one such function, for all layers with T positions; it is refused if the loss of any example depends on a
        position that it leaves out of one of these layers, because then they are positions of something else, or
        padding leaks into the loss.  Under tracing, where nothing can be refused, the result is then NaN.  Layers
        with another number of positions count all of theirs.  Static.
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
    recipe = as_recipe(objective, labels, mask, max_side)
    return _checked_fit(keyed_fisher(objective, params, data, weights, chunk, recipe, key), recipe, eigenvalues=False)


def ekfac(
    objective: Objective | LossFunction,
    params: PyTree,
    data: PyTree,
    *,
    weights: Array | None = None,
    labels: str = "exact",
    key: Key | None = None,
    mask: Mask | Mapping[str, Mask] | None = None,
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
      mask: Which positions count, as in `kfac`; those that do not have no share in $G_n$ either.
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
    recipe = as_recipe(objective, labels, mask, max_side)
    return _checked_fit(keyed_fisher(objective, params, data, weights, chunk, recipe, key), recipe, eigenvalues=True)


def as_recipe(
    objective: Objective | LossFunction, labels: str, mask: Mask | Mapping[str, Mask] | None, max_side: int
) -> Recipe:
    """What shapes a fit, checked."""
    if labels not in LABELS:
        raise ValueError(f"labels: got {labels!r}, expected one of {list(LABELS)}")
    if labels != "empirical" and not isinstance(as_objective(objective), Objective):
        raise TypeError(
            f"objective: labels={labels!r} got the bare function {objective!r}, expected an Objective(predict, loss), "
            "because labels are drawn from the model's output; or pass labels='empirical', those of the data"
        )
    check_positive(max_side, "max_side")
    return Recipe(labels, as_masks(mask), max_side)


def keyed_fisher(
    objective: Objective | LossFunction,
    params: PyTree,
    data: PyTree,
    weights: Array | None,
    chunk: int | None,
    recipe: Recipe,
    key: Key | None,
    start: int = 0,
) -> EmpiricalFisher:
    """The data of a fit, or the part of them that begins with example `start`, with a key for each drawn label."""
    data, weights = as_batch(data, "data"), tree.read(weights, "weights")
    keys = cast(Key, None)  # only drawn labels look at keys
    if recipe.labels == "sampled":
        key = check_key(key, 'labels="sampled" draws labels from the model')
        keys = example_keys(key, start, tree.count(data))
    return EmpiricalFisher(objective, params, Keyed(data, keys), weights=weights, chunk=chunk)


def check_drawn(op: EmpiricalFisher, recipe: Recipe) -> Array | None:
    """Raise if what a fit draws is wrong; under tracing return whether it is right, None where it is known."""
    if recipe.labels != "sampled":
        return None
    return check_sample(op.split, op.params, op.data.example, cast(Array | None, op.weights), recipe.mask)


def _checked_fit(op: EmpiricalFisher, recipe: Recipe, *, eigenvalues: bool) -> Kronecker:
    check_finite(op.params, "params")
    check_classes(op)
    right = check_drawn(op, recipe)
    curvature, leaks, silence = _fit(op, recipe, eigenvalues)
    if not _finite(curvature):
        check_losses(op)
    curvature = _agreeing(curvature, leaks, right)
    check_fitted(curvature, recipe, op)
    warn_of_padding(op, recipe, [x.layer for x in curvature.layers], silence)
    return curvature


def _agreeing(curvature: Kronecker, leaks: Sequence[Array | None], right: Array | None) -> Kronecker:
    """Return the curvature, NaN under tracing where a mask leaves out what the loss depends on, or draws are wrong."""
    flags = [n == 0 for n in leaks if n is not None]
    if not any(isinstance(n, jax.core.Tracer) for n in leaks):
        check_agreement([layer.layer for layer in curvature.layers], leaks)
        flags = []
    flags += [] if right is None else [right]
    if not flags:
        return curvature
    whole = jnp.all(jnp.stack(flags))
    layers = (dataclasses.replace(x, values=jnp.where(whole, x.values, jnp.nan)) for x in curvature.layers)
    return dataclasses.replace(curvature, layers=tuple(layers))


def _finite(curvature: Kronecker) -> bool:
    """Whether all eigenvalues are, as far as is known on the host."""
    values = [layer.values for layer in curvature.layers if not isinstance(layer.values, jax.core.Tracer)]
    return is_finite(values)


def check_fitted(curvature: Kronecker, recipe: Recipe, op: EmpiricalFisher | None = None) -> None:
    """Raise, on the host, if a layer's curvature is not finite, naming the layer, and of data in memory the example."""
    for layer in curvature.layers:
        if not _finite(Kronecker(curvature.params, (layer,))):
            why = _why_not(recipe, op) if op is not None else ""
            if why:
                raise ValueError(
                    f"data: labels={recipe.labels!r} give no curvature of {list(layer.layer.names)}, for {why}; use "
                    "labels='empirical'"
                )
            if recipe.labels != "empirical":
                why = (
                    "the loss of an example may not be convex in the output, or have no second derivative there, use "
                    "labels='empirical'; or "
                )
            raise ValueError(
                f"data: the curvature of {list(layer.layer.names)} is not finite; {why}parameters, data or weights "
                "hold NaN or infinite numbers"
            )


def _why_not(recipe: Recipe, op: EmpiricalFisher) -> str:
    """Find the example whose loss Hessian has no square root; empty if that is not why."""
    if recipe.labels == "empirical" or not isinstance(op.objective, Objective) or not is_at_hand(op):
        return ""
    if recipe.labels == "sampled" and op.objective.sample is not None:
        return why_no_softmax(op.objective, op.params, op.data.example, op.weights)
    return not_convex_because(GGN(op.objective, op.params, op.data.example, weights=op.weights, chunk=op.chunk))


@partial(compiled, static_argnames=("recipe", "eigenvalues"))
def _fit(
    op: EmpiricalFisher, recipe: Recipe, eigenvalues: bool
) -> tuple[Kronecker, list[Array | None], list[list[Array | None]]]:
    """One pass for the moments of all layers, eigenvectors, and one more for what is along them; leaks, and silence."""
    summed = moment_sums(op, recipe)
    fitted = eigenbases(op.params, summed)
    fitted = corrected(fitted, *square_sums(op, recipe, fitted)) if eigenvalues else fitted
    return fitted, [x.leaks for x in summed], [x.silence for x in summed]
