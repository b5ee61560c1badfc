"""Scores on disk: one zarr array written chunk by chunk, with a ledger of the chunks that are finished."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import tree as trees
from .._typing import PyTree
from .arrays import RECOMPUTE, checksum, create_array, grow, open_array, read_tree, write_chunk, write_group, write_tree
from .files import Ledger, Lock, writing
from .reading import KIND, WHAT, StoredScores


class ScoreStore(StoredScores):
    """Scores `(Q, N)` on disk, which zarr and xarray read, and which an interrupted computation continues.

    A chunk counts once it is written, durable and in the ledger with a checksum; whatever is missing or damaged is
    recomputed by a writer and refused to a reader.  Make one with `create` or `open`.

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

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        self._lock: Lock | None = None
        self._ledger: Ledger | None = None
        self._process = 0

    @classmethod
    def create(cls, path: str | os.PathLike) -> ScoreStore:
        """A place to write scores: a new store, or one that is there and is continued.

        Nothing is on disk until a computation begins to write.

        Args:
          path: Its folder.

        Raises:
          ValueError: If something else is there.
        """
        store = cls(path)
        if store.path.exists() and not store.path.is_dir():
            raise ValueError(f"path: {path} is a file, expected a folder for a {WHAT}; give another path")
        if (store.path / "zarr.json").exists():
            store._read_manifest()
        elif store.path.is_dir():
            names = sorted(entry.name for entry in store.path.iterdir())
            # An interruption can leave these before the store is begun.
            others = [name for name in names if not name.startswith(("lock-", ".zarr.json"))]
            if others:
                raise ValueError(
                    f"path: {path} is a folder with {others[:3]} in it and without the manifest of a {WHAT}; give "
                    "another path, or empty it"
                )
        return store

    @classmethod
    def open(cls, path: str | os.PathLike) -> ScoreStore:
        """The scores that are on disk, for reading; those of an unfinished computation as far as it is.

        Args:
          path: Its folder.

        Raises:
          FileNotFoundError: If there is no store.
          ValueError: If it is damaged.
        """
        store = cls(path)
        store._read_manifest()
        store._read_ledgers()
        store._array = open_array(store._scores)
        store._check_array(store._array)
        return store

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
        sizes = {"queries": queries, "query_rows": query_rows, "train_rows": train_rows, "dtype": np.dtype(dtype).name}
        wanted = json.loads(json.dumps({**KIND, **manifest, **sizes}))
        self.close()
        if process == 0:
            with writing("a score store", self.path):
                self.path.mkdir(parents=True, exist_ok=True)
        self._process, self._lock = process, Lock(self.path / f"lock-{process}")
        try:
            if process == 0 and not (self.path / "zarr.json").exists():
                write_group(self.path, {**wanted, "complete": False})
            self._read_manifest()
            self._check_same(wanted)
            self._read_ledgers()
            self._array = self._shared_array()
            self._ledger = Ledger(self._ledger_file(process))
        except BaseException:
            self.close()
            raise

    def _ledger_file(self, process: int) -> Path:
        return self.path / f"ledger-{process}.jsonl"

    def _check_same(self, wanted: Mapping[str, Any]) -> None:
        """Raise unless the store is of the computation that is wanted."""
        have = {key: value for key, value in self._manifest.items() if key not in ("complete", "examples")}
        have, wanted = _flat(have), _flat(wanted)
        differing = [key for key in {**have, **wanted} if have.get(key) != wanted.get(key)]
        if differing:
            told = "; ".join(f"{key}: {have.get(key)} in the store, {wanted.get(key)} now" for key in differing)
            raise ValueError(
                f"{self.path}: holds scores of another computation ({told}); give another path, or the arguments "
                "and versions of before"
            )

    def _shared_array(self) -> Any:
        """The array; its description says nothing the manifest and the ledgers do not, so it is made again if lost."""
        try:
            array = open_array(self._scores)
            self._check_array(array)
        except (FileNotFoundError, ValueError):
            if self._process != 0:
                raise
            with writing("the scores", self._scores):
                (self._scores / "zarr.json").unlink(missing_ok=True)
            about = self._manifest
            shape, chunks = (about["queries"], self._extent), (about["query_rows"], about["train_rows"])
            array = create_array(self._scores, shape, about["dtype"], chunks, ("query", "train"))
        return grow(self._scores, array, (self._manifest["queries"], self._extent))

    def finished(self, query_block: int, train_block: int) -> str | None:
        """Fingerprint of the batch that a finished chunk was computed from; None if it is to be computed.

        Raises:
          ValueError: If the store is not begun.
        """
        self._require_writer()
        try:
            return self._read_chunk(query_block, train_block)[1]["data"]
        except ValueError:  # missing or damaged
            return None

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
        ledger, about = self._require_writer(), self._manifest
        rows, columns = self._slices(query_block, train_block)
        if scores.dtype != about["dtype"] or scores.ndim != 2 or not 0 < scores.shape[1] <= about["train_rows"]:
            raise ValueError(
                f"scores: got {scores.dtype} {scores.shape} for chunk ({query_block}, {train_block}), expected "
                f"{about['dtype']} ({rows.stop - rows.start}, at most {about['train_rows']})"
            )
        start, count = columns.start, scores.shape[1]
        self._array = grow(self._scores, self._array, (about["queries"], start + count))
        write_chunk(self._scores, self._array, (query_block, train_block), scores)
        record = {"query": query_block, "train": train_block, "start": start, "rows": count, "data": data}
        record["entries"] = checksum(scores)
        ledger.append(record)
        self._remember(record)

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

        Raises:
          OSError: If they cannot be written.
        """
        ledger = self._require_writer()
        if self._process == 0:
            leaves = {name: np.asarray(leaf) for name, leaf in trees.named_leaves(factors)}
            write_tree(self._factor_folder(query_block), leaves)
            ledger.append({"factors": query_block})
            self._factors.add(query_block)

    def _factor_folder(self, query_block: int) -> Path:
        return self.path / "factors" / str(query_block)

    def finish(self, examples: int) -> None:
        """Say that the scores are complete; of several processes the first does, after the others wrote theirs.

        Args:
          examples: N.

        Raises:
          ValueError: If a chunk is not finished.
          OSError: If it cannot be written.
        """
        self._require_writer()
        if self._process != 0:
            return
        self._read_ledgers()
        last = -(-examples // self._manifest["train_rows"]) - 1
        missing = [index for index in self._indices(examples) if index not in self._records]
        if missing or self._extent != examples or any(train > last for _, train in self._records):
            raise ValueError(
                f"examples: got {examples}, but the chunks that are finished hold {self._extent} and lack "
                f"{missing[:3] or 'none'}; {RECOMPUTE}"
            )
        shape = (self._manifest["queries"], examples)
        self._array = grow(self._scores, open_array(self._scores), shape)
        if tuple(self._array.shape) != shape:  # grown for a chunk that was never finished
            with writing("the shape of the scores", self._scores):
                self._array = self._array.resize(exclusive_max=shape).result()
        finished = {**self._manifest, "complete": True, "examples": examples}
        if finished != self._manifest:
            write_group(self.path, finished)
            self._manifest = finished

    def close(self) -> None:
        """Let others write; safe to call twice."""
        for held in (self._ledger, self._lock):
            if held is not None:
                held.close()
        self._ledger = self._lock = None

    def __enter__(self) -> ScoreStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _require_writer(self) -> Ledger:
        if self._ledger is None:
            raise ValueError(
                f"{self.path}: this store is not being written; give ScoreStore.create(path) to the computation"
            )
        return self._ledger


def _flat(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Values as text, those of the versions one by one."""
    versions = manifest.get("versions")
    parts = {f"version of {name}": value for name, value in versions.items()} if isinstance(versions, dict) else {}
    rest = manifest if not parts else {key: value for key, value in manifest.items() if key != "versions"}
    return {key: json.dumps(value, sort_keys=True) for key, value in {**rest, **parts}.items()}
