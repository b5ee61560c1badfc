r"""Curvature of a loss over a data set: Hessian, Gauss-Newton, empirical Fisher.

All three are weighted means over examples, $C = \sum_i w_i C_i / \sum_i w_i$, summed over chunks and divided once, so
neither the chunk size nor a ragged tail changes the result beyond rounding.
"""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from .. import _reprs, blocks, tree
from .._mesh import compiled
from .._pytree import dataclass, set_field, static
from .._typing import Array, LossFunction, PyTree
from .._words import name_of
from ..batching import DEFAULT_CHUNK, Spare, as_batch, check_chunk, map_rows, sum_over, take
from ..gradients import all_or_nan, directional, matching
from ..objective import LossOnly, Objective, as_objective, constants_of, floating_output, on_block
from .capabilities import minibatch, not_convex_because, restrict, settled, sums, wide_dtype
from .convexity import Convexity, convexity, is_at_hand, is_declared_convex
from .layout import Layout, constrain, layout_of
from .operator import LinearOperator
from .outputs import require_split
from .parts import is_part


@dataclass
class OverData(LinearOperator, abc.ABC):
    """Fields and bookkeeping shared by the operators over a data set; abstract.

    Attributes:
      total: What the weighted sum is divided by; the sum of the weights if None.
      layout: How parameters and data, and hence products, are laid out on a mesh; found by itself.
    """

    objective: Objective | LossOnly | LossFunction
    params: PyTree
    data: PyTree
    weights: Array | np.ndarray | None = dataclasses.field(default=None, kw_only=True)
    chunk: int | None = static(default=None, kw_only=True)
    rhs_chunk: int | None = static(default=None, kw_only=True)  # type: ignore[assignment]
    total: Array | None = dataclasses.field(default=None, kw_only=True)
    layout: Layout = static(default=Layout(), kw_only=True)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        set_field(self, "objective", as_objective(self.objective))
        set_field(self, "params", tree.check_params(self.params))
        set_field(self, "data", as_batch(self.data, "data"))
        set_field(self, "layout", layout_of(self.params, self.data, self.layout))
        check_chunk(self.chunk)
        check_chunk(self.rhs_chunk, "rhs_chunk")
        if self.weights is not None:
            set_field(self, "weights", _as_weights(self.weights, self))

    @property
    def signed(self) -> bool:
        """Whether weights may be negative."""
        return not self.psd

    @property
    def count(self) -> int:
        """Number of examples."""
        return jax.tree.leaves(self.data)[0].shape[0]

    @property
    def space(self) -> PyTree:
        return self.params

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
        tree.check_vector(v, self.params, "v")
        return _mean_product(self, v)

    def mm(self, V: PyTree) -> PyTree:
        tree.check_stack(V, self.params, "V")
        return _mean_products(self, V)

    def loss(self, params: PyTree, example: PyTree) -> Array:
        """The loss of one example at `params`."""
        return as_objective(self.objective)(params, example)

    @property
    def split(self) -> Objective:
        """The objective of an operator that has required it to be split into prediction and loss."""
        return cast(Objective, self.objective)

    @abc.abstractmethod
    def sum_product(self, params: PyTree, batch: PyTree, weights: Array, v: PyTree) -> PyTree:
        r"""$\sum_i w_i C_i v$ over one chunk.

        Args:
          params: Where it is taken.
          batch: The chunk, leaves `(B, ...)`.
          weights: `(B,)`.
          v: One vector.
        """

    def __repr__(self) -> str:
        return _reprs.call(self, _reprs.parameters(self.space), _reprs.rows(self.data))


