"""What was measured of retrained models on disk: one zarr array written group of runs by group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from ..batching import check_positive
from .growing import GrowingStore


class OutcomeStore(GrowingStore):
    """Outcomes of retraining on disk, which zarr reads, and which an interrupted computation continues.

    The array is `(runs, numbers)`; run `s * K + k` is that of mask s with key k, and `outcomes` gives it the shape that
    `retrain` returns.  A group of runs counts once it is written, durable and in the ledger with a checksum; whatever
    is missing or damaged is recomputed by a writer and refused to a reader.  Make one with `create` or `open`.

    Args:
      path: Its folder; nothing is created or read before `create` or `open`.

    Raises:
      ValueError: From `create`, if something else is there; from `open` and when reading, if the store is damaged.
      FileNotFoundError: From `open`, if there is no store.

    Example:
      >>> import tempfile
      >>> path = tempfile.mkdtemp() + "/outcomes"
      >>> with OutcomeStore.create(path) as store:
      ...     store.begin({"masks": "half of the data"}, seeds=2, measured=(3,), group=4, dtype="float32")
      ...     store.write(0, np.ones((2, 3), np.float32), data="fingerprint of the masks")
      ...     store.finish(2)
      >>> OutcomeStore.open(path).outcomes().shape
      (1, 2, 3)
    """

    holds: ClassVar[str] = "outcomes"
    called: ClassVar[str] = "store of outcomes"
    kind: ClassVar[dict[str, Any]] = {"kind": "outcomes", "format": 2}
    dimensions: ClassVar[tuple[str, ...]] = ("run", "measured")

    @property
    def _train(self) -> int:
        """The axis it grows along is that of runs."""
        return 0

    def _shape(self, examples: int) -> tuple[int, ...]:
        return (examples, math.prod(self._manifest["measured"]))

    def _chunks(self) -> tuple[int, ...]:
        return (self._manifest["group"], math.prod(self._manifest["measured"]))

    def begin(
        self, manifest: Mapping[str, Any], *, seeds: int | None, measured: Sequence[int], group: int, dtype: Any
    ) -> None:
        """Start to write, or continue; nobody else may write until `close`.

        Args:
          manifest: What is computed from what, values of JSON; a store is continued by the same only.
          seeds: How many keys there are for each mask, K; None for one without an axis of its own.
          measured: Shape of the outcome of a run.
          group: Runs in a chunk.
          dtype: Of the outcomes.

        Raises:
          BlockingIOError: If another process writes.
          ValueError: If the store belongs to another computation or is damaged.
          OSError: If it cannot be written.
        """
        check_positive(group, "group")
        if (self.path / "zarr.json").exists():
            self._read_manifest()
        sizes = {"seeds": seeds, "measured": list(measured), "group": group, "dtype": jnp.dtype(dtype).name}
        self._begin({**manifest, **sizes, "chosen": self.recorded("chosen")}, 0)

    def recorded(self, name: str) -> Any:
        """The entry `name` of the manifest, None where there is none."""
        return self._manifest.get(name)

    def choose(self, way: str) -> None:
        """Record which of several ways to compute was found fastest, for those who continue.

        Args:
          way: Its name.

        Raises:
          ValueError: If the store is not begun.
          OSError: If it cannot be written.
        """
        self._require_writer()
        self._say(chosen=way)

    def finished(self, group: int) -> str | None:
        """What a finished group of runs was computed from; None if it is to be computed.

        Raises:
          ValueError: If the store is not begun.
        """
        return self._finished((group, 0))

    def write(self, group: int, values: np.ndarray, *, data: str) -> None:
        """Write a group of runs; it is durable and counts as finished on return.

        Args:
          group: Which one.
          values: `(runs, *measured)`; fewer runs in the last group.
          data: Fingerprint of what they were computed from.

        Raises:
          ValueError: If the shape or dtype is not that of the group, or the store is not begun.
          OSError: If it cannot be written.
        """
        self._write((group, 0), np.reshape(values, (len(values), -1)), data)

    def outcomes(self) -> np.ndarray:
        """All outcomes, `(S, K, *measured)`, or `(S, *measured)` where there was one key without an axis of its own.

        Raises:
          ValueError: If runs are not finished, missing or damaged.
        """
        self._require_array()
        if not self.complete:
            raise ValueError(f"{self!r}: is not complete; run the same command again to compute the rest")
        seeds = self.recorded("seeds")
        axes = () if seeds is None else (seeds,)
        return np.asarray(self).reshape((-1, *axes, *self.recorded("measured")))
