"""Data and parameters on a mesh of devices; what is computed from them then runs on all of it."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ._mesh import compiled
from ._typing import Array, PyTree
from .batching import batch_size, check_batch

__all__ = ["replicate", "shard_batch"]

# Padding adds at most one part in as many to a batch.
LEAST_PADDED = 16


def shard_batch(batch: PyTree, mesh: Mesh, axis: str | tuple[str, ...] = "data") -> tuple[PyTree, Array]:
    """Split a batch over devices by examples, padded with copies of its last example that weigh nothing.

    It is padded to a length that splits evenly over the devices, and of which each device's share splits evenly into
    chunks, so that no device ever needs the examples of another.  Pass the weights on, `GGN(objective, params, batch,
    weights=weights)`; of scores of a padded batch, take the columns `[:, :N]`.

    Args:
      batch: Leaves `(N, ...)`.
      mesh: The devices, e.g. `jax.make_mesh((8,), ("data",))`; axes of either type.
      axis: Name of the mesh axis to split over, or a tuple of names.

    Returns:
      The batch, leaves `(M, ...)` with M at least N, and weights `(M,)`: ones, and zeros for what is padding.

    Raises:
      TypeError: If `mesh` is no mesh, or a leaf is not an array.
      ValueError: If the mesh has no axis of that name, or the batch is malformed.

    Example:
      >>> import influence_jax as ij
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> batch, weights = ij.sharding.shard_batch(ij.Batch(jnp.ones((5, 2)), jnp.zeros(5)), mesh)
      >>> len(batch), weights.tolist()
      (5, [1.0, 1.0, 1.0, 1.0, 1.0])
    """
    check_batch(batch, "batch")
    names = _checked_axes(mesh, axis)
    count = batch_size(batch, "batch")
    length = padded_length(count, math.prod(mesh.shape[name] for name in names))
    split = NamedSharding(mesh, PartitionSpec(names))
    weights = (np.arange(length) < count).astype(jnp.result_type(float))
    return jax.device_put((jax.tree.map(lambda x: _padded(x, length), batch), weights), split)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Put a tree, e.g. the parameters, on every device of a mesh.

    Args:
      tree: Leaves are arrays.
      mesh: The devices.

    Returns:
      The tree, leaves `(*leaf)` on every device.

    Raises:
      TypeError: If `mesh` is no mesh.

    Example:
      >>> import influence_jax as ij
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> ij.sharding.replicate({"w": jnp.ones(2)}, mesh)["w"].sharding.mesh == mesh
      True
    """
    _check_mesh(mesh)
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def padded_length(count: int, devices: int) -> int:
    """The least length of which every device gets an equal share, and a share with many divisors.

    Args:
      count: How many examples there are.
      devices: Over how many devices they are split.

    Returns:
      The length, at least `count`.

    Example:
      >>> padded_length(10, 4)
      12
    """
    share = -(-count // devices)
    multiple = 2 ** (max(1, share // LEAST_PADDED).bit_length() - 1)
    return devices * multiple * -(-share // multiple)


def _padded(leaf: Array | np.ndarray, length: int) -> Array | np.ndarray:
    if leaf.shape[0] == length:
        return leaf
    if isinstance(leaf, jax.Array):
        return _padded_on_device(leaf, length)
    return np.concatenate([leaf, np.repeat(leaf[-1:], length - leaf.shape[0], axis=0)])


def _repeat_last(leaf: Array, length: int) -> Array:
    return jnp.take(leaf, jnp.minimum(jnp.arange(length), leaf.shape[0] - 1), axis=0)


_padded_on_device = compiled(_repeat_last, static_argnames="length")


def _check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh: got a {type(mesh).__name__}, expected a jax.sharding.Mesh such as jax.make_mesh((8,), ('data',))"
        )


def _checked_axes(mesh: Any, axis: Any) -> tuple[str, ...]:
    """The names of the axes to split over."""
    _check_mesh(mesh)
    names = axis if isinstance(axis, tuple) else (axis,)
    if not names or len(set(names)) < len(names) or not set(names) <= set(mesh.axis_names):
        raise ValueError(
            f"axis: got {axis!r}, expected one of the mesh's axes {list(mesh.axis_names)}, or a tuple of several"
        )
    return names
