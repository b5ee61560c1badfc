"""Losses that take a class number for a one-hot vector, which broadcasts where labels of a batch would not."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from . import tree
from ._jaxpr_compat import called, is_literal, opened, replaced
from ._traced import described, shaped, traced
from ._typing import PyTree
from ._words import name_of

# Through these a label stays a label.
KEEP = ("convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "neg", "copy", "stop_gradient")
COMBINE = ("add", "sub", "mul", "div")
# Through these what is on the way to a softmax stays on it.
ON_THE_WAY = (*KEEP, "add", "sub", "max", "abs", "select_n")
FIX = (
    "influence_jax.losses.cross_entropy, optax.softmax_cross_entropy_with_integer_labels, or "
    "jax.nn.one_hot; if that number is meant for every entry"
)


class Broadcast(NamedTuple):
    """A part of the example that a loss broadcasts over an array made of the output alone.

    Attributes:
      part: Its name.
      shape: Its shape.
      over: The shape of the array.
      certain: Whether that alone is a mistake, as of integers; otherwise its values tell.
    """

    part: str
    shape: tuple[int, ...]
    over: tuple[int, ...]
    certain: bool


class _From(NamedTuple):
    """What a value is computed from.

    Attributes:
      label: The part of the example that it is, if it is no more than that.
      output: Whether the output, or probabilities that a bare function makes of it, went into it.
      other: Whether anything else of the example did, or of a bare function's parameters.
      doubtful: A part of no integers that was broadcast over the output, where no other part came in since.
      stage: In a bare function, of what its parameters went into: how far it is on the way to a softmax.
      sums: How many sums there were, on that way.
    """

    label: str | None = None
    output: bool = False
    other: bool = False
    doubtful: Broadcast | None = None
    stage: str = ""
    sums: int = 0


class _Rules(NamedTuple):
    """What is known of all values: shapes that count as an output's, None for any, and the labels there are."""

    shapes: Sequence[tuple] | None
    labels: Mapping[str, Any]


def check_labels(loss: Callable[..., Any], output: PyTree, example: PyTree) -> None:
    """Raise if an integer part of the example is multiplied with, or taken off, a larger array made of the output.

    Looks at the traced loss, once for each of the arguments' shapes.

    Raises:
      ValueError: Naming the part.
    """
    found = broadcast(loss, output, example)
    if found is not None and found.certain:
        raise ValueError(
            f"loss: {name_of(loss)} broadcasts the integer part '{found.part}' of the example, {found.shape}, over an "
            f"array {found.over} made of the output, as functions of one-hot labels do with class numbers; use {FIX} "
            "of the output, let the data hold it as a float"
        )


def check_bare(fn: Callable[..., Any], params: PyTree, example: PyTree) -> None:
    """Raise if a bare function multiplies an integer of the example with, or takes it off, several probabilities.

    Raises:
      ValueError: Naming the part.
    """
    found = broadcast(fn, params, example, bare=True)
    if found is not None and found.certain:
        raise ValueError(
            f"objective: {name_of(fn)} broadcasts the integer part '{found.part}' of the example, {found.shape}, over "
            f"an array {found.over} of a softmax, as functions of one-hot labels do with class numbers; use {FIX}, let "
            "the data hold it as a float"
        )


def broadcast(fn: Callable[..., Any], first: PyTree, example: PyTree, *, bare: bool = False) -> Broadcast | None:
    """Find the part of the example that a loss broadcasts over its output, or a bare function over a softmax.

    Args:
      fn: `loss(output, example)`, or a bare `f(params, example)`.
      first: Its first argument.
      example: Its second.
      bare: Whether it is a bare function.
    """
    descriptions = described(first), described(example)
    return None if None in descriptions else _broadcast(fn, *descriptions, bare)


@functools.lru_cache(maxsize=1024)
def _broadcast(fn: Callable[..., Any], first: tuple, example: tuple, bare: bool) -> Broadcast | None:
    shapes = [shape for shape, _ in first[1]]
    rank = 0 if bare else max((len(shape) for shape in shapes), default=0)
    leaves = tree.named_leaves(shaped(example))
    labels = {name: x for name, x in leaves if _is_label(x, rank)}
    program = traced(fn, first, example) if labels else None
    if program is None:
        return None
    sources = [_From(other=True, stage="params") if bare else _From(output=True)] * len(shapes)
    sources += [_From(label=name) if name in labels else _From(other=True) for name, _ in leaves]
    outputs, found = _search(program[0], sources, _Rules(None if bare else shapes, labels))
    return found or (outputs[0].doubtful if outputs else None)


def _is_label(leaf: Any, rank: int) -> bool:
    """Return whether it may be a label: integers of fewer axes than the output, or one number of any kind."""
    one = math.prod(leaf.shape) == 1
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return len(leaf.shape) < rank or one
    return one and (leaf.dtype == bool or jnp.issubdtype(leaf.dtype, jnp.floating))


