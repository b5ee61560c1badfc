"""Loaders: any re-iterable of batches, read as blocks of a fixed number of examples."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from .. import tree
from .._progress import bar
from .._typing import Array, PyTree
from ..batching import Batch, as_dicts, batch_size, check_batch, check_positive, plain
from ..store.files import fingerprint
from .processes import agree, check_counts, local_rows

T = TypeVar("T")

# Rows of a block cut from arrays that are given whole.
DEFAULT_ROWS = 512
# Examples that a loader is remembered by.
HEAD = 8
# Blocks on their way to the device while another is worked on.
AHEAD = 2


def is_batch(data: Any) -> bool:
    """Whether data are one batch: a pytree whose leaves are arrays.

    Except a list of trees, a list of arrays of different lengths, and a tuple of `Batch`es.
    """
    leaves = [leaf for _, leaf in tree.named_leaves(as_dicts(data))]
    is_array = lambda x: isinstance(x, jax.Array | np.ndarray) or tree.is_foreign(x) or tree.is_sparse(x)
    several = isinstance(data, list) and len(data) > 0 and not (all(map(is_array, data)) and _alike_long(data))
    several |= isinstance(data, tuple) and any(isinstance(item, Batch) for item in data)
    return bool(leaves) and all(map(is_array, leaves)) and not several


def _alike_long(arrays: Sequence[Any]) -> bool:
    return len({jnp.shape(x)[:1] for x in arrays}) == 1


def reiterable(data: Any, name: str) -> Iterable[PyTree]:
    """The loader, if it can be read more than once; a function that makes an iterator is one.

    Raises:
      TypeError: If it cannot, saying what to do.
    """
    if isinstance(data, Iterator):
        raise TypeError(
            f"{name}: got the one-shot iterator {data!r}, which cannot be read twice; pass a list, an object whose "
            "__iter__ starts anew, or a function that makes the iterator, e.g. lambda: generate(path)"
        )
    if isinstance(data, Mapping):
        batch_size(as_dicts(data), name)  # says which of its leaves is no array
    if callable(data) and not isinstance(data, Iterable):
        return _Generator(data, name)
    if not isinstance(data, Iterable):
        raise TypeError(f"{name}: got a {type(data).__name__}, expected a batch, or a re-iterable of batches")
    return data


class _Generator:
    """A function that makes an iterator, as an iterable."""

    def __init__(self, make: Callable[[], Iterable[PyTree]], name: str) -> None:
        self._make, self._name = make, name

    def __iter__(self) -> Iterator[PyTree]:
        made = self._make()
        if not isinstance(made, Iterable):
            raise TypeError(
                f"{self._name}: the function returned a {type(made).__name__}, expected an iterator of batches"
            )
        return iter(made)


def batches(data: Any, name: str) -> Iterator[PyTree]:
    """The batches of a loader on device, checked one by one; of a batch, itself.

    Raises:
      TypeError: If the data are neither a batch nor re-iterable.
    """
    for batch in [checked(data, name)] if is_batch(data) else Ordered(data, name):
        yield jax.tree.map(jnp.asarray, batch)


class Ordered:
    """A loader whose batches are the same each time it is read, as they have to be where results are told by place.

    The first is read once at the beginning, so that one pass is enough to find a loader that shuffles.  Iterating gives
    every batch that has examples, checked, and as it stays when the loader goes on.

    Args:
      data: A re-iterable of batches, or a function that makes an iterator of them.
      name: Of the argument, for messages.
    """

    def __init__(self, data: Any, name: str) -> None:
        self._data, self._name = reiterable(data, name), name
        first = next(self._batches(), None)
        self._seen = [] if first is None else [fingerprint(first)]  # of each batch, as far as it has been read
        self.first_count = 0 if first is None else tree.count(first)
        self.head = None if first is None else jax.tree.map(lambda x: x[:HEAD].copy(), first)

    def _batches(self) -> Iterator[PyTree]:
        return (owned(item, self._name) for item in self._data if not _is_empty(item))

    def __iter__(self) -> Iterator[PyTree]:
        """Batches in order.

        Raises:
          ValueError: If one is not that of before.
        """
        count = 0
        for number, batch in enumerate(self._batches()):
            self._check(number, batch)
            count += 1
            yield batch
        if self._seen and not count:
            raise ValueError(
                f"{self._name}: gave no batch when it was read again; expected the same data each time, so a function "
                "has to make a new iterator at each call"
            )

    @property
    def count(self) -> int | None:
        """How many batches there are, if the loader tells."""
        return count_batches(self._data)

    def _check(self, number: int, batch: PyTree) -> None:
        """Raise if a batch is not that of an earlier pass, or remember it."""
        seen = fingerprint(batch)
        if number == len(self._seen):
            self._seen.append(seen)
        elif seen != self._seen[number]:
            which = "first examples" if number == 0 else f"examples in batch {number}"
            raise ValueError(
                f"{self._name}: its {which} are not those of an earlier pass; expected the same order each time it is "
                "read, e.g. shuffle=False, and no augmentation that is drawn anew"
            )


def owned(batch: PyTree, name: str) -> PyTree:
    """A batch that stays as it is when the loader, which may fill the same arrays again, goes on; checked."""
    return jax.tree.map(lambda x: np.array(x) if isinstance(x, np.ndarray) else x, checked(batch, name))


def checked(batch: PyTree, name: str) -> PyTree:
    """A batch of a loader with numpy or JAX leaves, checked; what its inputs hold is the model's business."""
    batch = plain(batch, name)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(batch)):
        raise TypeError(f"{name}: is traced, but a loader is read on the host; call this outside of jit, vmap and grad")
    check_batch(batch, name)
    return batch


