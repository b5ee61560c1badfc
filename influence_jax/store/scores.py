"""Scores on disk: one zarr array written chunk by chunk, with a ledger of the chunks that are finished."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .. import tree as trees
from .._typing import PyTree
from ..scoring import TopK
from .arrays import read_tree, write_tree
from .growing import GrowingStore, highest


class ScoreStore(GrowingStore):
    """Scores `(Q, N)` on disk, which zarr and xarray read, and which an interrupted computation continues.

    A chunk counts once it is written, durable and in the ledger with a checksum; whatever is missing or damaged is
    recomputed by a writer and refused to a reader.  Make one with `create` or `open`.

    Positive scores are helpful.

    Args:
      path: Its folder; nothing is created or read before `create` or `open`.

    Raises:
      ValueError: From `create`, if something else is there; from `open` and when reading, if the store is damaged.
      FileNotFoundError: From `open`, if there is no store.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/scores"
      >>> with ScoreStore.create(path) as store:
      ...     store.begin({"what": "influences"}, queries=2, query_rows=2, train_rows=4, dtype="float32")
      ...     store.write(0, 0, np.ones((2, 3), np.float32), data="fingerprint of the batch")
      ...     store.finish(3)
      >>> ScoreStore.open(path)[1]
      array([1., 1., 1.], dtype=float32)
    """

    holds: ClassVar[str] = "scores"
    called: ClassVar[str] = "score store"
    kind: ClassVar[dict[str, Any]] = {"kind": "scores", "format": 2}
    dimensions: ClassVar[tuple[str, ...]] = ("query", "train")

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        self._factors: set[int] = set()

    def _shape(self, examples: int) -> tuple[int, ...]:
        return (self._manifest["queries"], examples)

    def _chunks(self) -> tuple[int, ...]:
        return (self._manifest["query_rows"], self._manifest["train_rows"])

    def _read_ledgers(self) -> None:
        self._factors = set()
        super()._read_ledgers()

    def _remember(self, record: dict[str, Any]) -> None:
        if "factors" in record:
            self._factors.add(record["factors"])
        else:
            super()._remember(record)

    def begin(
        self,
        manifest: Mapping[str, Any],
        *,
        queries: int,
        query_rows: int,
        train_rows: int,
        dtype: Any,
        process: int = 0,
    ) -> None:
        """Start to write, or continue; nobody else may write until `close`.

        Args:
          manifest: What is computed from what, values of JSON; a store is continued by the same only.
          queries: Q.
          query_rows: Queries in a chunk.
          train_rows: Training examples in a chunk.
          dtype: Of the scores.
          process: Which process this is; 0 creates what is shared, the others come after it.

        Raises:
          BlockingIOError: If another process writes.
          ValueError: If the store belongs to another computation or is damaged.
          OSError: If it cannot be written.
        """
        sizes = {"queries": queries, "query_rows": query_rows, "train_rows": train_rows}
        self._begin({**manifest, **sizes, "dtype": jnp.dtype(dtype).name}, process)

    def finished(self, query_block: int, train_block: int) -> str | None:
        """Fingerprint of the batch that a finished chunk was computed from; None if it is to be computed.

        Args:
          query_block: Which block of queries.
          train_block: Which block of training examples.

        Raises:
          ValueError: If the store is not begun.
        """
        return self._finished((query_block, train_block))

    def write(self, query_block: int, train_block: int, scores: np.ndarray, *, data: str) -> None:
        """Write a chunk; it is durable and counts as finished on return.

        Args:
          query_block: Which block of queries.
          train_block: Which block of training examples.
          scores: `(query_rows, train_rows)`, or shorter in the last blocks.
          data: Fingerprint of the batch they were computed from.

        Raises:
          ValueError: If the shape or dtype is not that of the chunk, or the store is not begun.
          OSError: If it cannot be written.
        """
        self._write((query_block, train_block), scores, data)

    def load_factors(self, query_block: int, like: PyTree) -> PyTree | None:
        """Factors of a block of queries; None if they are not there, or not as expected, or damaged.

        Args:
          query_block: Which block of queries.
          like: Tree of shapes and dtypes.

        Returns:
          A tree like `like` of NumPy arrays, or None.
        """
        self._require_writer()
        if query_block not in self._factors:
            return None
        try:
            leaves = read_tree(self._factor_folder(query_block))
        except (FileNotFoundError, ValueError):
            return None
        expected = {name: (tuple(leaf.shape), leaf.dtype) for name, leaf in trees.named_leaves(like)}
        if {name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()} != expected:
            return None
        return jax.tree.structure(like).unflatten([leaves[name] for name in expected])

    def save_factors(self, query_block: int, factors: PyTree) -> None:
        """Keep the factors of a block of queries; of several processes the first does.

        Args:
          query_block: Which block of queries.
          factors: Leaves `(rows, *leaf)`.

        Raises:
          OSError: If they cannot be written.
        """
        ledger = self._require_writer()
        if self._process == 0:
            leaves = {name: np.asarray(leaf) for name, leaf in trees.named_leaves(factors)}
            write_tree(self._factor_folder(query_block), leaves)
            record = {"factors": query_block}
            ledger.append(record)
            self._remember(record)

    def _factor_folder(self, query_block: int) -> Path:
        return self.path / "factors" / str(query_block)

    def blocks(self) -> Iterator[tuple[slice, slice, np.ndarray]]:
        """The scores chunk by chunk: rows, columns and values of each.

        Raises:
          ValueError: If a chunk is not finished, missing or damaged.
        """
        for (rows, columns), scores in self._blocks():
            yield rows, columns, scores

    def top_k(self, k: int) -> TopK:
        """The k most helpful training examples of each query, read chunk by chunk; ties go to the lower index.

        Args:
          k: How many, `1 <= k <= N`.

        Returns:
          Scores and places, NumPy arrays `(Q, k)`.

        Raises:
          TypeError: If k is not an int.
          ValueError: If k is not between 1 and N, or a chunk is not finished, missing or damaged.
        """
        self._check_k(k)
        by_queries = itertools.groupby(self.blocks(), key=lambda block: block[0].start)
        found = [highest(((columns, scores) for _, columns, scores in blocks), k) for _, blocks in by_queries]
        return TopK(*(np.concatenate(parts) for parts in zip(*found, strict=True)))  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> np.ndarray:
        keys = key if isinstance(key, tuple) else (key,)
        lists = [isinstance(part, list | np.ndarray) for part in keys]
        if len(keys) > 2 or sum(lists) > 1 or not all(map(_is_index, keys)):
            raise TypeError(
                f"got the index {key!r}, expected ints or slices, of queries and of training examples, or one list "
                "of ints"
            )
        keys += (slice(None),) * (2 - len(keys))
        places = [np.arange(length)[part] for part, length in zip(keys, self.shape, strict=True)]
        wanted = [np.atleast_1d(part) for part in places]
        touched = [np.unique(part // size) for part, size in zip(wanted, self._chunks(), strict=True)]
        out = np.empty([len(part) for part in wanted], self.dtype)
        for index in itertools.product(*(part.tolist() for part in touched)):
            block, scores = self._read_whole(index)
            overlaps = [_overlap(part, along) for part, along in zip(wanted, block, strict=True)]
            into, taken = zip(*overlaps, strict=True)
            out[np.ix_(*into)] = scores[np.ix_(*taken)]
        return out[tuple(slice(None) if part.ndim else 0 for part in places)]


def _is_index(part: Any) -> bool:
    """Tell whether it is an int, a slice, or a list of ints or truth values."""
    if isinstance(part, list | np.ndarray):
        array = np.asarray(part)
        return array.ndim == 1 and (array.dtype.kind in "biu" or array.size == 0)
    return isinstance(part, slice | int | np.integer)


def _overlap(places: np.ndarray, block: slice) -> tuple[np.ndarray, np.ndarray]:
    """Return which of the places lie in the block, and where in it."""
    inside = np.flatnonzero((places >= block.start) & (places < block.stop))
    return inside, places[inside] - block.start