@dataclass
class Hessian(OverData):
    r"""Hessian of the mean loss, $H = \frac{1}{\sum w}\sum_i w_i \nabla^2_\theta\,\ell(\theta, z_i)$.

    Products are forward over reverse, about three gradients each.  It is indefinite away from a minimum.

    Args:
      objective: Objective, or a bare `f(params, example) -> scalar`.
      params: Leaves `(*leaf)`, real floating.
      data: Leaves `(N, ...)`.
      weights: `(N,)`, ones if None.
      chunk: Examples per chunk; at most 256 for each device if None.
      rhs_chunk: Stacked vectors multiplied at once; four on CPU if None.

    Raises:
      TypeError, ValueError: If an argument is not of that form.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: 0.5 * (params["w"] * z) ** 2
      >>> ij.Hessian(f, {"w": jnp.array(1.0)}, jnp.array([1.0, 3.0])).mv({"w": jnp.array(1.0)})["w"].item()
      5.0

    Reference: Pearlmutter 1994; Koh & Liang 2017, arXiv:1703.04730.
    """

    def sum_product(self, params: PyTree, batch: PyTree, weights: Array, v: PyTree) -> PyTree:
        slope = jax.grad(partial(_weighted_loss, self, batch, weights), has_aux=True)
        (_, factor), (product, _) = directional(slope, params, v)
        return tree.scale(factor, product)


@dataclass
class GGN(OverData):
    r"""Generalised Gauss-Newton matrix, $G = \frac{1}{\sum w}\sum_i w_i J_i^\top H_i J_i$.

    $J_i = \partial_\theta\,\mathrm{predict}$ and $H_i = \nabla^2_{out}\,\mathrm{loss}$ at example i: the Hessian
    without the curvature of the model.  Equal to the Fisher matrix for softmax cross-entropy and squared loss.
    Positive semi-definite for losses that are convex in the output: those of `influence_jax.losses` say so, of others
    `psd` is found out, once and on the host, from their Hessians in the output at all examples.

    Args:
      objective: An `Objective`; the split into prediction and loss is what this is made of.
      params: Leaves `(*leaf)`, real floating.
      data: Leaves `(N, ...)`.
      weights: `(N,)`, non-negative; ones if None.
      chunk: Examples per chunk; at most 256 for each device if None.
      rhs_chunk: Stacked vectors multiplied at once; four on CPU if None.
      convex: Whether the loss is convex in the output at all examples; None if it has not been looked at.  Set by the
        library, in `invert`; a copy of that operator at other parameters or data is to be given None again.  Static.

    Raises:
      TypeError, ValueError: If an argument is not of that form, or the objective is a bare function.

    Example:
      >>> import influence_jax as ij
      >>> objective = ij.Objective(lambda p, z: p["w"] * z["x"], lambda out, z: 0.5 * (out - z["y"]) ** 2)
      >>> data = {"x": jnp.array([1.0, 3.0]), "y": jnp.array([0.0, 0.0])}
      >>> ij.GGN(objective, {"w": jnp.array(1.0)}, data).mv({"w": jnp.array(1.0)})["w"].item()
      5.0

    Reference: Schraudolph 2002; Martens 2014, arXiv:1412.1193.
    """

    convex: bool | None = static(default=None, kw_only=True)

    def __post_init__(self) -> None:
        OverData.__post_init__(self)
        require_split(as_objective(self.objective), "GGN")

    @property
    def signed(self) -> bool:
        return False

    @property
    def psd(self) -> bool:
        """Whether it is known to be; of arrays that are traced nothing is, unless the loss says so."""
        if self.convex is not None or is_declared_convex(self.split):
            return self.convex is not False
        found = self.convexity
        return found is not None and found.holds

    @property
    def convexity(self) -> Convexity | None:
        """What is found out about the loss, in one pass that is made once; None where arrays are not at hand."""
        arrays = (self.objective, self.params, self.data, self.weights)
        if not hasattr(self, "_convexity") and is_at_hand(arrays):
            found = convexity(self.split, self.params, self.data, cast(Array | None, self.weights), self.chunk)
            set_field(self, "_convexity", found)
        return getattr(self, "_convexity", None)

    def assume_psd(self) -> GGN:
        return dataclasses.replace(self, convex=True)

    def sum_product(self, params: PyTree, batch: PyTree, weights: Array, v: PyTree) -> PyTree:
        def outputs(p: PyTree) -> PyTree:
            return jax.vmap(partial(floating_output, self.split, p))(batch)

        def cost(out: PyTree) -> tuple[Array, Array]:
            losses = jax.vmap(self.split.cost)(out, batch)
            return _weighted_sum(losses, weights), all_or_nan(losses)

        out, tangent = directional(outputs, params, v)
        (_, factor), (curved, _) = jax.jvp(jax.grad(cost, has_aux=True), (out,), (tangent,))
        return tree.scale(factor, jax.vjp(outputs, params)[1](curved)[0])


