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


class LeafCoverage(NamedTuple):
    """How one leaf is treated.

    Attributes:
      name: Of the leaf.
      shape: Of the leaf.
      kind: `"matrix"`, `"bias"` (a row of a matrix), `"block"` (all its entries together) or `"diagonal"`.
      block: The diagonal block of the curvature that it is in.
      details: In words.

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
        """Which share of all parameters is in leaves of these kinds."""
        known = ("matrix", "bias", "block", "diagonal")
        if not set(kinds) <= set(known):
            raise ValueError(f"kinds: got {list(kinds)}, expected some of {list(known)}")
        size = lambda leaf: math.prod(leaf.shape)
        return sum(size(leaf) for leaf in self.leaves if leaf.kind in kinds) / max(sum(map(size, self.leaves)), 1)

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
    shapes = dict(zip(plan.names, plan.shapes, strict=True))
    found: dict[str, tuple[str, list[str]]] = {}
    for layer in layers:
        kind, details = _described(plan, layer)
        found.setdefault(layer.kernel, (kind, []))[1].append(details)
        if layer.bias is not None:
            found[layer.bias[0]] = ("bias", [f"of {layer.kernel}"])
    return Coverage(
        tuple(
            LeafCoverage(
                name, shapes[name].shape, found[name][0], blocks[name], "; ".join(dict.fromkeys(found[name][1]))
            )
            for name in plan.names
        )
    )


def _described(plan: Plan, layer: Layer) -> tuple[str, str]:
    ways = {plan.names[leaf]: ", ".join(live.ways) for leaf, live in plan.live.items()}
    many = f"{layer.groups} of " if layer.groups > 1 else ""
    if layer.of_entries:
        way = ways.get(layer.kernel, "has no effect on the output")
        if layer.own_basis[1]:
            return "diagonal", f"{layer.groups * layer.columns:,} entries; {way}"
        return "block", f"{many}{layer.columns} x {layer.columns}, exact; {way}"
    uses = [plan.uses[index] for index, _ in layer.uses]
    size = f"{layer.rows} x {layer.columns}" + (" with its bias" if layer.bias else "")
    positions = max(use.positions for use in uses)
    kept = [side for side, keeps in zip(("rows", "columns"), layer.own_basis, strict=True) if keeps]
    parts = [
        many + size,
        "tied: " * (len(uses) > 1) + ", ".join(use.rule.kind for use in uses),
        f"{positions} positions" * (positions > 1),
        f"own basis of its {' and '.join(kept)}" * bool(kept),
        f"also {ways.get(layer.kernel)}" * (layer.live and layer.kernel in ways),
    ]
    return "matrix", "; ".join(part for part in parts if part)
