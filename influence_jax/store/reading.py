"""Reading of stored scores: only what a ledger calls finished and whose checksum fits."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..batching import check_positive
from ..scoring import TopK
from .arrays import RECOMPUTE, checksum, chunk_file, chunk_shape, read_group, read_region
from .files import Ledger

WHAT = "score store"
KIND = {"kind": "scores", "format": 1}


class StoredScores:
    """What of the scores `(Q, N)` is on disk; see `ScoreStore`."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._scores = self.path / "scores"
        self._manifest: dict[str, Any] = {}
        self._array: Any = None
        # Of each chunk (query block, train block), the records of its finished contents by their checksum.
        self._records: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
        self._factors: set[int] = set()

    def _read_manifest(self) -> None:
        manifest = read_group(self.path, WHAT)
        got = {key: manifest.get(key) for key in KIND}
        if got != KIND:
            raise ValueError(f"{self.path}: holds {got}, expected a {WHAT}, {KIND}; give another path")
        self._manifest = manifest

    def _read_ledgers(self) -> None:
        self._records, self._factors = {}, set()
        for file in sorted(self.path.glob("ledger-*.jsonl")):
            for record in Ledger(file).records:
                self._remember(record)

    def _remember(self, record: dict[str, Any]) -> None:
        if "factors" in record:
            self._factors.add(record["factors"])
        else:
            self._records.setdefault((record["query"], record["train"]), {})[record["entries"]] = record

    @property
    def _extent(self) -> int:
        """How many training examples the finished chunks reach."""
        ends = (record["start"] + record["rows"] for found in self._records.values() for record in found.values())
        return max(ends, default=0)

    def _check_array(self, array: Any) -> None:
        """Raise if the array's description is not what the manifest says."""
        about = self._manifest
        examples = about["examples"] if about["complete"] else max(self._extent, array.shape[1])
        expected = ((about["queries"], examples), (about["query_rows"], about["train_rows"]), about["dtype"])
        got = (tuple(array.shape), chunk_shape(array), array.dtype.name)
        if got != expected:
            raise ValueError(
                f"{self._scores / 'zarr.json'}: is damaged: shape, chunks and dtype are {got}, the manifest says "
                f"{expected}; run the same command again to write it anew"
            )

    def _indices(self, examples: int) -> list[tuple[int, int]]:
        """All chunks of so many training examples."""
        about = self._manifest
        queries, trains = -(-about["queries"] // about["query_rows"]), -(-examples // about["train_rows"])
        return list(itertools.product(range(queries), range(trains)))

    def _slices(self, query_block: int, train_block: int) -> tuple[slice, slice]:
        """Rows and columns of a chunk, which may reach beyond the last training example."""
        about = self._manifest
        top, left = query_block * about["query_rows"], train_block * about["train_rows"]
        return slice(top, min(top + about["query_rows"], about["queries"])), slice(left, left + about["train_rows"])

    def _read_chunk(self, query_block: int, train_block: int) -> tuple[np.ndarray, dict[str, Any]]:
        """Scores of a finished chunk, and its record; ValueError if it is not finished, missing or damaged."""
        index = (query_block, train_block)
        file, rows = chunk_file(self._scores, index), self._slices(*index)[0]
        if index not in self._records:
            raise ValueError(f"{file}: this chunk is not finished; run the same command again to compute it")
        for record in self._records[index].values():
            bounds = [(rows.start, rows.stop), (record["start"], record["start"] + record["rows"])]
            values = read_region(self._scores, self._array, bounds)
            if checksum(values) == record["entries"]:
                return values, record
        raise ValueError(f"{file}: this chunk holds other scores than those that were finished; {RECOMPUTE}")

    @property
    def manifest(self) -> dict[str, Any]:
        """What was computed from what."""
        return dict(self._manifest)

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and training examples, of these as many as there are so far."""
        self._require_array()
        return tuple(self._array.shape)

    @property
    def dtype(self) -> np.dtype:
        """Of the scores."""
        self._require_array()
        return np.dtype(self._manifest["dtype"])

    @property
    def complete(self) -> bool:
        """Whether all scores were computed."""
        if not self._manifest.get("complete"):
            return False
        return all(index in self._records for index in self._indices(self._manifest["examples"]))

    def _require_array(self) -> None:
        if self._array is None:
            raise ValueError(f"{self.path}: nothing is written yet; give the store to the computation first")

    def blocks(self) -> Iterator[tuple[slice, slice, np.ndarray]]:
        """The scores chunk by chunk: rows, columns and values of each.

        Raises:
          ValueError: If a chunk is not finished, missing or damaged.
        """
        for index in self._indices(self.shape[1]):
            yield self._block(*index)

    def _block(self, query_block: int, train_block: int) -> tuple[slice, slice, np.ndarray]:
        rows, columns = self._slices(query_block, train_block)
        columns = slice(columns.start, min(columns.stop, self.shape[1]))
        values, record = self._read_chunk(query_block, train_block)
        if record["rows"] != columns.stop - columns.start:
            file = chunk_file(self._scores, (query_block, train_block))
            raise ValueError(f"{file}: this chunk is finished up to {record['rows']} examples; {RECOMPUTE}")
        return rows, columns, values

    def __getitem__(self, key: Any) -> np.ndarray:
        keys = key if isinstance(key, tuple) else (key,)
        if len(keys) > 2 or not all(isinstance(part, slice | int | np.integer) for part in keys):
            raise TypeError(f"got the index {key!r}, expected ints or slices, of queries and of training examples")
        keys += (slice(None),) * (2 - len(keys))
        places = [range(length)[part] for part, length in zip(keys, self.shape, strict=True)]
        rows, columns = (part if isinstance(part, range) else range(part, part + 1) for part in places)
        out = np.empty((len(rows), len(columns)), self.dtype)
        for query_block, train_block in itertools.product(*self._touched(rows, columns)):
            top, left, values = self._block(query_block, train_block)
            to_row, from_row = _overlap(rows, top)
            to_column, from_column = _overlap(columns, left)
            out[np.ix_(to_row, to_column)] = values[np.ix_(from_row, from_column)]
        return out[tuple(slice(None) if isinstance(part, range) else 0 for part in places)]

    def _touched(self, rows: range, columns: range) -> list[list[int]]:
        """Blocks along each axis that hold any of these rows and columns."""
        sizes = (self._manifest["query_rows"], self._manifest["train_rows"])
        return [sorted({place // size for place in part}) for part, size in zip((rows, columns), sizes, strict=True)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("copy: got False, but scores on disk cannot be an array without a copy")
        return self[:, :].astype(self.dtype if dtype is None else dtype, copy=False)

    def __len__(self) -> int:
        return self.shape[0]

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
        check_positive(k, "k")
        queries, examples = self.shape
        if k > examples:
            raise ValueError(f"k: got {k}, expected between 1 and {examples}, the number of training examples")
        best, places = np.empty((queries, k), self.dtype), np.empty((queries, k), np.int32)
        found = 0
        for rows, columns, values in self.blocks():
            found = 0 if columns.start == 0 else found
            seen = np.concatenate([best[rows, :found], values], axis=1)
            here = np.broadcast_to(np.arange(columns.start, columns.stop, dtype=np.int32), values.shape)
            where = np.concatenate([places[rows, :found], here], axis=1)
            # Those seen before have lower indices, and a stable sort keeps them first; NaN goes last.
            order = np.argsort(-seen, axis=1, kind="stable")[:, :k]
            found = order.shape[1]
            best[rows, :found] = np.take_along_axis(seen, order, axis=1)
            places[rows, :found] = np.take_along_axis(where, order, axis=1)
        return TopK(best, places)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        name = f"{type(self).__name__}({os.fspath(self.path)!r}"
        if self._array is None:
            return f"{name}, not begun)"
        what = self._manifest.get("what", "scores")
        indices = self._indices(self.shape[1])
        done = sum(index in self._records for index in indices)
        state = "complete" if self.complete else f"{done} of {len(indices)} chunks so far"
        return f"{name}, {what}, {self.shape[0]} x {self.shape[1]} {self.dtype}, {state})"


def _overlap(places: range, block: slice) -> tuple[np.ndarray, np.ndarray]:
    """Which of the places lie in the block, and where in it."""
    all_places = np.arange(places.start, places.stop, places.step)
    inside = np.flatnonzero((all_places >= block.start) & (all_places < block.stop))
    return inside, all_places[inside] - block.start