def _search(jaxpr: Any, sources: Sequence[_From], rules: _Rules) -> tuple[list[_From], Broadcast | None]:
    """Return what a jaxpr's outputs are computed from, and the first integers that it broadcasts over an output."""
    jaxpr, known = opened(jaxpr), {}
    known.update(zip(jaxpr.invars, sources, strict=True))
    source = lambda v: _From() if is_literal(v) else known.get(v, _From())
    for equation in jaxpr.eqns:
        operands = [source(v) for v in equation.invars]
        inner = called(equation) or replaced(equation)
        if inner is not None and len(opened(inner).invars) == len(operands):
            results, found = _search(inner, operands, rules)
        else:
            found = _found(equation, operands, rules)
            doubtful = found if found is not None and not found.certain else _doubtful(equation, operands)
            results = [_result(equation, operands)._replace(doubtful=doubtful)] * len(equation.outvars)
        if found is not None and found.certain:
            return [], found
        known.update(zip(equation.outvars, results, strict=True))
    return [source(v) for v in jaxpr.outvars], None


def _found(equation: Any, operands: Sequence[_From], rules: _Rules) -> Broadcast | None:
    """The label that is one operand, where the other is of the output's shape and made of the output alone."""
    if equation.primitive.name not in ("mul", "sub"):
        return None
    for label, other in (operands, operands[::-1]):
        over = equation.outvars[0].aval
        alone = other._replace(doubtful=None) == _From(output=True)
        if label.label is None or not alone or (rules.shapes is not None and over.shape not in rules.shapes):
            continue
        part = rules.labels[label.label]
        if over.size > math.prod(part.shape):  # otherwise nothing is broadcast
            certain = bool(jnp.issubdtype(part.dtype, jnp.integer))
            return Broadcast(label.label, tuple(part.shape), tuple(over.shape), certain)
    return None


def _doubtful(equation: Any, operands: Sequence[_From]) -> Broadcast | None:
    """Return what is still in doubt after one operation.

    A weight, a mask or a temperature comes before the labels, or is a factor of them; a label given to a one-hot
    function is all that a loss has of the example, but for factors of the loss.
    """
    parts = {x.doubtful for x in operands if x.doubtful is not None}
    if len(parts) != 1:
        return None
    part = parts.pop()
    lost = lambda x: x.doubtful is None and (x.other or x.label not in (None, part.part))
    mixed = [x for x in operands if lost(x)]
    factor = equation.primitive.name in ("mul", "div") and equation.outvars[0].aval.size <= math.prod(part.shape)
    if mixed and not (factor and not any(x.output or x.stage for x in mixed)):
        return None
    return part if equation.primitive.name not in ("gather", "dynamic_slice") else None


def _result(equation: Any, operands: Sequence[_From]) -> _From:
    """What the result of one operation is computed from; all but arithmetic makes something else of a label."""
    stage = _stage(equation, operands)
    if stage == "softmax":
        return _From(output=True)
    sums = max((x.sums for x in operands), default=0)
    if stage and equation.primitive.name == "reduce_sum":
        sums = equation.outvars[0].aval.size
    labels = {x.label for x in operands} - {None}
    output, other = any(x.output for x in operands), any(x.other for x in operands)
    if not labels:
        return _From(None, output, other, stage=stage, sums=sums)
    alone = len(labels) == 1 and not output and not other
    if alone and (_keeps(equation) or (equation.primitive.name in COMBINE and _with_numbers(equation))):
        return _From(label=labels.pop())
    return _From(None, output, True, stage=stage, sums=sums)


def _stage(equation: Any, operands: Sequence[_From]) -> str:
    r"""Return how far on the way to a softmax a value is, of what depends on a bare function's parameters.

    $\exp o$, $\sum\exp o$, $\log\sum\exp o$; then $o - \log\sum\exp o$ or $\exp o / \sum\exp o$, which is one.
    """
    name, stages = equation.primitive.name, [x.stage for x in operands]
    if not any(stages):
        return ""
    done = (name == "sub" and stages[1] == "log" and stages[0]) or (name == "div" and stages == ["exp", "sum"])
    if done and equation.outvars[0].aval.size > operands[1].sums:  # else one of the classes has been chosen already
        return "softmax"
    if name == "exp":
        return "exp"
    if name == "reduce_sum" and stages == ["exp"]:
        return "sum" if equation.invars[0].aval.size > equation.outvars[0].aval.size else "params"
    if name == "log" and stages == ["sum"]:
        return "log"
    far = max(stages, key=("", "params", "exp", "sum", "log").index)
    return far if name in ON_THE_WAY and (far in ("sum", "log") or name in KEEP) else "params"


def _keeps(equation: Any) -> bool:
    """Whether a label stays one: axes of its own may come in front of it, not behind, which is broadcasting meant."""
    if equation.primitive.name not in KEEP or equation.outvars[0].aval.dtype == bool:
        return False
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    return math.prod(before) == 1 or after[len(after) - len(before) :] == before


def _with_numbers(equation: Any) -> bool:
    return sum(v.aval.ndim > 0 for v in equation.invars) <= 1