@dataclass
class EmpiricalFisher(OverData):
    r"""Second moment of the per-example gradients, $F = \frac{1}{\sum w}\sum_i w_i\, g_i g_i^\top$.

    Labels are those of the data; pyDVL calls this Gauss-Newton.

    Args:
      objective: Objective, or a bare `f(params, example) -> scalar`.
      params: Leaves `(*leaf)`, real floating.
      data: Leaves `(N, ...)`.
      weights: `(N,)`, non-negative; ones if None.
      chunk: Examples per chunk; at most 256 for each device if None.
      rhs_chunk: Stacked vectors multiplied at once; four on CPU if None.

    Raises:
      TypeError, ValueError: If an argument is not of that form.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: params["w"] * z
      >>> ij.EmpiricalFisher(f, {"w": jnp.array(1.0)}, jnp.array([1.0, 3.0])).mv({"w": jnp.array(1.0)})["w"].item()
      5.0

    Reference: Kunstner et al. 2019, arXiv:1905.12558.
    """

    @property
    def psd(self) -> bool:
        return True

    def sum_product(self, params: PyTree, batch: PyTree, weights: Array, v: PyTree) -> PyTree:
        def losses(p: PyTree) -> Array:
            return jax.vmap(partial(self.loss, p))(batch)

        values, tangent = directional(losses, params, v)
        product = jax.vjp(losses, params)[1](tangent * weights.astype(values.dtype))[0]
        return tree.scale(all_or_nan(values), product)


def _as_weights(weights: Array | np.ndarray, op: OverData) -> Array:
    weights = tree.read(weights, "weights")
    if not hasattr(weights, "dtype"):
        raise TypeError(f"weights: got {weights!r:.100}, expected an array ({op.count},); make one by jnp.asarray")
    real = jnp.issubdtype(weights.dtype, jnp.floating) or jnp.issubdtype(weights.dtype, jnp.integer)
    if not (real or weights.dtype == bool):
        raise TypeError(f"weights: got {weights.dtype}, expected real numbers")
    if jnp.shape(weights) != (op.count,):
        raise ValueError(f"weights: got shape {jnp.shape(weights)}, expected ({op.count},), one per example of data")
    if not isinstance(weights, jax.core.Tracer) and getattr(weights, "is_fully_addressable", True):
        values = np.asarray(weights, np.float64)  # numpy, because under jit even a sum of constants is traced
        if not (np.isfinite(values.sum()) and (values.sum() != 0 or op.total is not None or is_part())):
            raise ValueError(f"weights: they sum to {values.sum()}, expected a finite number other than zero")
        if not op.signed and values.min() < 0:
            raise ValueError(
                f"weights: got {values.min()}, expected non-negative numbers, for {type(op).__name__} is a mean of "
                "positive semi-definite matrices; Hessian takes negative weights"
            )
    return jnp.asarray(weights, wide_dtype(op.params))


def _weighted_sum(losses: Array, weights: Array) -> Array:
    dtype = tree.accumulation_dtype(losses.dtype, weights.dtype)
    return jnp.sum(losses.astype(dtype) * weights.astype(dtype))


def _weighted_loss(op: OverData, batch: PyTree, weights: Array, params: PyTree) -> tuple[Array, Array]:
    losses = jax.vmap(partial(op.loss, params))(batch)
    return _weighted_sum(losses, weights), all_or_nan(losses)


def sum_over_data(
    op: OverData, fn: Callable[[PyTree, Array], PyTree], chunk: int | None = None
) -> tuple[PyTree, Array]:
    """`sum_over` the operator's data, and what the sum is to be divided by; `chunk` is for each device by default."""
    chunk = op.chunk or (chunk or DEFAULT_CHUNK) * op.layout.shares
    weights = cast(Array | None, op.weights)
    summed, weight = sum_over(fn, op.data, weights, chunk=chunk, dtype=wide_dtype(op.params))
    return summed, weight if op.total is None else op.total.astype(weight.dtype)


