"""Losses in which a column and a row broadcast to a square, where one of them is the output and the other a label."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import tree
from ._jaxpr_compat import called, is_literal, opened, replaced
from ._traced import described, traced
from ._typing import PyTree

# Of two arrays each, in which broadcasting is no outer product that was written as one.
PAIRED = ("add", "sub", "mul", "select_n")


class Crossed(NamedTuple):
    """A part of the example and an output of other shapes that a loss broadcasts to a square.

    Attributes:
      part: Its name.
      shape: Its shape.
      output: The shape of the output, or of what the loss has made of it.
    """

    part: str
    shape: tuple[int, ...]
    output: tuple[int, ...]


class _Side(NamedTuple):
    """What a value is made of, entry by entry.

    Attributes:
      source: The part of the example, or `""` of the output, or of what is made of it; None of numbers alone.
      shape: The shape of that.
      spread: The axes along which it is broadcast since.
      known: Whether it is made of that alone, entry by entry.
    """

    source: str | None = None
    shape: tuple[int, ...] = ()
    spread: frozenset[int] = frozenset()
    known: bool = True


def crossed(loss: Callable[..., Any], output: PyTree, example: PyTree) -> Crossed | None:
    """Find an output `(C, 1)` and a part `(C,)`, or the other way round, that a loss adds or multiplies to `(C, C)`.

    Losses of positions `(C,)`, made of the output, and a column that masks them are such, too.

    Args:
      loss: `loss(output, example)`.
      output: Its first argument; shapes do.
      example: Its second.
    """
    outputs, parts = tree.named_leaves(output), tree.named_leaves(example)
    shapes = {tuple(x.shape) for _, x in outputs}
    columns = any(len(x.shape) == 2 and x.shape[1] == 1 < x.shape[0] for _, x in parts)
    if not columns and not any(_are_crossed(shape, tuple(x.shape)) for shape in shapes for _, x in parts):
        return None
    descriptions = described(output), described(example)
    program = None if None in descriptions else traced(loss, *descriptions)
    if program is None:
        return None
    sides = [_Side("", tuple(x.shape)) for _, x in outputs] + [_Side(name, tuple(x.shape)) for name, x in parts]
    return _search(program[0], sides)[1]


def _are_crossed(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Return whether one shape is `(C, 1)`, C > 1, and the other `(C,)`."""
    row, column = sorted((one, other), key=len)
    return len(row) == 1 and row[0] > 1 and column == (row[0], 1)


def _search(jaxpr: Any, sides: Sequence[_Side]) -> tuple[list[_Side], Crossed | None]:
    """Return what a jaxpr's outputs are made of, and what is found."""
    jaxpr = opened(jaxpr)
    known = dict(zip(jaxpr.invars, sides, strict=True))
    side = lambda v: _Side() if is_literal(v) else known.get(v, _Side())
    for equation in jaxpr.eqns:
        operands = [side(v) for v in equation.invars]
        inner = called(equation) or replaced(equation)
        if inner is not None and len(opened(inner).invars) == len(operands):
            results, found = _search(inner, operands)
        else:
            results, found = [_result(equation, operands)] * len(equation.outvars), _met(equation, operands)
        if found is not None:
            return [], found
        known.update(zip(equation.outvars, results, strict=True))
    return [side(v) for v in jaxpr.outvars], None


def _met(equation: Any, operands: Sequence[_Side]) -> Crossed | None:
    """Return what an equation broadcasts to a square, one along the rows and the other along the columns."""
    if equation.primitive.name not in PAIRED:
        return None
    after = equation.outvars[0].aval.shape
    whole = [(x, v.aval.shape) for x, v in zip(operands, equation.invars, strict=True) if v.aval.ndim == len(after)]
    spread = [(x, x.spread | {i for i, n in enumerate(shape) if n < after[i]}) for x, shape in whole]
    for (output, rows), (part, columns) in itertools.permutations(spread, 2):
        across = len(rows) == len(columns) == 1 and rows != columns
        known = output.known and part.known and output.source == "" and bool(part.source)
        if known and across and _are_crossed(output.shape, part.shape):
            return Crossed(str(part.source), part.shape, output.shape)
    return None


def _result(equation: Any, operands: Sequence[_Side]) -> _Side:
    """Return what the result of an equation is made of."""
    made = {x for x in operands if x.source is not None or not x.known}
    if not made:
        return _Side()
    after = equation.outvars[0].aval.shape
    of_output = _Side("", tuple(after)) if any(x.source == "" for x in made) else _Side(known=False)
    side = made.pop()
    if made or not side.known:
        return of_output
    if equation.primitive.name == "broadcast_in_dim":
        before, places = equation.invars[0].aval.shape, equation.params["broadcast_dimensions"]
        kept = {place: axis for axis, place in enumerate(places) if before[axis] == after[place]}
        spread = {i for i, n in enumerate(after) if n > 1 and (i not in kept or kept[i] in side.spread)}
        return side._replace(spread=frozenset(spread))
    alike = all(v.aval.shape in (after, ()) for v in equation.invars)
    return side if alike and equation.primitive.name not in ("cumsum", "cumprod", "sort", "rev") else of_output
