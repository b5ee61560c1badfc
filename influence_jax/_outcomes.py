"""Where outcomes of runs go, group by group: to memory, or to a store that says what they are computed from."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Protocol

import jax
import jaxlib
import numpy as np

from . import batching
from ._runs import Runs
from ._typing import PyTree
from .store.files import fingerprint
from .store.outcomes import OutcomeStore
from .stream.identity import named


class Table(Protocol):
    """Where outcomes go, group by group.

    Attributes:
      chosen: The way that was found to be the fastest, None if that is not known.
    """

    chosen: str | None

    def has(self, number: int) -> bool:
        """Whether a group is finished already."""
        ...

    def put(self, number: int, values: PyTree) -> None:
        """Keep a group."""
        ...

    def choose(self, way: str) -> None:
        """Keep which way was the fastest."""
        ...

    def finish(self) -> PyTree:
        """All outcomes, leaves `(runs, ...)`."""
        ...

    def close(self) -> None:
        """Let others write."""
        ...


class Memory:
    """Outcomes in memory."""

    chosen: str | None = None

    def __init__(self) -> None:
        self._parts: list[PyTree] = []

    def has(self, number: int) -> bool:
        return False

    def put(self, number: int, values: PyTree) -> None:
        self._parts.append(values)

    def choose(self, way: str) -> None:
        pass

    def finish(self) -> PyTree:
        return jax.tree.map(lambda *x: np.concatenate(x), *self._parts)

    def close(self) -> None:
        pass


class Stored:
    """Outcomes in a store."""

    def __init__(self, sink: OutcomeStore, runs: Runs, manifest: dict[str, Any]) -> None:
        like = runs.like()
        if not isinstance(like, jax.ShapeDtypeStruct):
            raise TypeError(
                f"measure: gives {batching.describe(like)}, but a store keeps one array of each run; flatten it, e.g. "
                "measure=lambda params: influence_jax.flatten(params, params)"
            )
        if 0 in like.shape:
            raise ValueError(f"measure: gives shape {like.shape}, expected something for a store to keep")
        self._sink, self._runs, self._shape = sink, runs, (runs.count, *like.shape)
        sink.begin(manifest, seeds=runs.seeds, measured=like.shape, group=runs.group, dtype=like.dtype)
        self.chosen: str | None = sink.recorded("chosen")

    def has(self, number: int) -> bool:
        before, now = self._sink.finished(number), self._runs.data(number)
        if before is None or before == now:
            return before == now
        rows = int(before.split()[0])
        if rows > self._runs.size(number) or before != self._runs.data(number, rows):
            mask = self._runs.pair(number * self._runs.group)[0]
            raise ValueError(
                f"masks: from mask {mask} on they are not those that {self._sink!r} was computed from; give the masks "
                "of before, and further ones only behind them, or another path"
            )
        return False  # the last group, which is longer now

    def put(self, number: int, values: PyTree) -> None:
        self._sink.write(number, values, data=self._runs.data(number))

    def choose(self, way: str) -> None:
        self._sink.choose(way)

    def finish(self) -> PyTree:
        held = self._sink.shape[0]
        if held > self._runs.count:
            raise ValueError(
                f"masks: got {len(self._runs.masks)} with {self._runs.count} runs, but {self._sink.path} holds "
                f"outcomes of {held} runs; give all masks of before, or another path"
            )
        self._sink.finish(self._runs.count)
        return np.asarray(self._sink).reshape(self._shape)

    def close(self) -> None:
        self._sink.close()


def describe(train_fn: Any, measure: Any, runs: Runs, how: str) -> dict[str, Any]:
    """Return all that makes outcomes comparable, the masks apart, of which there may be more later."""
    names = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "numpy": np.__version__}
    trained, measured = runs.identities()
    return {
        "what": "outcomes of retraining",
        "train_fn": trained,
        "measure": measured,
        "about": {"train_fn": named(train_fn), "measure": named(measure)},
        "examples of a mask": runs.masks.shape[1],
        "weights": runs.dtype.name,
        "keys": fingerprint(runs.keys),
        "how": how,
        "platform": jax.default_backend(),
        "devices": runs.devices,
        "versions": {"influence_jax": version("influence-jax"), **names},
    }
