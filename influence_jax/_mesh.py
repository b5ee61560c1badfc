"""Programs for arrays on meshes of devices, whatever the type of the mesh's axes.

Inside of the library the compiler lays arrays out.  A mesh with `Explicit` axes, which `jax.make_mesh` makes, wants
every layout spelt out by whoever writes an operation, which a model of one example cannot.  `compiled` programs turn
such axes into `Auto` ones for as long as they run, and say how what comes out is laid out.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ._typing import Array, PyTree

R = TypeVar("R")


def compiled(
    fn: Callable[..., R], *, static_argnames: str | Sequence[str] = (), keep_unused: bool = False
) -> Callable[..., R]:
    """`jax.jit`, for arrays on meshes with `Explicit` axes too.

    Args:
      fn: Function of trees of arrays.
      static_argnames: As for `jax.jit`.
      keep_unused: As for `jax.jit`; what is returned may be laid out on the mesh of an argument that is not used.

    Raises:
      ValueError: On a call, if some arrays are on a mesh with `Explicit` axes, and others on one of other axes.
    """

    @functools.wraps(fn)
    def program(*args: Any, **kwargs: Any) -> R:
        leaves, structure = jax.tree.flatten((args, kwargs))
        traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.core.Tracer)]
        mesh = _explicit_mesh([leaves[i] for i in traced])
        if mesh is None:
            return fn(*args, **kwargs)
        with jax.sharding.use_abstract_mesh(mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))):
            for i in traced:
                leaves[i] = jax.sharding.reshard(leaves[i], PartitionSpec())  # moves nothing: the axes are Auto
            inner_args, inner_kwargs = structure.unflatten(leaves)
            out = fn(*inner_args, **inner_kwargs)
        return _laid_out(out, _known((args, kwargs)), mesh)

    return jax.jit(program, static_argnames=static_argnames, keep_unused=keep_unused)


def _explicit_mesh(leaves: Iterable[Array]) -> AbstractMesh | None:
    """The mesh with explicit axes that arrays are on, or that is in force; None if there is none."""
    meshes = {jax.typeof(leaf).sharding.mesh for leaf in leaves} | {jax.sharding.get_abstract_mesh()}
    explicit = [mesh for mesh in meshes if mesh.explicit_axes]
    if not explicit:
        return None
    if len({(mesh.axis_names, mesh.axis_sizes) for mesh in meshes if not mesh.empty}) > 1:
        described = sorted({_describe(mesh) for mesh in meshes if not mesh.empty})
        raise ValueError(
            f"arrays: got some on, or in the context of, each of the meshes {' and '.join(described)}, expected one; "
            "put parameters, data and queries on the same mesh, e.g. by influence_jax.sharding"
        )
    return explicit[0]


def _describe(mesh: AbstractMesh) -> str:
    return "(" + ", ".join(f"{name}={size}" for name, size in zip(mesh.axis_names, mesh.axis_sizes, strict=True)) + ")"


class _Known(NamedTuple):
    """Of an argument: its place in the tree, its shape, and how each of its axes is split."""

    path: tuple
    shape: tuple[int, ...]
    split: tuple


def _known(arguments: PyTree) -> list[_Known]:
    return [
        _Known(path, leaf.shape, padded(jax.typeof(leaf).sharding.spec, leaf.ndim))
        for path, leaf in jax.tree_util.tree_leaves_with_path(arguments)
        if isinstance(leaf, jax.core.Tracer)
    ]


def _laid_out(out: PyTree, known: list[_Known], mesh: AbstractMesh) -> PyTree:
    """What a program returns, laid out like its arguments; layout is a matter of memory, never of values."""
    batches = {k.shape[0]: k.split[0] for k in known if k.shape and k.split[0] is not None}

    def leaf_laid_out(path: tuple, leaf: Array) -> Array:
        split = _split_like_arguments(path, leaf.shape, known, batches)
        return jax.sharding.reshard(leaf, NamedSharding(mesh, PartitionSpec(*split)))

    return jax.tree_util.tree_map_with_path(leaf_laid_out, out)


def _split_like_arguments(path: tuple, shape: tuple[int, ...], known: list[_Known], batches: dict[int, Any]) -> tuple:
    """How to split an array of that shape.

    Like the argument of the same shape, or with one more leading axis of the same shape behind that: so vectors and
    stacks are split like the parameters.  Any further axis that is as long as a batch split over its examples is split
    alike.
    """

    def likeness(k: _Known) -> tuple[int, bool]:
        keys = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(path[::-1], k.path[::-1], strict=False))
        return len(list(keys)), any(axis is not None for axis in k.split)

    alike = [k for k in known if k.shape == shape] + [k for k in known if shape and k.shape == shape[1:]]
    best = max(alike, key=likeness) if alike else None
    if best is not None and best.shape == shape:
        return best.split
    split = [None] * len(shape) if best is None else [None, *best.split]
    for place in sorted(range(len(shape)), key=lambda i: -shape[i]):
        used = {name for axis in split for name in names_of(axis)}
        if split[place] is None and used.isdisjoint(names_of(batches.get(shape[place]))):
            split[place] = batches.get(shape[place])
    return tuple(split)


def names_of(axis: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that an axis of an array is split over."""
    return () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)


def padded(spec: Iterable, ndim: int) -> tuple:
    """A layout with an entry for every axis."""
    return (*spec, *(None,) * ndim)[:ndim]


def on_auto_axes(tree: PyTree) -> PyTree:
    """Arrays and shardings with `Explicit` axes as ones with `Auto` axes, for loops that run on the host."""

    def moved(leaf: Any) -> Any:
        sharding = leaf if isinstance(leaf, NamedSharding) else getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
            return leaf
        mesh = Mesh(
            sharding.mesh.devices, sharding.mesh.axis_names, axis_types=(AxisType.Auto,) * len(sharding.mesh.axis_names)
        )
        auto = NamedSharding(mesh, sharding.spec)
        return auto if isinstance(leaf, NamedSharding) else jax.device_put(leaf, auto)

    return jax.tree.map(moved, tree, is_leaf=lambda x: isinstance(x, NamedSharding))


def laid_out_like(tree: PyTree, like: PyTree) -> PyTree:
    """Arrays laid out as those of another tree, where these are on a mesh with `Explicit` axes."""

    def moved(leaf: Array, other: Array) -> Array:
        sharding = getattr(other, "sharding", None)
        explicit = isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types
        return jax.device_put(leaf, sharding) if explicit else leaf

    return jax.tree.map(moved, tree, like)
