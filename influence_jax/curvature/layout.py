"""How an operator's arrays are laid out on a mesh of devices, and vectors like them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .. import tree
from .._mesh import names_of, padded
from .._typing import Array, PyTree


class Layout(NamedTuple):
    """How an operator's parameters and data are laid out.

    Attributes:
      params: Names of leaves, and the layout of each; none if there is no mesh.
      shares: Over how many devices the data are split.
    """

    params: tuple[tuple[str, NamedSharding], ...] = ()
    shares: int = 1


def layout_of(params: PyTree, data: PyTree, otherwise: Layout) -> Layout:
    """The layout of arrays; of what is traced, as it was known before."""
    leaves = dict(tree.named_leaves(params))
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, data))):
        return otherwise._replace(params=tuple(pair for pair in otherwise.params if pair[0] in leaves))
    found = {name: _on_mesh(leaf) for name, leaf in leaves.items()}
    of_data = [sharding for sharding in map(_on_mesh, jax.tree.leaves(data)) if sharding is not None]
    on_mesh = [*(sharding for sharding in found.values() if sharding is not None), *of_data]
    if not on_mesh:
        return Layout()
    everywhere = NamedSharding(on_mesh[0].mesh, PartitionSpec())
    chosen = ((name, found[name] or everywhere, leaf.ndim) for name, leaf in leaves.items())
    laid_out = tuple((name, NamedSharding(s.mesh, PartitionSpec(*padded(s.spec, ndim)))) for name, s, ndim in chosen)
    return Layout(laid_out, max(map(_shares, of_data), default=1))


def _on_mesh(leaf: Any) -> NamedSharding | None:
    """How an array is laid out if it is on a mesh of several devices; its axes as `Auto`, as they are in programs."""
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.num_devices == 1:
        return None
    mesh = sharding.mesh
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    return NamedSharding(Mesh(mesh.devices, mesh.axis_names, axis_types=kinds), sharding.spec)


def _shares(sharding: NamedSharding) -> int:
    """Over how many devices the first axis is split."""
    return math.prod(sharding.mesh.shape[name] for name in names_of(sharding.spec[0] if sharding.spec else None))


def constrain(vectors: PyTree, layout: Layout) -> PyTree:
    """Lay a vector, or a stack, out as the parameters are; every device then has all rows of a stack."""
    known = dict(layout.params)

    def leaf_constrained(path: tuple, leaf: Array) -> Array:
        sharding = known.get(tree.path_name(path))
        if sharding is None:
            return leaf
        spec = PartitionSpec(*(None,) * (leaf.ndim - len(sharding.spec)), *sharding.spec)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(sharding.mesh, spec))

    return jax.tree_util.tree_map_with_path(leaf_constrained, vectors) if known else vectors
