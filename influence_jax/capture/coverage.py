"""What becomes of each parameter leaf when curvature is factored by layer."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax

from .. import tree
from .._typing import LossFunction, PyTree
from ..batching import check_positive
from ..objective import Objective, as_objective
from .analysis import Plan
from .layers import MAX_SIDE, Layer, arrange, components
from .views import Shape

KINDS = ("matrix", "bias", "block", "diagonal")


class LeafCoverage(NamedTuple):
    """How one leaf is treated.

    Attributes:
      name: Of the leaf.
      shape: Of the leaf.
      kind: `"matrix"` (at least one side of it in an eigenbasis), `"bias"` (a row of such a matrix), `"block"` (all
        its entries together) or `"diagonal"` (no entry together with another); of a leaf in several parts that are
        treated differently, that of the largest.
      block: The diagonal block of the curvature that it is in.
      details: In words.
      parts: How many entries of it are treated as which kind.

    Example:
      >>> import influence_jax as ij
      >>> import jax.numpy as jnp
      >>> covered = ij.coverage(lambda params, z: jnp.sum(z @ params["w"]), {"w": jnp.ones((3, 2))}, jnp.ones(3))
      >>> covered.leaves[0].kind, covered.leaves[0].shape
      ('matrix', (3, 2))
    """

    name: str
    shape: Shape
    kind: str
    block: str
    details: str
    parts: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Coverage:
    """How each leaf is treated, as a table; made by `coverage`.

    Attributes:
      leaves: A `LeafCoverage` of each, in leaf order.

    Example:
      >>> import influence_jax as ij
      >>> import jax.numpy as jnp
      >>> ij.coverage(lambda params, z: jnp.sum(z @ params["w"]), {"w": jnp.ones((3, 2))}, jnp.ones(3)).share("matrix")
      1.0
    """

    leaves: tuple[LeafCoverage, ...]

    def share(self, *kinds: str) -> float:
        """Which share of all parameters is treated as one of these kinds."""
        if not set(kinds) <= set(KINDS):
            raise ValueError(f"kinds: got {list(kinds)}, expected some of {list(KINDS)}")
        parts = [part for leaf in self.leaves for part in leaf.parts]
        return sum(size for kind, size in parts if kind in kinds) / max(sum(size for _, size in parts), 1)

    def __repr__(self) -> str:
        rows = [(leaf.name, " x ".join(map(str, leaf.shape)) or "()", leaf.kind, leaf.details) for leaf in self.leaves]
        table = [("parameter", "shape", "treated as", ""), *rows]
        widths = [max(len(row[column]) for row in table) for column in range(3)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in table]
        factored = self.share("matrix", "bias")
        exact = self.share("block")
        ending = f"{factored:.1%} of the parameters Kronecker-factored, {exact:.1%} in exact blocks"
        return "\n".join(
            [*(line.rstrip() for line in lines), f"{ending}, {self.share('diagonal'):.1%} by their diagonal"]
        )


def coverage(
    objective: Objective | LossFunction, params: PyTree, example: PyTree, *, max_side: int = MAX_SIDE
) -> Coverage:
    """How `kfac` and `ekfac` treat each parameter leaf of a model, as found in its jaxpr.

    A leaf that multiplies inputs (in products, convolutions, look-ups of rows; through casts, transposes, reshapes and
    slices; in calls, checkpoints and scans) is a matrix; one that is added to such a product's every position is the
    bias of it.  Whatever else is done with a leaf is differentiated as it stands: it is then a block of its own.

    A side longer than `max_side` keeps its own basis, and so do the numbers by which rows are looked up, whose second
    moment is diagonal; where both sides of a matrix do, what is left is a diagonal, and called so.  A stack of matrices
    that products take by number, as experts or layers are by `stack[index]`, is a matrix for each.

    Args:
      objective: Objective, or a bare `f(params, example) -> scalar`.
      params: Leaves `(*leaf)`, or their shapes, as `jax.eval_shape` gives them.
      example: ONE example, without a batch axis, or its shapes.
      max_side: As in `kfac`.

    Returns:
      A `Coverage`; print it.

    Raises:
      TypeError, ValueError: If an argument is not of that form.

    Example:
      >>> import influence_jax as ij
      >>> import jax.numpy as jnp
      >>> f = lambda params, z: jnp.sum((z @ params["kernel"] + params["bias"]) * params["scale"])
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}
      >>> ij.coverage(f, params, jnp.ones(3))
      parameter  shape  treated as
      bias       2      bias        of kernel
      kernel     3 x 2  matrix      4 x 2 with its bias; dot
      scale      2      block       2 x 2, exact; mul
      80.0% of the parameters Kronecker-factored, 20.0% in exact blocks, 0.0% by their diagonal
    """
    objective = as_objective(objective)
    if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        params = tree.check_params(params)
    check_positive(max_side, "max_side")
    for name, leaf in tree.named_leaves(example):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
            raise TypeError(f"example: leaf '{name}' is a {type(leaf).__name__}, expected an array of ONE example")
    params = tree.shapes(params)
    jax.eval_shape(objective, params, example)  # a batch in place of an example is found out here
    plan, layers = arrange(objective, params, example, max_side)
    blocks = {name: block for block, names in components(layers).items() for name in names}
    found: dict[str, list[_Part]] = {name: [] for name in plan.names}
    for layer in layers:
        part = _described(plan, layer)
        found[layer.kernel].append(part)
        if layer.bias is not None:
            kind = "bias" if part.kind == "matrix" else part.kind
            found[layer.bias[0]].append(_Part(kind, layer.groups * layer.columns, f"of {layer.kernel}"))
    shapes = zip(plan.names, plan.shapes, strict=True)
    return Coverage(tuple(_leaf(name, leaf.shape, blocks[name], found[name]) for name, leaf in shapes))


class _Part(NamedTuple):
    """Entries of a leaf that are in one layer."""

    kind: str
    size: int
    details: str


def _leaf(name: str, shape: Shape, block: str, parts: list[_Part]) -> LeafCoverage:
    """Return what is said of a leaf: of several parts, the kind that most entries have."""
    sizes: dict[str, int] = {}
    for part in parts:
        sizes[part.kind] = sizes.get(part.kind, 0) + part.size
    details = "; ".join(dict.fromkeys(part.details for part in parts))
    return LeafCoverage(name, shape, max(sizes, key=lambda kind: sizes[kind]), block, details, tuple(sizes.items()))


def _described(plan: Plan, layer: Layer) -> _Part:
    """Return what becomes of the entries of a layer's matrix.

    A side of one entry has no basis but its own, so of a matrix with one the other side decides.
    """
    ways = {plan.names[leaf]: ", ".join(live.ways) for leaf, live in plan.live.items()}
    many = f"{layer.groups} of " if layer.groups > 1 else ""
    size = layer.groups * math.prod(layer.shape[-2:])
    if layer.of_entries:
        way = ways.get(layer.kernel, "has no effect on the output")
        if layer.own_basis[1]:
            return _Part("diagonal", size, f"{size:,} entries; {way}")
        return _Part("block", size, f"{many}{layer.columns} x {layer.columns}, exact; {way}")
    uses = [plan.uses[index] for index, _ in layer.uses]
    positions = max([use.positions for use in uses], default=1)
    sides = (layer.rows, layer.columns)
    kept = [side for side, keeps in zip(("rows", "columns"), layer.own_basis, strict=True) if keeps]
    diagonal = bool(kept) and all(keeps or n == 1 for n, keeps in zip(sides, layer.own_basis, strict=True))
    parts = [
        many + f"{layer.rows} x {layer.columns}" + (" with its bias" if layer.bias else ""),
        "tied: " * (len(uses) > 1) + ", ".join(use.rule.kind for use in uses) if uses else "picked by number",
        f"{positions} positions" * (positions > 1),
        f"own basis of its {' and '.join(kept)}" * bool(kept),
        f"also {ways.get(layer.kernel)}" * bool(uses and layer.live and layer.kernel in ways),
    ]
    return _Part("diagonal" if diagonal else "matrix", size, "; ".join(part for part in parts if part))