def gather(data: Any, name: str) -> PyTree:
    """All batches as one, in memory."""
    parts = list(batches(data, name))
    if not parts:
        raise ValueError(f"{name}: is empty, expected at least one batch")
    for part in parts:
        _check_alike(part, parts[0], name)
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def count_batches(data: Any) -> int | None:
    """Return how many batches there are, if a loader tells."""
    if is_batch(data):
        return 1
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:  # a length that is not known
        return None


def _check_alike(batch: PyTree, first: PyTree, name: str) -> None:
    """Raise unless the examples of two batches have the same parts, of the same shapes and dtypes."""
    parts, before = (dict(tree.named_leaves(each_)) for each_ in (batch, first))
    if jax.tree.structure(batch) != jax.tree.structure(first):
        raise ValueError(
            f"{name}: its batches differ by more than their length, one has the leaves {sorted(parts)} after "
            f"{sorted(before)}; expected them alike"
        )
    for path, leaf in parts.items():
        one, other = (jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (leaf, before[path]))
        if one.dtype != other.dtype:
            raise ValueError(
                f"{name}: its batches differ by more than their length, leaf '{path}' is {one.dtype} after "
                f"{other.dtype}; expected one dtype"
            )
        if one.shape != other.shape:
            raise ValueError(
                f"{name}: its batches differ by more than their length, leaf '{path}' of an example has shape "
                f"{one.shape} after {other.shape}; expected one shape in all batches, so pad sequences to one length "
                "and leave the padding out of the loss"
            )


class Block(NamedTuple):
    """Consecutive examples of a loader.

    Attributes:
      number: Which block.
      start: Place of its first example.
      count: How many examples; the rows beyond are copies of the last.
      batch: Leaves `(rows, ...)`, on device; the same shapes for every block.
      host: Those of the examples that this process has fed, None if it had none left.
    """

    number: int
    start: int
    count: int
    batch: PyTree
    host: PyTree

    def weights(self, dtype: np.dtype) -> Array:
        """One for each example, zero for the rows beyond, `(rows,)`."""
        return jnp.asarray(np.arange(tree.count(self.batch)) < self.count, dtype)


