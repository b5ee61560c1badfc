"""What a function does with each parameter leaf, read from its jaxpr.

The leaves are followed through views, calls, checkpoints and scans.  An equation that is linear in one of them and has
a rule is a *use*; adding a bias to the output of a use belongs to it.  Whatever else is done with a leaf makes it
*live*: it is then differentiated as it stands, for each example, so nothing is ever left out.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import tree
from .._jaxpr_compat import called, constants, is_literal, opened, scan_arity
from .._typing import PyTree
from .rules import Linear, linear
from .views import Scanned, View, numbered, view_steps

# What takes entries of a leaf by number.
PICKING = ("gather", "dynamic_slice")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A variable that holds a view of a parameter leaf."""

    leaf: int
    view: View


@dataclasses.dataclass(frozen=True)
class Output:
    """A variable that holds the output of a use, rearranged."""

    use: int
    view: View


@dataclasses.dataclass(frozen=True)
class Picked:
    """A variable that holds whole entries of one axis of a leaf, picked by number.

    Attributes:
      leaf: Place of the leaf.
      stepped: How many of its first axes scans step through.
      along: The axis that is picked from, counted behind those.
      axes: Which axis of the leaf each of the variable's axes is, counted likewise; None for one of numbers.
    """

    leaf: int
    stepped: int
    along: int
    axes: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Stack:
    """How a leaf is a stack of matrices, of which products take some by number.

    Attributes:
      stepped: How many of its first axes scans step through.
      along: The axis of the stack, counted behind those.
      inputs: The axes that products sum over, counted likewise; all others are outputs.
    """

    stepped: int
    along: int
    inputs: tuple[int, ...]


@dataclasses.dataclass
class Use:
    """An equation that is linear in a parameter leaf.

    Attributes:
      leaf: Place of the leaf among the parameters.
      rule: The equation in canonical form.
      view: From the leaf to the equation's operand.
      loops: Lengths of the scans around it, outermost first.
      output: Shape and dtype of its output in one step of those.
      bias: A leaf added to the output, and the entry of it for each output, `(G, O)`.
    """

    leaf: int
    rule: Linear
    view: View
    loops: tuple[int, ...]
    output: jax.ShapeDtypeStruct
    bias: tuple[int, np.ndarray] | None = None

    @property
    def scanned(self) -> tuple[int, ...]:
        """The enclosing scans that step through the leaf; over the others it is used at every step."""
        return self.view.depths

    @property
    def positions(self) -> int:
        """How often it is used within one example."""
        times = [length for depth, length in enumerate(self.loops) if depth not in self.scanned]
        return self.rule.positions * math.prod(times)


@dataclasses.dataclass
class Live:
    """How a leaf is used where no rule applies.

    Attributes:
      ways: By which primitives.
      stepped: How many of its first axes scans step through, wherever it is used.
    """

    ways: list[str]
    stepped: int


@dataclasses.dataclass
class Node:
    """How to run one jaxpr: what to do at which of its equations; at all others, live leaves are used as they are."""

    jaxpr: Any
    views: set[int] = dataclasses.field(default_factory=set)
    uses: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)  # equation to use and operand
    biases: dict[int, int] = dataclasses.field(default_factory=dict)  # equation to the operand that is the bias
    inner: dict[int, Node] = dataclasses.field(default_factory=dict)

    def all_uses(self) -> list[int]:
        """Of this jaxpr and those within it."""
        return [
            *(use for use, _ in self.uses.values()),
            *(use for node in self.inner.values() for use in node.all_uses()),
        ]


@dataclasses.dataclass
class Plan:
    """What `analyse` found.

    Attributes:
      node: How to run the function.
      constants: Arrays it closes over.
      uses: All uses.
      live: Leaves that are also, or only, used in another way.
      names: Of the leaves.
      shapes: Of the leaves.
      output: Shapes of the function's output.
      stacks: Leaves that are used as a stack of matrices picked by number, and in no other way.
    """

    node: Node
    constants: Sequence[Any]
    uses: list[Use]
    live: dict[int, Live]
    names: tuple[str, ...]
    shapes: list[jax.ShapeDtypeStruct]
    output: PyTree
    stacks: dict[int, Stack]


