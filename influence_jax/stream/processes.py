"""Several processes that compute together: who feeds which rows, and what happens when one of them stops."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from .. import tree
from .._typing import Array, PyTree
from ..batching import as_dicts, batch_size as length, check_positive


def connect(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, *, timeout: float = 60
) -> None:
    """Join the other processes, before anything else is asked of JAX; that of a process that stops is told to all.

    `jax.distributed.initialize` with limits that are short enough for people: whoever dies, or raises, makes the others
    stop with an error after at most `timeout` seconds, instead of hanging.

    Args:
      coordinator: `"address:port"` of process 0; found out on TPU, Slurm and other clusters if None.
      processes: How many there are; found out if None.
      process: Which one this is; found out if None.
      timeout: Seconds until a process that is not heard of counts as dead.

    Raises:
      ValueError: If the timeout is not a positive number.
      RuntimeError: If the others are not reached, or JAX is in use already.

    Example:
      >>> connect(timeout=0)
      Traceback (most recent call last):
      ...
      ValueError: timeout: got 0, expected a positive number of seconds
    """
    if not isinstance(timeout, int | float) or not timeout > 0:
        raise ValueError(f"timeout: got {timeout}, expected a positive number of seconds")
    limit = max(1, round(timeout))
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        heartbeat_timeout_seconds=limit,
        shutdown_timeout_seconds=limit,
    )


def agree(*values: int) -> np.ndarray:
    """What every process says, `(processes, len(values))`; waits for all of them."""
    if jax.process_count() == 1:
        return np.asarray([values])
    from jax.experimental import multihost_utils  # starts nothing, but is not needed by one process

    return np.asarray(multihost_utils.process_allgather(np.asarray(values, np.int32)))


def to_host(values: Array) -> np.ndarray:
    """All entries on the host of every process."""
    if values.is_fully_addressable or values.is_fully_replicated:
        return np.asarray(values)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values, tiled=True))


def local_rows(sharding: jax.sharding.Sharding | None, rows: int, name: str) -> slice:
    """Which rows of a block this process feeds.

    Raises:
      ValueError: Unless every process feeds as many rows, in the order of processes.
    """
    if jax.process_count() == 1 or sharding is None or sharding.is_fully_addressable:
        return slice(0, rows)
    indices = sharding.addressable_devices_indices_map((rows,)).values()
    parts = {index[0].indices(rows)[:2] for index in indices if index is not None}
    start, stop = min(part[0] for part in parts), max(part[1] for part in parts)
    share, mine = rows // jax.process_count(), jax.process_index()
    if rows % jax.process_count() or (start, stop) != (mine * share, (mine + 1) * share):
        raise ValueError(
            f"sharding: gives process {mine} the rows {start} to {stop} of {rows} of {name}, expected an equal part "
            f"for each of {jax.process_count()} processes, in their order; put the axis of examples first in the mesh"
        )
    return slice(start, stop)


def check_counts(counts: np.ndarray, share: int, name: str) -> None:
    """Raise unless rows are missing at the end of the block only.

    Args:
      counts: Rows that each process has for a block.
      share: Rows that each should have.
      name: Of the loader.
    """
    short = np.flatnonzero(counts < share)
    if short.size and counts[short[0] + 1 :].any():
        raise ValueError(
            f"{name}: of a block of {share * len(counts)} rows the processes have {counts.tolist()}, so examples would "
            "be missing in the middle; give process p rows p * n to (p + 1) * n of every block of all data, "
            f"n = {share}, e.g. by influence_jax.stream.share"
        )


def share(data: Any, batch_size: int) -> Any:
    """This process's rows of data that every process can reach, as a loader.

    Block b of `batch_size` examples is dealt out in equal parts, process p gets the p-th; so the order of examples is
    that of one process alone.

    Args:
      data: Leaves `(N, ...)`, e.g. memory maps, of which only the process's own rows are read.
      batch_size: Examples in a block over all processes, as in `stream.scores`.

    Returns:
      A re-iterable of batches.

    Raises:
      ValueError: If the batch size is no multiple of the number of processes.

    Example:
      >>> import influence_jax as ij
      >>> [batch.tolist() for batch in ij.stream.share(np.arange(5), batch_size=2)]
      [[0, 1], [2, 3], [4]]
    """
    processes, mine = jax.process_count(), jax.process_index()
    check_positive(batch_size, "batch_size")
    data = as_dicts(data)
    length(data, "data")
    if batch_size % processes:
        raise ValueError(f"batch_size: got {batch_size}, expected a multiple of the {processes} processes")
    return _Share(data, batch_size, batch_size // processes, mine)


class _Share:
    def __init__(self, data: PyTree, block: int, rows: int, mine: int) -> None:
        self._data, self._block, self._rows, self._mine = data, block, rows, mine

    def __iter__(self) -> Iterator[PyTree]:
        total = tree.count(self._data)
        for start in range(self._mine * self._rows, total, self._block):
            stop = min(start + self._rows, total)
            yield jax.tree.map(lambda x, a=start, b=stop: x[a:b], self._data)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Say so when what failed is that another process stopped.

    Raises:
      RuntimeError: In place of the communication's own error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        lost = ("gloo", "connection", "peer", "heartbeat", "unavailable", "coordination", "nccl", "deadline")
        if jax.process_count() == 1 or not any(word in str(error).lower() for word in lost):
            raise
        raise RuntimeError(
            f"process {jax.process_index()} of {jax.process_count()} lost another one, which stopped or cannot be "
            "reached; see its output. What is finished is kept: start all processes again to continue"
        ) from error
