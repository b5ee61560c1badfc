"""Parameters as matrices: which leaves, or parts of them, act as a matrix on inputs, and what becomes of the rest."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from .. import tree
from .._typing import Array, PyTree
from ..blocks import Block, by_layer
from .analysis import Plan, Stack, Use, analyse
from .views import Reshape, Shape, Transpose, View, numbered

# Sides of a matrix longer than this keep their own basis: a dense one would take the square of it.
MAX_SIDE = 4096
# A leaf that is no matrix is one block up to this many entries, its diagonal beyond.
MAX_BLOCK = 1024
# The use of a leaf that is no matrix.
ENTRIES = -1


@dataclasses.dataclass(frozen=True)
class Layer:
    """Parameters arranged as matrices `(G, I, O)`, one for each of G groups.

    A bias is one more row, for an input that is always one.  A leaf that is not used as a matrix is one row of all its
    entries.

    Attributes:
      kernel: Name of the leaf that holds the matrix.
      view: From the leaf to `(*scanned, G, I, O)`.
      shape: That shape.
      bias: Name of the leaf that is the last row, and its entries' places there, `(G * O,)`.
      uses: Where it is used, and whether with inputs and outputs exchanged; of a stack of matrices picked by number,
        whose gradients are taken as they are, nowhere.
      live: Whether gradients come from elsewhere, too, for a leaf that is used as a matrix.
      own_basis: Whether the rows, and the columns, keep their own basis.
    """

    kernel: str
    view: View
    shape: Shape
    bias: tuple[str, tuple[int, ...]] | None = None
    uses: tuple[tuple[int, bool], ...] = ((ENTRIES, False),)
    live: bool = False
    own_basis: tuple[bool, bool] = (False, False)

    @property
    def of_entries(self) -> bool:
        """Whether it is a leaf that is not used as a matrix."""
        return self.uses == ((ENTRIES, False),)

    @property
    def groups(self) -> int:
        """How many matrices."""
        return math.prod(self.shape[:-2])

    @property
    def rows(self) -> int:
        """Inputs, the bias included."""
        return self.shape[-2] + (self.bias is not None)

    @property
    def columns(self) -> int:
        """Outputs."""
        return self.shape[-1]

    @property
    def names(self) -> Block:
        """Names of its leaves."""
        return (self.kernel,) if self.bias is None else (self.kernel, self.bias[0])

    def matrix(self, leaves: Mapping[str, Array]) -> Array:
        """From leaves `(K, *leaf)` to `(K, G, I, O)`."""
        kernel = leaves[self.kernel]
        matrix = self.view.apply(kernel, 1).reshape((len(kernel), self.groups, *self.shape[-2:]))
        if self.bias is None:
            return matrix
        name, places = self.bias
        row = leaves[name].reshape(len(kernel), -1)[:, np.asarray(places)]
        row = row.reshape(len(kernel), self.groups, 1, self.columns)
        dtype = tree.widest(matrix.dtype, row.dtype)
        return jnp.concatenate([matrix.astype(dtype), row.astype(dtype)], axis=2)

    def leaves(self, matrix: Array, space: Mapping[str, Array]) -> dict[str, Array]:
        """From `(K, G, I, O)` back to leaves `(K, *leaf)`, zero where they are not part of this layer."""
        kernel = matrix[:, :, : self.shape[-2]].reshape((len(matrix), *self.shape))
        leaves = {self.kernel: self.view.undo(kernel, 1)}
        if self.bias is not None:
            name, places = self.bias
            row = matrix[:, :, -1].reshape(len(matrix), -1)[:, np.argsort(places)]
            leaves[name] = row.reshape((len(matrix), *space[name].shape))
        return leaves


def arrange(
    fn: Callable[[PyTree, PyTree], PyTree], params: PyTree, example: PyTree, max_side: int = MAX_SIDE
) -> tuple[Plan, tuple[Layer, ...]]:
    """Analyse a function and arrange its parameters as layers, so that every entry is in exactly one.

    Leaves whose uses overlap without being the same matrix, or leave entries out, are taken as they are.
    """
    exact: frozenset[int] = frozenset()
    stacks: dict[int, Stack] = {}
    while True:
        plan = analyse(fn, params, example, exact)
        if not exact:  # once their gradients are taken as they are, nothing tells what products made of them
            stacks = {leaf: s for leaf, s in plan.stacks.items() if plan.shapes[leaf].size > min(MAX_BLOCK, max_side)}
        layers, unfit = _Arrangement(plan, max_side, stacks).layers()
        if not unfit:
            return plan, layers
        exact |= unfit


def components(layers: Sequence[Layer]) -> OrderedDict[str, Block]:
    """The layers that share leaves taken together: names of blocks, and of the leaves in each.

    A block of one leaf has its name, one of several leaves that of their parent, if no other has.
    """
    groups: list[list[str]] = []
    for layer in layers:
        joined = [group for group in groups if set(group) & set(layer.names)]
        groups = [group for group in groups if group not in joined]
        groups.append(list(dict.fromkeys([*(name for group in joined for name in group), *layer.names])))
    parents = Counter(by_layer(group[0]) for group in groups if len(group) > 1)
    return OrderedDict(
        (by_layer(group[0]) if len(group) > 1 and parents[by_layer(group[0])] == 1 else group[0], tuple(group))
        for group in groups
    )


class _Arrangement:
    """Layers of a plan, and the leaves that do not fit into any."""

    def __init__(self, plan: Plan, max_side: int, stacks: Mapping[int, Stack]) -> None:
        self.plan, self.max_side, self.stacks = plan, max_side, stacks
        self.unfit: set[int] = set()
        self.biased = Counter(use.bias[0] for use in plan.uses if use.bias is not None)

    def layers(self) -> tuple[tuple[Layer, ...], frozenset[int]]:
        uses: dict[int, list[int]] = {}
        for index, use in enumerate(self.plan.uses):
            uses.setdefault(use.leaf, []).append(index)
        made = {leaf: self._of_kernel(leaf, members) for leaf, members in uses.items()}
        rows = {bias for layers in made.values() for layer in layers if layer.bias for bias in [layer.bias[0]]}
        for leaf, name in enumerate(self.plan.names):
            if leaf not in uses and name not in rows:
                made[leaf] = [self._of_stack(leaf) if leaf in self.stacks else self._of_entries(leaf)]
            elif leaf in uses and (leaf in self.biased or leaf in self.stacks):
                self.unfit.add(leaf)
        in_order = tuple(layer for leaf in sorted(made) for layer in made[leaf])
        return in_order, frozenset(self.unfit)

    def _of_entries(self, leaf: int) -> Layer:
        """A leaf as one row, for each step of a scan: curvature of its entries, exact if they are few, or diagonal."""
        shape = self.plan.shapes[leaf].shape
        stepped = self.plan.live[leaf].stepped if leaf in self.plan.live else 0
        whole = (*shape[:stepped], 1, math.prod(shape[stepped:]))
        own = (True, not 0 < whole[-1] <= min(MAX_BLOCK, self.max_side))
        return Layer(self.plan.names[leaf], View((Reshape(shape, whole),)), whole, own_basis=own)

    def _of_stack(self, leaf: int) -> Layer:
        """A leaf as one matrix for each entry of the axis that it is picked from."""
        shape, stack = self.plan.shapes[leaf].shape, self.stacks[leaf]
        behind = lambda axes: tuple(stack.stepped + axis for axis in axes)
        inputs = behind(stack.inputs)
        lead = (*range(stack.stepped), *behind((stack.along,)))
        outputs = tuple(axis for axis in range(len(shape)) if axis not in lead + inputs)
        size = lambda axes: math.prod(shape[axis] for axis in axes)
        whole = (*(shape[axis] for axis in lead), size(inputs), size(outputs))
        order = (*lead, *inputs, *outputs)
        view = View((Transpose(order), Reshape(tuple(shape[axis] for axis in order), whole)))
        own = (whole[-2] > self.max_side, whole[-1] > self.max_side)
        return Layer(self.plan.names[leaf], view, whole, uses=(), live=True, own_basis=own)

    def _of_kernel(self, leaf: int, members: list[int]) -> list[Layer]:
        """The matrices that a leaf, or parts of it, are used as."""
        matrices: list[tuple[np.ndarray, list[tuple[int, bool]]]] = []
        if len(members) == 1 and not self._view(members[0]).cuts:
            return [self._layer(leaf, [(members[0], False)])]
        for index in members:
            entries = self._view(index).apply(numbered(self.plan.shapes[leaf].shape))
            entries = entries.reshape((-1, *entries.shape[-2:]))
            for known, group in matrices:
                if any(np.array_equal(known, other) for other in (entries, entries.swapaxes(1, 2))):
                    group.append((index, not np.array_equal(known, entries)))
                    break
            else:
                matrices.append((entries, [(index, False)]))
        if len(matrices) == 1 and not any(self._view(index).cuts for index in members):
            return [self._layer(leaf, matrices[0][1])]
        together = np.concatenate([entries.ravel() for entries, _ in matrices])
        if not np.array_equal(np.sort(together), np.arange(math.prod(self.plan.shapes[leaf].shape))):
            self.unfit.add(leaf)
            return []
        return [self._layer(leaf, group) for _, group in matrices]

    def _view(self, index: int) -> View:
        use = self.plan.uses[index]
        return use.view.then(*use.rule.weight.steps)

    def _layer(self, leaf: int, members: list[tuple[int, bool]]) -> Layer:
        uses = [self.plan.uses[index] for index, _ in members]
        layers = tuple(uses[0].loops[depth] for depth in uses[0].scanned)
        shape = (*layers, *uses[0].rule.sizes)
        bias = self._bias(uses, any(exchanged for _, exchanged in members))
        looked_up = {exchanged for (_, exchanged), use in zip(members, uses, strict=True) if use.rule.kind == "gather"}
        sides = (shape[-2] + (bias is not None), shape[-1])
        own_basis = (sides[0] > self.max_side or False in looked_up, sides[1] > self.max_side or True in looked_up)
        name, live = self.plan.names[leaf], leaf in self.plan.live
        if bias is not None:
            live = live or bias[0] in {self.plan.names[index] for index in self.plan.live}
        return Layer(name, self._view(members[0][0]), shape, bias, tuple(members), live, own_basis)

    def _bias(self, uses: Sequence[Use], exchanged: bool) -> tuple[str, tuple[int, ...]] | None:
        """The bias that all uses have in common and nothing else has; any other one is no row."""
        found = [use.bias for use in uses if use.bias is not None]
        if not found:
            return None
        leaf, places = found[0]
        same = all(other == leaf and np.array_equal(places, theirs) for other, theirs in found)
        if exchanged or not same or not len(found) == len(uses) == self.biased[leaf]:
            self.unfit.update(other for other, _ in found)
            return None
        return self.plan.names[leaf], tuple(places.ravel().tolist())