def analyse(
    fn: Callable[[PyTree, PyTree], PyTree], params: PyTree, example: PyTree, exact: frozenset[int] = frozenset()
) -> Plan:
    """Follow the parameters of `fn(params, example)`.

    Args:
      fn: Any function JAX can trace.
      params: Arrays or their shapes.
      example: One example, or its shapes.
      exact: Leaves whose uses are not to be told apart; they are live.
    """
    leaves, structure = jax.tree.flatten(params)
    parts, layout = jax.tree.flatten(example)
    shapes = [jax.ShapeDtypeStruct(jnp.shape(x), x.dtype) for x in leaves]
    inputs = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in parts]
    flat = lambda params, example: fn(structure.unflatten(params), layout.unflatten(example))
    jaxpr, output = jax.make_jaxpr(flat, return_shape=True)(shapes, inputs)
    reader = _Reader(shapes, exact)
    known = [Leaf(index, View()) for index in range(len(leaves))] + [None] * len(parts)
    node, out = reader.read(jaxpr, known, ())
    for tag in out:
        reader.mark(tag, "output")
    names = tuple(name for name, _ in tree.named_leaves(params))
    return Plan(node, constants(jaxpr), reader.uses, reader.live, names, shapes, output, reader.stacks())


Tag = Leaf | Output | Picked | None


