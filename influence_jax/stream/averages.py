"""Averages of functions over the batches of a loader."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from .. import tree
from .._progress import track
from .._typing import Array, PyTree
from ..batching import batch_size
from .loaders import Ordered, count_batches, is_batch


class Averaging(Protocol):
    """How much a batch counts in an average.

    Example:
      >>> class ByTokens:
      ...     def weight(self, batch):
      ...         return float(batch["length"].sum())
      >>> batches = [{"length": jnp.array([1, 2])}, {"length": jnp.array([3])}]
      >>> accumulate(lambda batch: batch["length"].max(), batches, ByTokens()).item()
      2.5
    """

    def weight(self, batch: PyTree) -> float:
        """The weight of a batch."""
        ...


@dataclasses.dataclass(frozen=True)
class PointAveraging:
    """Every example counts alike, so a batch counts by its length.

    Raises:
      ValueError: From `weight`, if the batch is malformed.

    Example:
      >>> PointAveraging().weight({"x": jnp.ones((3, 2))})
      3.0
    """

    def weight(self, batch: PyTree) -> float:
        """The number of examples in `batch`."""
        return float(batch_size(batch, "batch"))


@dataclasses.dataclass(frozen=True)
class ChunkAveraging:
    """Every batch counts alike, however long it is.

    Example:
      >>> ChunkAveraging().weight({"x": jnp.ones((3, 2))})
      1.0
    """

    def weight(self, batch: PyTree) -> float:
        """One, whatever the `batch`."""
        return 1.0


def accumulate(
    fn: Callable[[PyTree], PyTree],
    loader: Iterable[PyTree],
    averaging: Averaging | None = None,
    *,
    progress: bool = True,
) -> PyTree:
    r"""Weighted mean of a function over batches, $\sum_b w_b f(b) / \sum_b w_b$, divided once at the end.

    For what needs not fit in memory at once, e.g. `lambda batch: GGN(objective, params, batch).mv(v)`.

    Args:
      fn: Function of one batch, to a tree of arrays of the same shapes for every batch.
      loader: Re-iterable of batches, leaves `(n, ...)`.
      averaging: `PointAveraging()` (default) or `ChunkAveraging()`.
      progress: Whether to show a bar.

    Returns:
      The mean, float32 or wider.

    Raises:
      TypeError: If the loader is no re-iterable of batches.
      ValueError: If it is empty or its first batch is another each time it is read, or `fn` returns different shapes.

    Example:
      >>> import influence_jax as ij
      >>> ij.stream.accumulate(lambda batch: batch.mean(0), [jnp.array([1.0, 2.0]), jnp.array([6.0])]).item()
      3.0
    """
    averaging = PointAveraging() if averaging is None else averaging
    if isinstance(averaging, type) or not callable(getattr(averaging, "weight", None)):
        raise TypeError(f"averaging: got {averaging!r}, expected PointAveraging() or ChunkAveraging()")
    if is_batch(loader) and type(loader) not in (list, tuple):
        raise TypeError(
            f"loader: got one batch, a {type(loader).__name__}; expected an iterable of batches, e.g. [batch]"
        )
    total, mass = None, 0.0
    count = len(loader) if isinstance(loader, list | tuple) else count_batches(loader)  # arrays in a list are batches
    for item in track(Ordered(loader, "loader"), "average", count, show=progress):
        batch = jax.tree.map(jnp.asarray, item)
        weight = averaging.weight(batch)
        part = jax.tree.map(lambda x, w=weight: w * _floating(x), fn(batch))
        if total is not None and _shapes(part) != _shapes(total):
            raise ValueError(
                f"fn: returned {_shapes(part)} for a batch, after {_shapes(total)}; expected the same shapes"
            )
        total = part if total is None else tree.add(total, part)
        mass += weight
    if total is None:
        raise ValueError("loader: is empty, expected at least one batch")
    if mass == 0:
        raise ValueError(f"averaging: {averaging!r} gave all batches weight 0, expected a positive sum")
    return jax.tree.map(lambda x: x / mass, total)


def _floating(x: Any) -> Array:
    """As float32 or wider."""
    x = jnp.asarray(x)
    return x.astype(tree.accumulation_dtype(x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.float32)


def _shapes(parts: PyTree) -> PyTree:
    return jax.tree.map(jnp.shape, parts)