def weighed(op: OverData) -> tuple[tuple[PyTree, Array | None], Callable[[tuple[PyTree, Array | None]], PyTree]]:
    """Return data with weights, for mapping over chunks, and what makes the examples of a chunk of it.

    An example of weight zero is another one there, which has weight, whatever it holds.
    """
    if op.weights is None:
        return (op.data, None), lambda part: part[0]
    weights = jnp.asarray(op.weights)
    spare = Spare.of(op.data, weights)
    return (op.data, weights), lambda part: spare.instead(part[0], jnp.asarray(part[1]))


def divide(summed: PyTree, weight: Array) -> PyTree:
    """Divide every leaf of a weighted sum by the total weight."""
    return jax.tree.map(lambda s: s / weight.astype(s.dtype), summed)


def without_data(op: OverData) -> OverData:
    """The operator as a function of one example."""
    alone = copy.copy(op)
    for name in ("data", "weights", "total"):
        set_field(alone, name, None)
    return alone


def _sum_product(op: OverData, v: PyTree) -> tuple[PyTree, Array]:
    params, wide_v = matching(op.params, v)
    return sum_over_data(op, lambda batch, weights: op.sum_product(params, batch, weights, wide_v))


@compiled
def _mean_product(op: OverData, v: PyTree) -> PyTree:
    return constrain(tree.cast_like(divide(*_sum_product(op, v)), v), op.layout)


@compiled
def _mean_products(op: OverData, V: PyTree) -> PyTree:
    # All rows on every device: each takes part in every product with its share of the data.
    return constrain(map_rows(op.mv, constrain(V, op.layout), op.rhs_chunk), op.layout)


@compiled
def _sums(op: OverData, V: PyTree) -> tuple[PyTree, Array]:
    summed, weights = map_rows(partial(_sum_product, op), V, op.rhs_chunk)
    return summed, weights[0]


@sums.register
def _(op: OverData, V: PyTree) -> tuple[PyTree, Array]:
    tree.check_stack(V, op.params, "V")
    return _sums(op, V)


@minibatch.register
def _(op: OverData, indices: Array) -> LinearOperator:
    indices = jnp.asarray(indices)
    if indices.ndim != 1 or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"indices: got {indices.dtype}{list(indices.shape)}, expected a vector of integers")
    if not isinstance(indices, jax.core.Tracer) and not _within(np.asarray(indices), op.count):
        raise ValueError(f"indices: got {np.asarray(indices).tolist()}, expected integers in [0, {op.count})")
    data, weights, total = take(op.data, indices), None, None
    if op.weights is not None:
        # A minibatch divided by its own weight would be a ratio of two random sums, hence biased.
        weights = take(op.weights, indices)
        total = jnp.sum(op.weights) * (indices.shape[0] / op.count)
    if op.total is not None:
        total = op.total * (indices.shape[0] / op.count)
    return dataclasses.replace(op, data=data, weights=weights, total=total)


def _within(indices: np.ndarray, count: int) -> bool:
    return bool(np.all((indices >= 0) & (indices < count)))


@settled.register
def _(op: GGN) -> LinearOperator:
    return op if op.convex is not None or is_declared_convex(op.split) else dataclasses.replace(op, convex=op.psd)


@not_convex_because.register
def _(op: GGN) -> str:
    if op.psd:
        return ""
    found = op.convexity
    if found is None or found.holds:
        return f"the loss {name_of(op.split.loss)} is not known to be convex in the output"
    if found.undefined is not None:
        return (
            f"the second derivative of the loss {name_of(op.split.loss)} in the output is infinite or not a number at "
            f"example {found.undefined}, as of the logarithm of zero"
        )
    return f"the loss {name_of(op.split.loss)} is not convex in the output, first at example {found.negative}"


@restrict.register
def _(op: OverData, block: Sequence[str]) -> LinearOperator:
    objective, params = on_block(as_objective(op.objective), op.params, blocks.as_block(block, op.params))
    return dataclasses.replace(op, objective=objective, params=params)
