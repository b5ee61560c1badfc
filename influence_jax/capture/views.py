"""How what an operation consumes is cut out of a parameter leaf: reshapes, transposes, slices, steps of a scan.

A view is a chain of small steps.  Each applies to numpy and JAX arrays alike, with any leading axes in front, and can
be undone: entries go back to where they came from, and what was cut off is zero.  Casts are no steps, so a view keeps
the dtype it is given.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

Shape: TypeAlias = tuple[int, ...]
AnyArray: TypeAlias = Any  # numpy for the numbers of entries, JAX for values


@dataclasses.dataclass(frozen=True)
class Reshape:
    """Entries in C order, in another shape."""

    before: Shape
    after: Shape

    def apply(self, x: AnyArray, lead: int) -> AnyArray:
        return x.reshape(x.shape[:lead] + self.after)

    def undo(self, x: AnyArray, lead: int) -> AnyArray:
        return x.reshape(x.shape[:lead] + self.before)


@dataclasses.dataclass(frozen=True)
class Transpose:
    """Axes in another order."""

    axes: tuple[int, ...]

    def apply(self, x: AnyArray, lead: int) -> AnyArray:
        return x.transpose((*range(lead), *(lead + axis for axis in self.axes)))

    def undo(self, x: AnyArray, lead: int) -> AnyArray:
        return Transpose(tuple(int(axis) for axis in np.argsort(self.axes))).apply(x, lead)


@dataclasses.dataclass(frozen=True)
class Slice:
    """A strided box; steps may be negative, which reverses an axis."""

    before: Shape
    parts: tuple[tuple[int, int | None, int], ...]

    def _index(self) -> tuple[Any, ...]:
        return (..., *(slice(*part) for part in self.parts))

    def apply(self, x: AnyArray, lead: int) -> AnyArray:
        return x[self._index()]

    def undo(self, x: AnyArray, lead: int) -> AnyArray:
        return jnp.zeros(x.shape[:lead] + self.before, x.dtype).at[self._index()].set(x)


@dataclasses.dataclass(frozen=True)
class Broadcast:
    """Entries repeated along new or enlarged axes; only ever looked through, for biases, and never undone."""

    after: Shape
    axes: tuple[int, ...]

    def apply(self, x: AnyArray, lead: int) -> AnyArray:
        sizes = dict(zip(self.axes, x.shape[lead:], strict=True))
        thin = x.reshape(x.shape[:lead] + tuple(sizes.get(axis, 1) for axis in range(len(self.after))))
        broadcast = np.broadcast_to if isinstance(x, np.ndarray) else jnp.broadcast_to
        return broadcast(thin, x.shape[:lead] + self.after)


@dataclasses.dataclass(frozen=True)
class Scanned:
    """One step of a scan takes one entry of the first axis; over all steps that axis becomes a leading one."""

    depth: int


Step: TypeAlias = Reshape | Transpose | Slice | Broadcast | Scanned


@dataclasses.dataclass(frozen=True)
class View:
    """A chain of steps."""

    steps: tuple[Step, ...] = ()

    def then(self, *steps: Step) -> View:
        """This view, and more steps after it."""
        return View(self.steps + steps)

    def apply(self, x: AnyArray, lead: int = 0) -> AnyArray:
        """`(*lead, *leaf)` to `(*lead, *scanned, *view)`."""
        for step in self.steps:
            if isinstance(step, Scanned):
                lead += 1
            else:
                x = step.apply(x, lead)
        return x

    def undo(self, x: AnyArray, lead: int = 0) -> AnyArray:
        """`(*lead, *scanned, *view)` back to `(*lead, *leaf)`, zero outside of the view."""
        lead += len(self.depths)
        for step in reversed(self.steps):
            if isinstance(step, Scanned):
                lead -= 1
            elif isinstance(step, Broadcast):
                raise TypeError("a broadcast has no inverse")
            else:
                x = step.undo(x, lead)
        return x

    @property
    def depths(self) -> tuple[int, ...]:
        """At which depths of nested scans the leaf is stepped through; their axes lead."""
        return tuple(step.depth for step in self.steps if isinstance(step, Scanned))

    @property
    def repeats(self) -> bool:
        """Whether an entry of the leaf may occur more than once."""
        return any(isinstance(step, Broadcast) for step in self.steps)

    @property
    def cuts(self) -> bool:
        """Whether entries of the leaf may be left out."""
        return any(isinstance(step, Slice) for step in self.steps)


def numbered(shape: Shape) -> np.ndarray:
    """An array whose entries are their own places in C order."""
    return np.arange(math.prod(shape), dtype=np.int64 if math.prod(shape) > 2**31 else np.int32).reshape(shape)


def view_steps(equation: Any) -> tuple[Step, ...] | None:
    """The steps by which an equation looks at its only operand; None if it does something else with it."""
    rule = VIEWS.get(equation.primitive.name)
    return rule(equation) if rule is not None else None


def _reshape(equation: Any) -> tuple[Step, ...]:
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    order = equation.params.get("dimensions") if equation.primitive.name == "reshape" else None
    if order is None:
        return (Reshape(before, after),)
    return Transpose(tuple(order)), Reshape(tuple(before[axis] for axis in order), after)


def _broadcast(equation: Any) -> tuple[Step, ...]:
    before, after = equation.invars[0].aval, equation.outvars[0].aval
    if before.size == after.size:
        return (Reshape(before.shape, after.shape),)
    return (Broadcast(after.shape, tuple(equation.params["broadcast_dimensions"])),)


def _cast(equation: Any) -> tuple[Step, ...] | None:
    return () if jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating) else None  # integers have no derivative


def _slice(equation: Any) -> tuple[Step, ...]:
    params, shape = equation.params, equation.invars[0].aval.shape
    strides = params["strides"] or (1,) * len(shape)
    return (Slice(shape, tuple(zip(params["start_indices"], params["limit_indices"], strides, strict=True))),)


def _reverse(equation: Any) -> tuple[Step, ...]:
    shape = equation.invars[0].aval.shape
    turned = equation.params["dimensions"]
    parts = tuple((size - 1, None, -1) if axis in turned else (0, size, 1) for axis, size in enumerate(shape))
    return (Slice(shape, parts),)


VIEWS: dict[str, Callable[[Any], tuple[Step, ...] | None]] = {
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "transpose": lambda equation: (Transpose(tuple(equation.params["permutation"])),),
    "slice": _slice,
    "rev": _reverse,
    "convert_element_type": _cast,
    "copy": lambda equation: (),
    "copy_p": lambda equation: (),
    "name": lambda equation: (),
    "sharding_constraint": lambda equation: (),
    "reshard": lambda equation: (),
    "pvary": lambda equation: (),
}
