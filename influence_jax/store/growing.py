"""An array on disk that grows along its training axis, chunk by chunk, with a ledger of finished chunks."""

from __future__ import annotations

import abc
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np

from ..batching import check_positive
from ..scoring import TopK
from .arrays import (
    RECOMPUTE,
    checksum,
    chunk_file,
    chunk_shape,
    create_array,
    grow,
    open_array,
    read_group,
    read_region,
    write_chunk,
    write_group,
)
from .files import Ledger, Lock, writing
from .manifests import differences

Index = tuple[int, ...]


class GrowingStore(abc.ABC):
    """Manifest, array, ledgers and locks of a store; abstract.

    A chunk counts once it is written, durable and in the ledger with a checksum; whatever is missing or damaged is
    recomputed by a writer and refused to a reader.

    Attributes:
      holds: What is stored, which is also the name of the array.
      called: What the store is called in messages.
      kind: What tells this kind of store from others, in its manifest.
      dimensions: Names of the axes, one of which is `"train"`.
    """

    holds: ClassVar[str]
    called: ClassVar[str]
    kind: ClassVar[dict[str, Any]]
    dimensions: ClassVar[tuple[str, ...]]

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._folder = self.path / self.holds
        self._manifest: dict[str, Any] = {}
        self._array: Any = None
        # Of each chunk, the records of its finished contents by their checksum.
        self._records: dict[Index, dict[str, dict[str, Any]]] = {}
        self._lock: Lock | None = None
        self._ledger: Ledger | None = None
        self._process = 0

    @abc.abstractmethod
    def _shape(self, examples: int) -> Index:
        """Shape of the array with so many training examples, by the manifest."""

    @abc.abstractmethod
    def _chunks(self) -> Index:
        """Shape of a chunk, by the manifest."""

    @classmethod
    def create(cls, path: str | os.PathLike) -> Self:
        """A place to write to: a new store, or one that is there and is continued.

        Nothing is on disk until a computation begins to write.

        Args:
          path: Its folder.

        Raises:
          ValueError: If something else is there.
        """
        store = cls(path)
        if store.path.exists() and not store.path.is_dir():
            raise ValueError(f"path: {path} is a file, expected a folder for a {cls.called}; give another path")
        if (store.path / "zarr.json").exists():
            store._read_manifest()
        elif store.path.is_dir():
            names = sorted(entry.name for entry in store.path.iterdir())
            # An interruption can leave these before the store is begun.
            others = [name for name in names if not name.startswith(("lock-", ".zarr.json"))]
            if others:
                raise ValueError(
                    f"path: {path} is a folder with {others[:3]} in it and without the manifest of a {cls.called}; "
                    "give another path, or empty it"
                )
        return store

    @classmethod
    def open(cls, path: str | os.PathLike) -> Self:
        """What is on disk, for reading; of an unfinished computation as far as it is.

        Args:
          path: Its folder.

        Raises:
          FileNotFoundError: If there is no store.
          ValueError: If it is damaged.
        """
        store = cls(path)
        store._read_manifest()
        store._read_ledgers()
        store._array = open_array(store._folder)
        store._check_array(store._array)
        return store

    def _begin(self, wanted: Mapping[str, Any], process: int) -> None:
        """Start to write, or continue, what the manifest says."""
        wanted = json.loads(json.dumps({**self.kind, **wanted}))
        self.close()
        if process == 0:
            with writing(f"a {self.called}", self.path):
                self.path.mkdir(parents=True, exist_ok=True)
        self._process, self._lock = process, Lock(self.path / f"lock-{process}")
        try:
            if process == 0 and not (self.path / "zarr.json").exists():
                write_group(self.path, {**wanted, "complete": False})
            self._read_manifest()
            have = {key: value for key, value in self._manifest.items() if key not in ("complete", "examples")}
            told = differences(have, wanted, "now")
            if told:
                raise ValueError(
                    f"{self.path}: holds {self.holds} of another computation ({told}); give another path, or the "
                    f"arguments and versions of before{', batch_size among them' * ('train_rows' in told)}"
                )
            self._read_ledgers()
            self._array = self._shared_array()
            self._ledger = Ledger(self.path / f"ledger-{process}.jsonl")
        except BaseException:
            self.close()
            raise

    def _read_manifest(self) -> None:
        manifest = read_group(self.path, self.called)
        got = {key: manifest.get(key) for key in self.kind}
        if got != self.kind:
            raise ValueError(f"{self.path}: holds {got}, expected a {self.called}, {self.kind}; give another path")
        self._manifest = manifest

    def _read_ledgers(self) -> None:
        self._records = {}
        for file in sorted(self.path.glob("ledger-*.jsonl")):
            for record in Ledger(file).records:
                self._remember(record)

    def _remember(self, record: dict[str, Any]) -> None:
        index = tuple(record[name] for name in self.dimensions)
        self._records.setdefault(index, {})[record["entries"]] = record

    def _shared_array(self) -> Any:
        """The array; its description says nothing the manifest and the ledgers do not, so it is made again if lost."""
        try:
            array = open_array(self._folder)
            self._check_array(array)
        except (FileNotFoundError, ValueError):
            if self._process != 0:
                raise
            with writing(f"the {self.holds}", self._folder):
                (self._folder / "zarr.json").unlink(missing_ok=True)
            dtype = self._manifest["dtype"]
            array = create_array(self._folder, self._shape(self._extent), dtype, self._chunks(), self.dimensions)
        return grow(self._folder, array, self._shape(self._extent))

    def _check_array(self, array: Any) -> None:
        """Raise if the array's description is not what the manifest says."""
        about, grown = self._manifest, array.shape[self._train] if array.rank == len(self.dimensions) else 0
        examples = about["examples"] if about["complete"] else max(self._extent, grown)
        expected = self._shape(examples), self._chunks(), about["dtype"]
        got = tuple(array.shape), chunk_shape(array), array.dtype.name
        if got != expected:
            raise ValueError(
                f"{self._folder / 'zarr.json'}: is damaged: shape, chunks and dtype are {got}, the manifest says "
                f"{expected}; run the same command again to write it anew"
            )

    @property
    def _train(self) -> int:
        """The axis of training examples."""
        return self.dimensions.index("train")

    @property
    def _extent(self) -> int:
        """How many training examples the finished chunks reach."""
        ends = (record["start"] + record["rows"] for found in self._records.values() for record in found.values())
        return max(ends, default=0)

    def _indices(self, examples: int) -> list[Index]:
        """All chunks of so many training examples."""
        pairs = zip(self._shape(examples), self._chunks(), strict=True)
        return list(itertools.product(*(range(-(-length // size)) for length, size in pairs)))

    def _bounds(self, index: Index, shape: Index) -> list[tuple[int, int]]:
        """Where a chunk starts and stops along each axis of an array of this shape."""
        places = zip(index, self._chunks(), shape, strict=True)
        return [(place * size, min((place + 1) * size, length)) for place, size, length in places]

    def _write(self, index: Index, values: np.ndarray, data: str) -> None:
        """Write a chunk; it is durable and counts as finished on return."""
        ledger, chunks, dtype = self._require_writer(), self._chunks(), self.dtype
        start = index[self._train] * chunks[self._train]
        rows = values.shape[self._train] if values.ndim == len(chunks) else 0
        room = [stop - begin for begin, stop in self._bounds(index, self._shape(start + chunks[self._train]))]
        expected = [rows if axis == self._train else length for axis, length in enumerate(room)]
        if values.dtype != dtype or values.shape != tuple(expected) or not 0 < rows <= chunks[self._train]:
            got = f"shape {values.shape}" if values.dtype == dtype else f"{values.dtype} {values.shape}"
            told = ", ".join(f"at most {size}" if axis == self._train else str(size) for axis, size in enumerate(room))
            raise ValueError(f"{self.holds}: got {got} for chunk {index}, expected {dtype} ({told})")
        if self._process == 0 and self.complete and start + rows > self._manifest["examples"]:
            self._say(complete=False)
        self._array = grow(self._folder, self._array, self._shape(start + rows))
        write_chunk(self._folder, self._array, index, values)
        record = {**dict(zip(self.dimensions, index, strict=True)), "start": start, "rows": rows, "data": data}
        record["entries"] = checksum(values)
        ledger.append(record)
        self._remember(record)

    def _read(self, index: Index) -> tuple[np.ndarray, dict[str, Any]]:
        """A finished chunk, and its record; ValueError if it is not finished, missing or damaged."""
        file = chunk_file(self._folder, index)
        # The one with most examples first: the last chunk is computed anew when there are more than before.
        for record in sorted(self._records.get(index, {}).values(), key=lambda record: -record["rows"]):
            bounds = self._bounds(index, self._shape(record["start"] + record["rows"]))
            values = read_region(self._folder, self._array, bounds)
            if checksum(values) == record["entries"]:
                return values, record
        if index not in self._records:
            raise ValueError(f"{file}: this chunk is not finished; run the same command again to compute it")
        raise ValueError(f"{file}: this chunk holds other {self.holds} than those that were finished; {RECOMPUTE}")

    def _read_whole(self, index: Index) -> tuple[tuple[slice, ...], np.ndarray]:
        """A chunk with all of its training examples, and its place in the array."""
        values, record = self._read(index)
        rows = min(self._chunks()[self._train], self.shape[self._train] - record["start"])
        if record["rows"] != rows:
            file = chunk_file(self._folder, index)
            raise ValueError(f"{file}: this chunk is finished up to {record['rows']} of {rows} examples; {RECOMPUTE}")
        return tuple(slice(*bound) for bound in self._bounds(index, self.shape)), values

    def _blocks(self) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """The array chunk by chunk, training examples innermost: place and values of each."""
        return map(self._read_whole, self._indices(self.shape[self._train]))

    def _finished(self, index: Index) -> str | None:
        """Fingerprint of the batch that a chunk was computed from; None if it is to be computed."""
        self._require_writer()
        try:
            return self._read(index)[1]["data"]
        except ValueError:  # missing or damaged
            return None

    def finish(self, examples: int) -> None:
        """Say that all is computed; of several processes the first does, after the others wrote theirs.

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
        wanted = self._indices(examples)
        missing = [index for index in wanted if index not in self._records]
        if examples < self._extent and not missing:
            raise ValueError(
                f"examples: got {examples}, but {self.path} holds {self.holds} of {self._extent}; give the data of "
                "before, or another path"
            )
        if missing or self._extent != examples or not set(self._records) <= set(wanted):
            held = f"the chunks that are finished hold {self._extent} and lack {missing[:3] or 'none'}"
            raise ValueError(f"examples: got {examples}, but {held}; {RECOMPUTE}")
        self._array = grow(self._folder, open_array(self._folder), self._shape(examples))
        if tuple(self._array.shape) != self._shape(examples):  # grown for a chunk that was never finished
            with writing(f"the shape of the {self.holds}", self._folder):
                self._array = self._array.resize(exclusive_max=self._shape(examples)).result()
        self._say(complete=True, examples=examples)

    def _say(self, **changes: Any) -> None:
        """Change the manifest."""
        changed = {**self._manifest, **changes}
        if changed != self._manifest:
            write_group(self.path, changed)
            self._manifest = changed

    @property
    def manifest(self) -> dict[str, Any]:
        """What was computed from what."""
        return dict(self._manifest)

    @property
    def shape(self) -> Index:
        """Of the array, with as many training examples as there are so far."""
        self._require_array()
        return tuple(self._array.shape)

    @property
    def dtype(self) -> np.dtype:
        """Of the array."""
        self._require_array()
        return jnp.dtype(self._manifest["dtype"])

    @property
    def complete(self) -> bool:
        """Whether all was computed."""
        if not self._manifest.get("complete"):
            return False
        return all(index in self._records for index in self._indices(self._manifest["examples"]))

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(f"copy: got False, but {self.holds} on disk cannot be an array without a copy")
        whole = np.empty(self.shape, self.dtype)
        for places, values in self._blocks():
            whole[places] = values
        return whole.astype(self.dtype if dtype is None else dtype, copy=False)

    def _check_k(self, k: int) -> None:
        check_positive(k, "k")
        examples = self.shape[self._train]
        if k > examples:
            raise ValueError(f"k: got {k}, expected between 1 and {examples}, the number of training examples")

    def close(self) -> None:
        """Let others write; safe to call twice."""
        for held in (self._ledger, self._lock):
            if held is not None:
                held.close()
        self._ledger = self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _require_array(self) -> None:
        if self._array is None:
            raise ValueError(f"{self.path}: nothing is written yet; give the store to the computation first")

    def _require_writer(self) -> Ledger:
        if self._ledger is None:
            name = type(self).__name__
            raise ValueError(
                f"{self.path}: this store is not being written; give {name}.create(path) to the computation"
            )
        return self._ledger

    def __repr__(self) -> str:
        name = f"{type(self).__name__}({os.fspath(self.path)!r}"
        if self._array is None:
            return f"{name}, not begun)"
        what = self._manifest.get("what", self.holds)
        indices = self._indices(self.shape[self._train])
        done = sum(index in self._records for index in indices)
        state = "complete" if self.complete else f"{done} of {len(indices)} chunks so far"
        return f"{name}, {what}, {' x '.join(map(str, self.shape))} {self.dtype}, {state})"


def highest(parts: Iterable[tuple[slice, np.ndarray]], k: int) -> TopK:
    """The k highest entries of each row of a table that comes part by part; ties go to the lower column.

    Args:
      parts: Columns and values of each part, from left to right.
      k: How many, at most as many as there are columns.

    Returns:
      Values and columns, NumPy arrays `(rows, k)`.

    Example:
      >>> highest([(slice(0, 2), np.array([[1, 5]])), (slice(2, 3), np.array([[5]]))], 2).indices
      array([[1, 2]], dtype=int32)
    """
    best: tuple[np.ndarray, ...] = ()
    for columns, part in parts:
        here = part, np.broadcast_to(np.arange(columns.start, columns.stop, dtype=np.int32), part.shape)
        seen = [np.concatenate(both, axis=1) for both in zip(best, here, strict=True)] if best else here
        # Those seen before have lower indices, and a stable sort keeps them first; NaN goes last.
        order = np.argsort(-seen[0], axis=1, kind="stable")[:, :k]
        best = tuple(np.take_along_axis(entries, order, axis=1) for entries in seen)
    return TopK(*best)  # type: ignore[arg-type]
