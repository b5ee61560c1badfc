r"""Equations that are linear in a parameter, in one canonical form.

$\mathrm{out}_{gto} = \sum_i \mathrm{input}_{gti}\, \mathrm{weight}_{gio}$ with groups g, positions t, inputs i and
outputs o: so the gradient of a weight is the sum over positions of outer products of inputs and output cotangents.
To teach the interpreter another primitive, add a rule to `LINEAR`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._typing import Array
from .views import Reshape, Transpose, View


@dataclasses.dataclass(frozen=True)
class Linear:
    """One equation in the canonical form.

    Attributes:
      kind: `"dot"`, `"conv"` or `"gather"`, whose input is the number of a row.
      weight: From the parameter to `(G, I, O)`.
      input: From the input to `(G, T, I)`; for gather to `(G, T)`.
      output: From the output to `(G, T, O)`.
      sizes: `(G, I, O)`.
      positions: T.
      prepare: What is done to the input first: patches for a convolution, legal row numbers for a gather.
    """

    kind: str
    weight: View
    input: View
    output: View
    sizes: tuple[int, int, int]
    positions: int
    prepare: Callable[[Array], Array] | None = None


def linear(equation: Any, operand: int) -> Linear | None:
    """The canonical form of an equation that is linear in that operand; None if there is no rule for it."""
    rule = LINEAR.get(equation.primitive.name)
    return rule(equation, operand) if rule is not None else None


def _sizes(shape: Sequence[int], axes: Sequence[int]) -> int:
    return math.prod(shape[axis] for axis in axes)


def _dot(equation: Any, operand: int) -> Linear:
    contracted, batch = equation.params["dimension_numbers"]
    weight, other = equation.invars[operand].aval, equation.invars[1 - operand].aval
    w_in, a_in, w_batch, a_batch = (
        tuple(axes[side]) for axes in (contracted, batch) for side in (operand, 1 - operand)
    )
    w_free = tuple(axis for axis in range(weight.ndim) if axis not in w_in + w_batch)
    a_free = tuple(axis for axis in range(other.ndim) if axis not in a_in + a_batch)
    groups, inputs = _sizes(weight.shape, w_batch), _sizes(weight.shape, w_in)
    outputs, positions = _sizes(weight.shape, w_free), _sizes(other.shape, a_free)
    # The output has the batch axes, then the free axes of the first operand, then those of the second.
    b, first = len(w_batch), len(w_free) if operand == 0 else len(a_free)
    axes = range(equation.outvars[0].aval.ndim)
    order = (*axes[:b], *axes[b + first :], *axes[b : b + first]) if operand == 0 else tuple(axes)
    out_shape = tuple(equation.outvars[0].aval.shape[axis] for axis in order)
    return Linear(
        "dot",
        _arranged(weight.shape, w_batch + w_in + w_free, (groups, inputs, outputs)),
        _arranged(other.shape, a_batch + a_free + a_in, (groups, positions, inputs)),
        View((Transpose(order), Reshape(out_shape, (groups, positions, outputs)))),
        (groups, inputs, outputs),
        positions,
    )


def _arranged(shape: Sequence[int], order: tuple[int, ...], after: tuple[int, ...]) -> View:
    return View((Transpose(order), Reshape(tuple(shape[axis] for axis in order), after)))


def _conv(equation: Any, operand: int) -> Linear | None:
    params, kernel, out = equation.params, equation.invars[1].aval, equation.outvars[0].aval
    if operand != 1 or params["batch_group_count"] != 1:
        return None
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    spec, out_spec = numbers.rhs_spec, numbers.out_spec
    window = tuple(kernel.shape[axis] for axis in spec[2:])
    outputs, channels = kernel.shape[spec[0]] // groups, kernel.shape[spec[1]]
    inputs, order = channels * math.prod(window), (out_spec[0], *out_spec[2:], out_spec[1])
    places = tuple(out.shape[axis] for axis in order[:-1])
    positions = math.prod(places)
    # Inputs and outputs of one group are next to each other among the channels.
    by_group = lambda before, features: (Reshape(before, (positions, groups, features)), Transpose((1, 0, 2)))
    oihw = tuple(kernel.shape[axis] for axis in spec)
    return Linear(
        "conv",
        View((Transpose(spec), Reshape(oihw, (groups, outputs, inputs)), Transpose((0, 2, 1)))),
        View(by_group((*places, groups * channels, math.prod(window)), inputs)),
        View((Transpose(order), *by_group((*places, groups * outputs), outputs))),
        (groups, inputs, outputs),
        positions,
        partial(_patches, params=params, window=window, places=places[1:]),
    )


def _patches(x: Array, *, params: dict[str, Any], window: tuple[int, ...], places: tuple[int, ...]) -> Array:
    """What each output of a convolution sees, `(N, *places, channels, window)`: one slice per entry of the window."""
    spec = params["dimension_numbers"].lhs_spec
    x = x.transpose((spec[0], *spec[2:], spec[1]))
    inner = [(low, high, gap - 1) for (low, high), gap in zip(params["padding"], params["lhs_dilation"], strict=True)]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *inner, (0, 0, 0)])

    def seen(offset: tuple[int, ...]) -> Array:
        strides = params["window_strides"]
        starts = [place * gap for place, gap in zip(offset, params["rhs_dilation"], strict=True)]
        ends = [start + (n - 1) * step + 1 for start, n, step in zip(starts, places, strides, strict=True)]
        return x[(slice(None), *(slice(*part) for part in zip(starts, ends, strides, strict=True)))]

    return jnp.stack([seen(offset) for offset in np.ndindex(*window)], axis=-1)


def _gather(equation: Any, operand: int) -> Linear | None:
    """Whole rows looked up by number: an embedding.  Its input is one-hot and never written out."""
    table, indices, out = equation.invars[0].aval, equation.invars[1].aval, equation.outvars[0].aval
    numbers, mode = equation.params["dimension_numbers"], equation.params["mode"]
    if operand != 0 or len(numbers.collapsed_slice_dims) != 1 or numbers.operand_batching_dims:
        return None
    (axis,) = numbers.collapsed_slice_dims
    rest = tuple(a for a in range(table.ndim) if a != axis)
    whole = tuple(1 if a == axis else size for a, size in enumerate(table.shape))
    modes = (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.FILL_OR_DROP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    if numbers.start_index_map != (axis,) or tuple(equation.params["slice_sizes"]) != whole or mode not in modes:
        return None
    positions, rows, width = indices.size, table.shape[axis], _sizes(table.shape, rest)
    offset = tuple(numbers.offset_dims)
    lookups = tuple(a for a in range(out.ndim) if a not in offset)
    return Linear(
        "gather",
        _arranged(table.shape, (axis, *rest), (1, rows, width)),
        View((Reshape(indices.shape, (1, positions)),)),
        _arranged(out.shape, lookups + offset, (1, positions, width)),
        (1, rows, width),
        positions,
        partial(_rows, count=rows, clip=mode is lax.GatherScatterMode.CLIP),
    )


def _rows(indices: Array, *, count: int, clip: bool) -> Array:
    """Row numbers as the gather reads them; those it drops point behind the last row."""
    if clip:
        return jnp.clip(indices, 0, count - 1)
    return jnp.where((indices < 0) | (indices >= count), count, indices)


LINEAR: dict[str, Callable[[Any, int], Linear | None]] = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "gather": _gather,
}


def canonical_input(rule: Linear, x: Array, loops: int) -> Array:
    """A captured input `(*loops, ...)` as `(*loops, G, T, I)`, or row numbers `(*loops, G, T)`."""
    if rule.prepare is not None:
        prepare = rule.prepare
        for _ in range(loops):
            prepare = jax.vmap(prepare)
        x = prepare(x)
    return rule.input.apply(x, loops)