class Blocks:
    """A loader as blocks of equal shapes, as often as one likes, memory flat in the number of examples.

    Args:
      data: A re-iterable of batches of any lengths, a function that makes an iterator of them, or arrays given whole,
        such as memory maps.  Of several processes each gives its own rows, see `processes.share`.
      name: Of the argument, for messages.
      rows: Examples per block, over all processes; as many as the first batches have if None, for arrays given whole
        at most 512.
      sharding: Where each block goes; the default device if None.
      bar: What to write beside the bar of each pass; no bars if None.
    """

    def __init__(
        self,
        data: Any,
        name: str,
        rows: int | None = None,
        sharding: jax.sharding.Sharding | None = None,
        bar: str | None = None,
    ) -> None:
        self.name, self.sharding, self.bar = name, sharding, bar
        self._passes = self._read = 0
        self.sound = False  # once all losses have been found to be finite
        self.psd: bool | None = None  # of curvature over it, once somebody has asked
        self._whole = whole = is_batch(data)
        self._data = as_dicts(data) if whole else Ordered(data, name)
        if rows is not None:
            check_positive(rows, "batch_size")
        shards = 1 if sharding is None else shard_count(sharding, name)
        several = sharding is not None and not sharding.is_fully_addressable
        processes = jax.process_count() if several else 1
        if rows is None:
            first = batch_size(self._data, name) if whole else self._data.first_count
            if first == 0:
                raise ValueError(f"{name}: is empty, expected at least one batch")
            rows = -(-processes * min(first, DEFAULT_ROWS if whole else first) // shards) * shards
        elif rows % shards:
            raise ValueError(f"batch_size: got {rows}, expected a multiple of the {shards} shards it is split over")
        self.rows = rows
        self.several = several
        self.local = local_rows(sharding, rows, name)
        # Known once it has been read.
        self.examples: int | None = batch_size(self._data, name) if whole and not several else None

    def head(self) -> PyTree:
        """Return a few examples, the first of those that this process feeds."""
        if not self._whole:
            if self._data.head is None:
                raise ValueError(f"{self.name}: is empty, expected at least one batch")
            return self._data.head
        return checked(_rows(self._data, 0, min(HEAD, self._share, batch_size(self._data, self.name))), self.name)

    def __iter__(self) -> Iterator[Block]:
        """Blocks in order, the next ones on their way to the device already.

        Raises:
          ValueError: If the loader is empty, or gives another number of examples than before.
        """
        self._passes += self.bar is not None
        note = f"pass {self._passes}" if self._passes > 1 else ""
        items = len(self._starts()) if self._whole else self._data.count
        with bar(self.bar or "", items, show=self.bar is not None) as advance:
            advance(0, note)
            for block, read in self._ahead():
                yield block
                del block  # its memory is free while the next is read
                advance(read, note)

    def _ahead(self) -> Iterator[tuple[Block, int]]:
        """Blocks, and how many items of the loader were read for each; the next are on their way already."""
        waiting: deque[tuple[Block, int]] = deque()
        self._read = 0
        for block in self._placed():
            waiting.append((block, self._read))
            self._read = 0
            del block
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting

    def _placed(self) -> Iterator[Block]:
        start = 0
        for number, (part, count) in enumerate(self._agreed()):
            yield Block(number, start, count, self._place(part), None if count == 0 else part)
            start += count
        if start == 0:
            raise ValueError(f"{self.name}: is empty, expected at least one batch")
        if self.examples not in (None, start):
            raise ValueError(
                f"{self.name}: gave {start} examples in this pass and {self.examples} in an earlier one; expected the "
                "same data each time it is read"
            )
        self.examples = start

    def _agreed(self) -> Iterator[tuple[PyTree, int]]:
        """This process's pieces, and how many examples all processes have for each block."""
        if not self.several:
            yield from ((part, tree.count(part)) for part in self.pieces())
            return
        pieces, last, ended = self.pieces(), None, False
        while True:
            part = next(pieces, None)
            mine = 0 if part is None else tree.count(part)
            counts = agree(mine)[:, 0]
            if not counts.any():
                return
            if ended:
                raise ValueError(f"{self.name}: a process has rows left after another's last; expected equal shares")
            check_counts(counts, self._share, self.name)
            if part is None and last is None:
                raise ValueError(f"{self.name}: is empty for process {jax.process_index()}; use fewer processes")
            last = part if part is not None else jax.tree.map(lambda x: x[:0], last)
            ended = int(counts.sum()) < self.rows
            yield last, int(counts.sum())

    @property
    def _share(self) -> int:
        """Rows of a block that come from this process."""
        return self.local.stop - self.local.start

    def _place(self, part: PyTree) -> PyTree:
        fill = self._share - tree.count(part)
        if fill:
            part = jax.tree.map(lambda x: on_entries(lambda entries: _filled(entries, fill), x), part)
        if self.several:
            shape = lambda x: (self.rows, *x.shape[1:])
            local = lambda x: jax.make_array_from_process_local_data(self.sharding, x, shape(x))
            return jax.tree.map(lambda x: on_entries(local, x), part)
        return jax.device_put(jax.tree.map(jnp.asarray, part) if self.sharding is None else part, self.sharding)

    def _starts(self) -> range:
        """Where the pieces of arrays given whole begin."""
        return range(0, batch_size(self._data, self.name), self._share)

    def pieces(self) -> Iterator[PyTree]:
        """Pieces of as many examples as this process feeds, the last one shorter."""
        if self._whole:
            for start in (starts := self._starts()):
                self._read += 1
                yield checked(_rows(self._data, start, min(start + self._share, starts.stop)), self.name)
            return
        held: list[PyTree] = []
        size, first = 0, None
        for batch in self._data:
            self._read += 1
            first = jax.tree.map(lambda x: x[:1], batch) if first is None else first
            _check_alike(batch, first, self.name)
            held.append(batch)
            size += tree.count(batch)
            if size >= self._share:
                merged, place = _joined(held), 0
                while size - place >= self._share:
                    yield _rows(merged, place, place + self._share)
                    place += self._share
                held = [_rows(merged, place, size)] if size > place else []
                size -= place
        if held:
            yield _joined(held)


def _filled(x: np.ndarray, rows: int) -> np.ndarray:
    """Append copies of the last row, or zeros where there is none."""
    more = np.repeat(x[-1:], rows, axis=0) if len(x) else np.zeros((rows, *x.shape[1:]), x.dtype)
    return np.concatenate([x, more])


def on_entries(fn: Callable[..., Any], *leaves: Any) -> Any:
    """Apply a function of NumPy arrays to leaves of batches; to random keys, by the numbers they are made of."""
    if not jnp.issubdtype(leaves[0].dtype, jax.dtypes.prng_key):
        return fn(*map(np.asarray, leaves))
    entries = fn(*(np.asarray(jax.random.key_data(keys)) for keys in leaves))
    return jax.random.wrap_key_data(jnp.asarray(entries), impl=jax.random.key_impl(leaves[0]))


def paced(results: Iterable[T]) -> Iterator[T]:
    """Results as they are dispatched, at most two ahead of the device, so that batches do not pile up there."""
    before = None
    for result in results:
        if before is not None:
            jax.block_until_ready(before)
        before = result
        yield result


def _rows(batch: PyTree, start: int, stop: int) -> PyTree:
    return jax.tree.map(lambda x: x if start == 0 and stop == x.shape[0] else x[start:stop], batch)


def _is_empty(batch: PyTree) -> bool:
    """Whether a batch has no examples, as some loaders' last one."""
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch) if hasattr(leaf, "shape")}
    return lengths == {(0,)}


def _joined(parts: Sequence[PyTree]) -> PyTree:
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *leaves: on_entries(lambda *entries: np.concatenate(entries), *leaves), *parts)


def shard_count(sharding: Any, name: str) -> int:
    """Over how many shards a sharding splits examples.

    Raises:
      TypeError: If it is no sharding of a mesh.
    """
    if not isinstance(sharding, jax.sharding.NamedSharding):
        raise TypeError(
            f"sharding: got {sharding!r} for {name}, expected a jax.sharding.NamedSharding such as "
            'NamedSharding(mesh, PartitionSpec("data"))'
        )
    if not sharding.spec or any(axis is not None for axis in sharding.spec[1:]) or len(sharding.spec) > 1:
        raise ValueError(
            f"sharding: got {sharding.spec} for {name}, expected a layout of the first axis, that of examples, alone, "
            'e.g. PartitionSpec("data")'
        )
    return len({str(index) for index in sharding.devices_indices_map((2**20 * 3 * 5 * 7,)).values()})
