"""Host loops over data that come in batches: any re-iterable of batches is a loader."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from . import tree
from ._progress import track
from ._typing import Array, PyTree
from .batching import Batch, as_batch, batch_size, check_finite


class Averaging(Protocol):
    """How much a batch counts in an average."""

    def weight(self, batch: PyTree) -> float:
        """The weight of a batch."""
        ...


@dataclasses.dataclass(frozen=True)
class PointAveraging:
    """Every example counts alike, so a batch counts by its length.

    Example:
      >>> PointAveraging().weight({"x": jnp.ones((3, 2))})
      3.0
    """

    def weight(self, batch: PyTree) -> float:
        """The number of examples."""
        return float(batch_size(batch, "batch"))


@dataclasses.dataclass(frozen=True)
class ChunkAveraging:
    """Every batch counts alike, however long it is.

    Example:
      >>> ChunkAveraging().weight({"x": jnp.ones((3, 2))})
      1.0
    """

    def weight(self, batch: PyTree) -> float:
        """One."""
        return 1.0


def accumulate(
    fn: Callable[[PyTree], PyTree],
    loader: Iterable[PyTree],
    averaging: Averaging | None = None,
    *,
    progress: bool = False,
) -> PyTree:
    r"""Weighted mean of a function over batches, $\sum_b w_b f(b) / \sum_b w_b$, divided once at the end.

    For what needs not fit in memory at once, e.g. `lambda batch: GGN(objective, params, batch).mv(v)`.

    Args:
      fn: Function of one batch, to a tree of arrays of the same shapes for every batch.
      loader: Re-iterable of batches.
      averaging: `PointAveraging()` (default) or `ChunkAveraging()`.
      progress: Whether to show a bar.

    Returns:
      The mean, float32 or wider.

    Raises:
      TypeError: If the loader is no re-iterable of batches.
      ValueError: If it is empty, holds NaN or infinity, or `fn` returns different shapes.

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
    if not isinstance(loader, list | tuple):
        loader = _reiterable(loader, "loader")
    for item in track(loader, "batches", count_batches(loader), show=progress):
        batch = _checked(item, "loader")
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
    return x.astype(tree.accumulation_dtype(x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.float32))


def _shapes(parts: PyTree) -> PyTree:
    return jax.tree.map(jnp.shape, parts)


def _checked(batch: PyTree, name: str) -> PyTree:
    batch = as_batch(batch, name)
    check_finite(batch, name)
    return batch


def is_batch(data: Any) -> bool:
    """Whether data are one batch: a pytree whose leaves are arrays, except a list of trees or a tuple of `Batch`es."""
    leaves = [leaf for _, leaf in tree.named_leaves(data)]
    is_array = lambda x: isinstance(x, jax.Array | np.ndarray)
    several = isinstance(data, list) and len(data) > 0 and not all(map(is_array, data))
    several |= isinstance(data, tuple) and any(isinstance(item, Batch) for item in data)
    return bool(leaves) and all(map(is_array, leaves)) and not several


def batches(data: Any, name: str) -> Iterator[PyTree]:
    """The batches of a loader, checked one by one; of a batch, itself.

    Raises:
      TypeError: If the data are neither a batch nor re-iterable.
    """
    if is_batch(data):
        yield _checked(data, name)
        return
    for batch in _reiterable(data, name):
        yield _checked(batch, name)


def _reiterable(data: Any, name: str) -> Iterable[PyTree]:
    if not isinstance(data, Iterable):
        raise TypeError(f"{name}: got a {type(data).__name__}, expected a batch, or a re-iterable of batches")
    if isinstance(data, Iterator):
        raise TypeError(
            f"{name}: got the one-shot iterator {data!r}, which cannot be read twice; pass a list or an object whose "
            "__iter__ starts anew"
        )
    return data


def gather(data: Any, name: str) -> PyTree:
    """All batches as one, in memory."""
    parts = list(batches(data, name))
    if not parts:
        raise ValueError(f"{name}: is empty, expected at least one batch")
    kinds = {str((jax.tree.structure(part), [leaf.shape[1:] for leaf in jax.tree.leaves(part)])) for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"{name}: its batches differ by more than their length, {sorted(kinds)}; expected them alike")
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def count_batches(data: Any) -> int | None:
    """How many batches there are, if a loader tells."""
    if is_batch(data):
        return 1
    return len(data) if isinstance(data, Sized) else None
