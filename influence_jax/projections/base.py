r"""What projections are, and their random entries."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import _reprs, tree
from .._pytree import dataclass, static
from .._typing import Array, Key, LossFunction, PyTree
from ..batching import as_batch, check_chunk, check_key, chunk_for, map_chunks
from ..gradients import grads_of_chunk
from ..objective import LossOnly, Objective, as_objective

KINDS = ("rademacher", "gaussian")
# Entries drawn at once: 16 MiB of float32. A part of the definition, for rows are numbered within blocks.
BLOCK_ENTRIES = 2**22
# Goes up when the same key stands for other entries.
DEFINITION = 1


@dataclass
class Projection(abc.ABC):
    """A random linear map from parameter-shaped trees to vectors; made by `rademacher`, `gaussian` and `two_sided`.

    Attributes:
      key: What the entries are drawn from.
      kind: Their distribution, `"rademacher"` or `"gaussian"`.
      dim: Length of projected vectors.
      structure: Of the parameters.
      shapes: Of their leaves.

    Example:
      >>> import influence_jax as ij
      >>> projection = ij.projections.gaussian({"w": jnp.ones(30)}, 8, jax.random.key(0))
      >>> projection.project({"w": jnp.ones((5, 30))}).shape, projection.manifest()["dim"]
      ((5, 8), 8)
    """

    key: Key
    kind: str = static()
    dim: int = static()
    structure: Any = static()
    shapes: tuple[tuple[int, ...], ...] = static()

    @property
    def space(self) -> PyTree:
        """Shapes of the parameters; the dtype says nothing."""
        return self.structure.unflatten([jax.ShapeDtypeStruct(shape, jnp.float32) for shape in self.shapes])

    def project(self, stack: PyTree) -> Array:
        """Project vectors that are there: per-example gradients, influence factors.

        Args:
          stack: Leaves `(N, *leaf)`.

        Returns:
          `(N, dim)`, float32 or wider.

        Raises:
          ValueError: If it is not a stack of parameter-shaped trees.
        """
        tree.check_stack(stack, self.space, "stack")
        return _project(self, stack)

    def project_grads(
        self,
        objective: Objective | LossFunction,
        params: PyTree,
        batch: PyTree,
        *,
        chunk: int | None = None,
    ) -> Array:
        r"""Project the gradient of every example's loss, $\varphi(\nabla_\theta\ell(\theta, z_i))$.

        The same map as `project` of `per_example_grads`, which are held for a chunk at most.

        Args:
          objective: Objective, or a bare `f(params, example) -> scalar`.
          params: Leaves `(*leaf)`.
          batch: Leaves `(N, ...)`.
          chunk: Examples at once; chosen from the sizes if None.

        Returns:
          `(N, dim)`, float32 or wider.

        Raises:
          TypeError, ValueError: If an argument is not of that form, or `params` are not those of the projection.
        """
        check_chunk(chunk)
        params = tree.check_params(params)
        tree.check_vector(params, self.space, "params, against the space of the projection")
        return _project_grads(self, as_objective(objective), params, as_batch(batch, "batch"), chunk)

    def manifest(self) -> dict[str, Any]:
        """What tells two projections apart, in JSON: equal manifests are equal maps.  The key is not in it."""
        drawn = jax.random.bits(self.key, (8,), jnp.uint32)  # of the key, and of how this jax draws
        layout = [name for name, _ in tree.named_leaves(self.space)], self.shapes, self._layout()
        return {
            "projection": type(self).__name__,
            "kind": self.kind,
            "dim": self.dim,
            "widths": list(self.widths),
            "definition": DEFINITION,
            "key": _digest(np.asarray(drawn).tobytes()),
            "layout": _digest(repr(layout).encode()),
        }

    @property
    def widths(self) -> tuple[int, ...]:
        """Lengths of the parts of a projected vector that belong to different layers."""
        return (self.dim,)

    def _layout(self) -> Any:
        """What else the map depends on, with a repr that tells it."""
        return ()

    @abc.abstractmethod
    def of_stack(self, stack: PyTree) -> Array:
        """The map on `stack`, leaves `(N, *leaf)`, traced and unchecked."""

    def of_examples(self, objective: Objective | LossOnly, params: PyTree, batch: PyTree, chunk: int | None) -> Array:
        """The map on gradients, traced and unchecked; arguments as those of `project_grads`."""
        gradients = partial(grads_of_chunk, objective, tree.promote(params))
        return map_chunks(
            lambda part: self.of_stack(gradients(part)), batch, chunk=chunk or chunk_for(tree.size(params))
        )

    def __repr__(self) -> str:
        return _reprs.call(self, self.kind, f"{_reprs.counted(tree.size(self.space), 'parameter')} to {self.dim:,}")


def checked_params(params: PyTree) -> PyTree:
    """Shapes of the parameters."""
    if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        params = tree.check_params(params)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def check_projection(projection: Any) -> None:
    """Raise unless it is one."""
    if not isinstance(projection, Projection):
        raise TypeError(
            f"projection: got a {type(projection).__name__}, expected one of influence_jax.projections, e.g. "
            "rademacher(params, dim, key)"
        )


def checked_key(key: Any) -> Key:
    """A typed threefry key: other generators draw other numbers on other devices, or in other shapes."""
    key = check_key(key, "a projection draws its entries from it")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(key, impl="threefry2x32")
    if str(jax.random.key_impl(key)) != "threefry2x32":
        raise ValueError(
            f"key: got one of {jax.random.key_impl(key)}, whose numbers depend on the device; expected a threefry key, "
            "jax.random.key(seed, impl='threefry2x32')"
        )
    return key


@jax.jit
def _project(projection: Projection, stack: PyTree) -> Array:
    return projection.of_stack(stack)


@partial(jax.jit, static_argnames="chunk")
def _project_grads(
    projection: Projection, objective: Objective | LossOnly, params: PyTree, batch: PyTree, chunk: int | None
) -> Array:
    return projection.of_examples(objective, params, batch, chunk)


def entries(kind: str, key: Key, shape: tuple[int, int]) -> Array:
    """Independent entries with mean zero and variance one, in float32 whatever the mode: another dtype draws others."""
    if kind == "gaussian":
        return jax.random.normal(key, shape, jnp.float32)
    rows, columns = shape
    words = jax.random.bits(key, (rows, -(-columns // 32)), jnp.uint32)
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & jnp.uint32(1)
    return 1 - 2 * bits.reshape(rows, -1)[:, :columns].astype(jnp.float32)


def times_entries(kind: str, key: Key, x: Array, columns: int) -> Array:
    """Vectors `(N, P)` times the `(P, columns)` entries of a key, one block of rows after the other."""
    rows = max(1, BLOCK_ENTRIES // columns)
    last = -(-x.shape[1] // rows) - 1

    @jax.checkpoint  # so that a transpose draws the entries again and does not hold them
    def product(part: Array, number: Array | int) -> Array:
        drawn = entries(kind, jax.random.fold_in(key, number), (part.shape[1], columns))
        return jnp.matmul(part, drawn.astype(part.dtype), precision=tree.HIGHEST)

    def step(total: Array, number: Array) -> tuple[Array, None]:
        return total + product(lax.dynamic_slice_in_dim(x, number * rows, rows, axis=1), number), None

    total = product(x[:, last * rows :], last)
    return total if last == 0 else lax.scan(step, total, jnp.arange(last, dtype=jnp.int32))[0]


def scaled(x: Array, dim: int) -> Array:
    """Products with entries of variance one, so that inner products are right on average."""
    return x / jnp.sqrt(jnp.asarray(dim, x.dtype))


def summed(parts: Sequence[Array]) -> Array:
    """The sum of arrays that may differ in dtype."""
    dtype = tree.accumulation_dtype(*(part.dtype for part in parts))
    return sum((part.astype(dtype) for part in parts[1:]), parts[0].astype(dtype))


def joined(parts: Sequence[Array]) -> Array:
    """Columns of arrays that may differ in dtype, side by side."""
    dtype = tree.accumulation_dtype(*(part.dtype for part in parts))
    return jnp.concatenate([part.astype(dtype) for part in parts], axis=1)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