class _Reader:
    """Collects uses and live leaves while walking a jaxpr."""

    def __init__(self, shapes: Sequence[jax.ShapeDtypeStruct], exact: frozenset[int]) -> None:
        self.shapes, self.exact = shapes, exact
        self.uses: list[Use] = []
        self.live: dict[int, Live] = {}
        self.picks: dict[int, set[Stack | None]] = {}  # what products see; None of any other sight of a leaf

    def stacks(self) -> dict[int, Stack]:
        """Leaves that are a stack of matrices wherever they are used."""
        other = {use.leaf for use in self.uses if use.rule.kind != "gather"}
        found = {leaf: next(iter(seen)) for leaf, seen in self.picks.items() if len(seen) == 1 and leaf not in other}
        return {leaf: stack for leaf, stack in found.items() if stack is not None}

    def mark(self, tag: Tag, why: str) -> None:
        """A leaf is used in a way that no rule covers."""
        if isinstance(tag, Picked):
            self.picks[tag.leaf].add(None)
        if not isinstance(tag, Leaf):
            return
        if why not in PICKING:
            self.picks.setdefault(tag.leaf, set()).add(None)
        stepped = next(
            (n for n, step in enumerate(tag.view.steps) if not isinstance(step, Scanned)), len(tag.view.steps)
        )
        known = self.live.setdefault(tag.leaf, Live([], stepped))
        known.stepped = min(known.stepped, stepped)
        if why not in known.ways:
            known.ways.append(why)

    def read(self, jaxpr: Any, known: Sequence[Tag], loops: tuple[int, ...]) -> tuple[Node, list[Tag]]:
        """Walk one jaxpr whose inputs are tagged; returns how to run it, and the tags of its outputs."""
        jaxpr = opened(jaxpr)
        node, tags = Node(jaxpr), dict(zip(jaxpr.invars, known, strict=True))
        look = lambda variable: None if is_literal(variable) else tags.get(variable)
        read = Counter(v for e in jaxpr.eqns for v in e.invars if not is_literal(v))
        read.update(v for v in jaxpr.outvars if not is_literal(v))
        for place, equation in enumerate(jaxpr.eqns):
            operands = [look(v) for v in equation.invars]
            # What is read again elsewhere has another cotangent than the bias that is added here.
            pairs = zip(operands, equation.invars, strict=True)
            once = [None if isinstance(tag, Output) and read[v] > 1 else tag for tag, v in pairs]
            if any(tag is not None for tag in operands):
                out = self._follow(node, place, equation, once, loops)
                tags.update(zip(equation.outvars, out, strict=True))
        out = [look(v) for v in jaxpr.outvars]
        alone = [
            None if isinstance(tag, Output) and read[v] > 1 else tag for tag, v in zip(out, jaxpr.outvars, strict=True)
        ]
        return node, alone

    def _follow(
        self, node: Node, place: int, equation: Any, operands: list[Tag], loops: tuple[int, ...]
    ) -> Sequence[Tag]:
        """Follow what is picked from a leaf to the products that take it, and all else as `_equation` does."""
        if called(equation) is None and any(isinstance(tag, Picked) for tag in operands):
            if (seen := _seen(equation, operands[0])) is not None:
                return [seen]
            for index, tag in enumerate(operands):
                if isinstance(tag, Picked):
                    self.picks[tag.leaf].add(_as_stack(equation, tag, index, len(self.shapes[tag.leaf].shape)))
            operands = [None if isinstance(tag, Picked) else tag for tag in operands]
        out = self._equation(node, place, equation, operands, loops)
        picked = self._picked(equation, operands[0])
        return out if picked is None else [picked]

    def _equation(
        self, node: Node, place: int, equation: Any, operands: list[Tag], loops: tuple[int, ...]
    ) -> Sequence[Tag]:
        none: list[Tag] = [None] * len(equation.outvars)
        leaves = [index for index, tag in enumerate(operands) if isinstance(tag, Leaf)]
        steps = view_steps(equation)
        if steps is not None and isinstance(tag := operands[0], Leaf | Output):
            if isinstance(tag, Leaf):
                node.views.add(place)
            elif View(steps).repeats or View(steps).cuts or _recast(equation):
                return none
            return [dataclasses.replace(tag, view=tag.view.then(*steps))]
        if (inner := called(equation)) is not None:
            node.inner[place], out = self.read(inner, operands, loops)
            return out
        if equation.primitive.name == "scan" and leaves:
            self._scan(node, place, equation, operands, loops)
            return none
        if len(leaves) == 1 and (use := self._use(equation, operands, leaves[0], loops)) is not None:
            node.uses[place] = (len(self.uses), leaves[0])
            self.uses.append(use)
            return [Output(len(self.uses) - 1, View())]
        if equation.primitive.name in ("add", "add_any") and len(leaves) == 1:
            other = operands[1 - leaves[0]]
            whole = equation.invars[1 - leaves[0]].aval.shape == equation.outvars[0].aval.shape
            if isinstance(other, Output) and whole and self._bias(equation, operands[leaves[0]], other):
                node.biases[place] = leaves[0]
                return none
        for index in leaves:
            self.mark(operands[index], equation.primitive.name)
        return none

    def _picked(self, equation: Any, tag: Tag) -> Picked | None:
        """Return what is picked by number: single entries of one axis, and everything along at least two others."""
        if equation.primitive.name not in PICKING or not isinstance(tag, Leaf):
            return None
        shape, numbers = equation.invars[0].aval.shape, equation.params.get("dimension_numbers")
        sizes, views = equation.params["slice_sizes"], tag.view.steps
        along = [axis for axis, (size, whole) in enumerate(zip(sizes, shape, strict=True)) if size != whole]
        plain = len(along) == 1 and sizes[along[0]] == 1 and all(isinstance(step, Scanned) for step in views)
        if len(shape) < 3 or not plain or (numbers is not None and numbers.operand_batching_dims):
            self.picks.setdefault(tag.leaf, set()).add(None)
            return None
        axes: list[int | None] = list(range(len(shape)))
        if numbers is not None:
            kept = iter([axis for axis in axes if axis not in numbers.collapsed_slice_dims])
            places = range(equation.outvars[0].aval.ndim)
            axes = [next(kept) if place in numbers.offset_dims else None for place in places]
        self.picks.setdefault(tag.leaf, set())
        return Picked(tag.leaf, len(views), along[0], tuple(axes))

    def _scan(self, node: Node, place: int, equation: Any, operands: list[Tag], loops: tuple[int, ...]) -> None:
        constant, carried = scan_arity(equation)
        inner: list[Tag] = []
        for index, tag in enumerate(operands):
            if not isinstance(tag, Leaf):
                inner.append(None)
            elif index < constant:
                inner.append(tag)
            elif index < constant + carried:
                self.mark(tag, "carry of a scan")
                inner.append(None)
            else:
                inner.append(Leaf(tag.leaf, tag.view.then(Scanned(len(loops)))))
        node.inner[place], out = self.read(equation.params["jaxpr"], inner, (*loops, equation.params["length"]))
        for tag in out:
            self.mark(tag, "output of a scan")

    def _use(self, equation: Any, operands: list[Tag], index: int, loops: tuple[int, ...]) -> Use | None:
        tag = operands[index]
        assert isinstance(tag, Leaf)
        rule = linear(equation, index)
        if rule is None or tag.leaf in self.exact or tag.view.repeats:
            return None
        out = equation.outvars[0].aval
        sizes = (*rule.sizes, rule.positions, *loops)
        if not jnp.issubdtype(out.dtype, jnp.floating) or 0 in sizes:  # complex numbers, or nothing at all
            return None
        return Use(tag.leaf, rule, tag.view, loops, jax.ShapeDtypeStruct(out.shape, out.dtype))

    def _bias(self, equation: Any, tag: Tag, output: Output) -> bool:
        """Attach a leaf to a use, if each of its entries is added to one output, at every position."""
        assert isinstance(tag, Leaf)
        use = self.uses[output.use]
        if (
            tag.leaf in self.exact
            or use.bias is not None
            or tag.view.depths != use.scanned
            or use.rule.kind == "gather"
        ):
            return False
        total = equation.outvars[0].aval.shape
        layers = tuple(use.loops[depth] for depth in use.scanned)
        entries = tag.view.apply(numbered(self.shapes[tag.leaf].shape))
        if entries.ndim != len(layers) + len(total):
            return False
        entries = np.broadcast_to(entries, layers + total)
        by_position = use.rule.output.apply(output.view.undo(entries, len(layers)), len(layers))
        places = by_position[..., 0, :].reshape(-1, by_position.shape[-1])
        everywhere = bool(np.all(by_position == by_position[..., :1, :]))
        if not everywhere or not np.array_equal(np.sort(places, axis=None), np.arange(self.shapes[tag.leaf].size)):
            return False
        use.bias = (tag.leaf, places)
        return True


