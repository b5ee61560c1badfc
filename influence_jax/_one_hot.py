"""Losses that take an integer label for a one-hot vector, which broadcasts where labels of a batch would not."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import tree
from ._jaxpr_compat import called, is_literal, opened, replaced
from ._typing import PyTree
from ._words import name_of

# Through these a label stays a label.
KEEP = ("convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "neg", "copy", "stop_gradient")
COMBINE = ("add", "sub", "mul", "div")


class _From(NamedTuple):
    """What a value is computed from: an integer label alone, the output, or anything else of the example."""

    label: str | None = None
    output: bool = False
    other: bool = False


def check_labels(loss: Callable[..., Any], output: PyTree, example: PyTree) -> None:
    """Raise if an integer part of the example is multiplied with, or taken off, a larger array made of the output.

    Looks at the traced loss, once for each of the arguments' shapes.

    Raises:
      ValueError: Naming the part.
    """
    described = tuple(_described(x) for x in (output, example))
    if None in described:
        return
    found = _broadcast_label(loss, *described)
    if found is not None:
        part, shape, of = found
        raise ValueError(
            f"loss: {name_of(loss)} broadcasts the integer part '{part}' of the example, {shape}, over an array "
            f"{of} made of the output, as functions of one-hot labels do with class numbers; use "
            "influence_jax.losses.cross_entropy, optax.softmax_cross_entropy_with_integer_labels, or jax.nn.one_hot; "
            "if that number is meant for every entry of the output, let the data hold it as a float"
        )


def _described(value: PyTree) -> tuple | None:
    """Structure, shapes and dtypes, hashable; None if a leaf is no array."""
    leaves, structure = jax.tree.flatten(value)
    if not all(hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves):
        return None
    return structure, tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves)


@functools.lru_cache(maxsize=1024)
def _broadcast_label(loss: Callable[..., Any], output: tuple, example: tuple) -> tuple | None:
    """Find the part that is broadcast: its name, its shape, and that of the array it is broadcast over; else None."""
    out, z = (
        structure.unflatten([jax.ShapeDtypeStruct(*x) for x in leaves]) for structure, leaves in (output, example)
    )
    shapes = [shape for shape, _ in output[1]]
    rank = max((len(shape) for shape in shapes), default=0)
    labels = [(name, x) for name, x in tree.named_leaves(z) if _is_label(x, rank)]
    if not labels:
        return None
    try:
        jaxpr = jax.make_jaxpr(loss)(out, z)
    except Exception:  # told where the loss is called
        return None
    sources = [_From(output=True)] * len(shapes)
    sources += [_From(label=name) if _is_label(x, rank) else _From(other=True) for name, x in tree.named_leaves(z)]
    sizes = {name: math.prod(x.shape) for name, x in labels}
    part, of = _search(jaxpr, sources, shapes, sizes)[1] or (None, None)
    return None if part is None else (part, dict(labels)[part].shape, of)


def _is_label(leaf: Any, rank: int) -> bool:
    fewer = len(leaf.shape) < rank or (rank > 0 and math.prod(leaf.shape) == 1)
    return fewer and jnp.issubdtype(leaf.dtype, jnp.integer)


def _search(
    jaxpr: Any, sources: Sequence[_From], shapes: Sequence[tuple], sizes: Mapping[str, int]
) -> tuple[list[_From], tuple | None]:
    """What a jaxpr's outputs are computed from, and the first label that it broadcasts over an output."""
    jaxpr, known = opened(jaxpr), {}
    known.update(zip(jaxpr.invars, sources, strict=True))
    source = lambda v: _From() if is_literal(v) else known.get(v, _From())
    for equation in jaxpr.eqns:
        operands = [source(v) for v in equation.invars]
        inner = called(equation) or replaced(equation)
        if inner is not None and len(opened(inner).invars) == len(operands):
            results, found = _search(inner, operands, shapes, sizes)
        else:
            results = [_result(equation, operands)] * len(equation.outvars)
            found = _found(equation, operands, shapes, sizes)
        if found is not None:
            return [], found
        known.update(zip(equation.outvars, results, strict=True))
    return [source(v) for v in jaxpr.outvars], None


def _found(equation: Any, operands: Sequence[_From], shapes: Sequence[tuple], sizes: Mapping[str, int]) -> tuple | None:
    """The label that is one operand, where the other is of the output's shape and made of the output alone."""
    if equation.primitive.name not in ("mul", "sub"):
        return None
    for label, other in (operands, operands[::-1]):
        over = equation.outvars[0].aval
        if label.label is None or other != _From(output=True) or over.shape not in shapes:
            continue
        if over.size > sizes[label.label]:  # otherwise nothing is broadcast
            return label.label, tuple(over.shape)
    return None


def _result(equation: Any, operands: Sequence[_From]) -> _From:
    """What the result of one operation is computed from; all but arithmetic makes something else of a label."""
    labels = {x.label for x in operands} - {None}
    output, other = any(x.output for x in operands), any(x.other for x in operands)
    if not labels:
        return _From(None, output, other)
    alone = len(labels) == 1 and not output and not other
    if alone and (_keeps(equation) or (equation.primitive.name in COMBINE and _with_numbers(equation))):
        return _From(label=labels.pop())
    return _From(None, output, True)


def _keeps(equation: Any) -> bool:
    """Whether a label stays one: axes of its own may come in front of it, not behind, which is broadcasting meant."""
    if equation.primitive.name not in KEEP or equation.outvars[0].aval.dtype == bool:
        return False
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return not before or after[len(after) - len(before) :] == before


def _with_numbers(equation: Any) -> bool:
    return sum(v.aval.ndim > 0 for v in equation.invars) <= 1
