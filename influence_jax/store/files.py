"""Files that survive an interruption at any moment: locks, JSON, ledgers of what is finished, fingerprints of data.

What is written here is either there as a whole or not at all, and whatever is read back is checked first.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from .. import tree as trees
from .._typing import PyTree

_CAUSES = {
    errno.ENOSPC: "free space on this disk",
    errno.EDQUOT: "raise the quota or remove files",
    errno.EROFS: "make the file system writable, or give a path on another one",
    errno.EACCES: "get permission to write there, or give another path",
    errno.EPERM: "get permission to write there, or give another path",
    errno.EFBIG: "raise the limit on the size of files",
}


@contextlib.contextmanager
def writing(what: str, path: str | os.PathLike) -> Iterator[None]:
    """Turn failures to write inside the block into one OSError that says what was written where and what to do.

    Args:
      what: What is being written, e.g. "the scores".
      path: Where.

    Raises:
      OSError: With the number of the failure; libraries that hide it in their messages are searched for it.

    Example:
      >>> with writing("the scores", "/scores"):
      ...     raise OSError(28, "No space left on device")
      Traceback (most recent call last):
      ...
      OSError: [Errno 28] No space left on device, while writing the scores; what is finished is kept: free space on
      this disk, then run the same command again to continue: '/scores'
    """
    try:
        yield
    except BlockingIOError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number is None:
            raise
        cure = _CAUSES.get(number, "remove the cause")
        raise OSError(
            number,
            f"{os.strerror(number)}, while writing {what}; what is finished is kept: {cure}, then run the same command "
            "again to continue",
            os.fspath(path),
        ) from error


def _error_number(error: BaseException | None) -> int | None:
    """The operating system's number of a failure, from the exception, its text, or what caused it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if found := re.search(r"os_error_code='(\d+)'", str(error)):
            return int(found.group(1))
        error = error.__cause__ or error.__context__
    return None


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """An advisory lock on a file, held by one process until `close` or its death.

    Args:
      path: The lock file; it is created, and stays.

    Raises:
      BlockingIOError: If another process, or another lock in this one, holds it.
    """

    def __init__(self, path: str | os.PathLike):
        import fcntl  # not on every platform that can import the package

        with writing("a lock", path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with writing("a lock", path):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 100, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise BlockingIOError(
                errno.EAGAIN,
                f"the store is being written by {owner or 'another process'}; wait until that ends or stop it, then "
                "run the same command again, or give another path",
                os.fspath(Path(path).parent),
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        self._release = weakref.finalize(self, os.close, descriptor)
        _HELD.add(self)
        with contextlib.suppress(OSError):  # for the message above only
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)

    def close(self) -> None:
        """Release the lock; safe to call twice."""
        self._release()


def _release_in_child() -> None:
    # Workers forked by a data loader would keep the lock beyond the death of its owner.
    for lock in list(_HELD):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Replace a JSON file at once: readers see the old value or the new one, whatever happens meanwhile.

    Raises:
      OSError: If it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    with writing("a description", path):
        try:
            with open(temporary, "w") as file:
                json.dump(value, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def read_json(path: str | os.PathLike, what: str) -> Any:
    """The value of a JSON file.

    Args:
      path: The file.
      what: What it holds and what to do if it is damaged, e.g. "manifest of a score store".

    Raises:
      FileNotFoundError: If there is none.
      ValueError: If it is damaged.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, f"there is no {what}", os.fspath(path)) from None
    except ValueError as error:  # malformed JSON or no UTF-8
        raise ValueError(f"{path}: the {what} is damaged ({error}); {RESTORE}") from None


RESTORE = "restore it from a copy, or remove the folder and run the command again"


def sync_folder(path: str | os.PathLike) -> None:
    """Make names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a checksum of itself under "crc32".

    Example:
      >>> sealed({"query": 0})
      {'query': 0, 'crc32': '47d78e63'}
    """
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return {**record, "crc32": f"{zlib.crc32(text.encode()):08x}"}


def unsealed(record: Any) -> dict[str, Any] | None:
    """The record without its checksum, or None if that does not fit."""
    if not isinstance(record, dict):
        return None
    bare = {key: value for key, value in record.items() if key != "crc32"}
    return bare if sealed(bare) == record else None


class Ledger:
    """An append-only list of records, one line of JSON each, durable once `append` returns.

    Every line carries its checksum.  A last line that was cut off by an interruption does not count, and makes way for
    the next one.

    Args:
      path: The file; it is created by the first `append`.

    Attributes:
      records: What is in it.

    Raises:
      ValueError: If a line other than the last is damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.records: list[dict[str, Any]] = []
        self._end = 0  # of the last whole line, in bytes
        self._descriptor: int | None = None
        *lines, torn = (self.path.read_bytes() if self.path.exists() else b"").split(b"\n")
        for number, line in enumerate(lines, 1):
            record = _parsed(line)
            if record is None and number == len(lines) and not torn:
                break
            if record is None:
                raise ValueError(
                    f"{self.path}: line {number} of {len(lines)} is damaged; restore the file from a copy, or remove "
                    "it and run the same command again to recompute what it lists"
                )
            self.records.append(record)
            self._end += len(line) + 1

    def append(self, record: dict[str, Any]) -> None:
        """Add a record.

        Raises:
          OSError: If it cannot be written; the ledger is then as before.
        """
        line = json.dumps(sealed(record), separators=(",", ":")).encode() + b"\n"
        with writing("the ledger", self.path):
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
                sync_folder(self.path.parent)
            if os.fstat(self._descriptor).st_size != self._end:
                os.ftruncate(self._descriptor, self._end)
            written = 0
            while written < len(line):
                written += os.pwrite(self._descriptor, line[written:], self._end + written)
            os.fsync(self._descriptor)
        self._end += len(line)
        self.records.append(record)

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        return unsealed(json.loads(line))
    except ValueError:
        return None


def fingerprint(tree: PyTree) -> str:
    """A hash of the names, dtypes, shapes and bytes of all leaves, the same in every process.

    Args:
      tree: Leaves are arrays (NumPy or JAX, typed keys included) or Python scalars.

    Returns:
      32 hexadecimal digits.

    Raises:
      TypeError: If a leaf is neither.

    Example:
      >>> fingerprint({"w": np.zeros(2), "b": 1.0}) == fingerprint({"w": np.zeros(2), "b": 1})
      False
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, leaf in trees.named_leaves(tree):
        kind, array = entries_of(leaf, name)
        # Lengths keep a name from running into what follows it.
        header = f"{len(name)}:{name}{kind}{array.shape}"
        digest.update(header.encode())
        digest.update(raw_bytes(array))
    return digest.hexdigest()


def entries_of(leaf: Any, name: str) -> tuple[str, np.ndarray]:
    """Return the kind of a leaf, and its entries; of a random key, the numbers it is made of."""
    if isinstance(leaf, bool | int | float | complex | str) and not isinstance(leaf, np.generic):
        return type(leaf).__name__, np.frombuffer(repr(leaf).encode(), np.uint8)
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(leaf.dtype), np.asarray(jax.random.key_data(leaf))
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic) or leaf.dtype == object:
        raise TypeError(f"leaf '{name}' is a {type(leaf).__name__}, expected an array or a Python scalar")
    return str(leaf.dtype), np.asarray(leaf)


def raw_bytes(array: np.ndarray) -> memoryview:
    """The entries in C order, without a copy where they lie so already."""
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # type: ignore[arg-type]