def _seen(equation: Any, tag: Tag) -> Picked | None:
    """Return how an equation looks at picked entries; None if it does something else with them."""
    name = equation.primitive.name
    if not isinstance(tag, Picked) or name not in ("transpose", "squeeze", "convert_element_type", "copy"):
        return None
    axes = tag.axes
    if name == "transpose":
        axes = tuple(axes[axis] for axis in equation.params["permutation"])
    elif name == "squeeze":
        axes = tuple(axis for place, axis in enumerate(axes) if place not in equation.params["dimensions"])
    return dataclasses.replace(tag, axes=axes)


def _as_stack(equation: Any, tag: Picked, operand: int, ndim: int) -> Stack | None:
    """Return the stack of matrices that a product sees, which sums over some of a matrix's axes and keeps others."""
    if equation.primitive.name != "dot_general":
        return None
    contracted, batch = (sides[operand] for sides in equation.params["dimension_numbers"])
    of = lambda places: {tag.axes[place] for place in places} - {None, tag.along}
    inputs, outputs = of(contracted), set(range(ndim - tag.stepped)) - {tag.along} - of(contracted)
    return Stack(tag.stepped, tag.along, tuple(sorted(inputs))) if inputs and outputs and not of(batch) else None


def _recast(equation: Any) -> bool:
    """Whether the output is of another dtype, in which its cotangent is rounded, or lost if it is an integer."""
    return equation.invars[0].aval.dtype != equation.outvars[0].aval.dtype
