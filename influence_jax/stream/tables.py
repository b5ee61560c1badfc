"""Where scores go, block by block: to memory, or to a store that an interrupted computation continues from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from .. import tree
from .._mesh import compiled
from .._typing import Array, PyTree
from ..influence import Influence
from ..objective import as_objective
from ..store.files import fingerprint
from .identity import of_inverse, of_loss, pinned, pinned_inverse, shape_of
from .loaders import Block, Blocks
from .processes import agree, to_host


class Table(Protocol):
    """Scores by block of queries and block of examples."""

    def has(self, row: int, block: Block) -> bool:
        """Whether that part is finished already."""
        ...

    def put(self, row: int, block: Block, values: Array, queries: int) -> None:
        """Keep scores `(rows of queries, rows)`; those beyond the queries and the examples are dropped."""
        ...

    def factors(self, row: int, like: PyTree) -> PyTree | None:
        """Factors kept earlier."""
        ...

    def keep_factors(self, row: int, factors: PyTree) -> PyTree:
        """Keep factors, and return them as they will be found."""
        ...

    def finish(self, examples: int) -> Any:
        """The whole."""
        ...


class Memory:
    """Scores in memory."""

    def __init__(self) -> None:
        self._rows: dict[int, list[np.ndarray]] = {}

    def has(self, row: int, block: Block) -> bool:
        return False

    def put(self, row: int, block: Block, values: Array, queries: int) -> None:
        self._rows.setdefault(row, []).append(to_host(values)[:queries, : block.count])

    def factors(self, row: int, like: PyTree) -> PyTree | None:
        return None

    def keep_factors(self, row: int, factors: PyTree) -> PyTree:
        return factors

    def finish(self, examples: int) -> np.ndarray:
        return np.concatenate([np.concatenate(self._rows[row], axis=1) for row in sorted(self._rows)])


class Shares:
    """Which chunks of a store this process writes, and from which examples they are."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self.rows = blocks.local.stop - blocks.local.start
        self.processes = jax.process_count() if blocks.several else 1
        self.process = jax.process_index() if blocks.several else 0
        if jax.process_count() > 1 and not blocks.several:
            raise ValueError("sharding: several processes write one store only if the sharding spans all of them")

    def begin(self, begin: Callable[..., None]) -> None:
        """Process 0 begins first, because it makes what is shared."""
        if self.process == 0:
            begin(process=0)
        agree(0)
        if self.process != 0:
            begin(process=self.process)

    def number(self, block: Block) -> int:
        """Of this process's chunk of a block."""
        return block.number * self.processes + self.process

    def count(self, block: Block) -> int:
        """How many examples of a block are this process's."""
        return int(np.clip(block.count - self._blocks.local.start, 0, self.rows))

    def data(self, block: Block, rows: int | None = None) -> str:
        """How many examples, this process's or the first of them, and their fingerprint."""
        part = block.host if rows is None else jax.tree.map(lambda x: x[:rows], block.host)
        return f"{tree.count(part)} {fingerprint(part)}"

    def has(self, store: Any, block: Block, finished: Callable[[int], str | None]) -> bool:
        """Whether every process has finished its chunk, and from the same examples."""
        done, count = True, self.count(block)
        if count:
            before = finished(self.number(block))
            done = before == self.data(block)
            # The last chunk of a shorter loader, whose examples come first here, is computed anew.
            if before is not None and not done and before != self.data(block, int(before.split()[0])):
                start = block.start + self._blocks.local.start
                raise ValueError(
                    f"{self._blocks.name}: examples {start} to {start + count} are not those that {store!r} was "
                    "computed from; give the data of before in the same order, or another path"
                )
        return bool(agree(int(done)).all())

    def local(self, values: Array, axis: int) -> np.ndarray:
        """This process's part of an array that is spread over several along its examples."""
        if self.processes == 1:
            return np.asarray(values)
        sharding = self._blocks.sharding
        assert isinstance(sharding, jax.sharding.NamedSharding)
        spec = jax.sharding.PartitionSpec(*[None] * axis, *sharding.spec[:1])
        values = jax.jit(lambda x: x, out_shardings=jax.sharding.NamedSharding(sharding.mesh, spec))(values)
        size = self._blocks.rows
        parts = {shard.index[axis].indices(size)[0]: shard.data for shard in values.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)], axis=axis)

    def finish(self, finish: Callable[[int], None], examples: int) -> None:
        """Once every process has written what is its."""
        agree(0)
        finish(examples)
        agree(0)


class Stored:
    """Scores in a store."""

    def __init__(self, store: Any, manifest: dict[str, Any], queries: int, query_rows: int, blocks: Blocks) -> None:
        self._store, self._shares = store, Shares(blocks)
        sizes = {"queries": queries, "query_rows": query_rows, "train_rows": self._shares.rows}
        self._shares.begin(partial(store.begin, manifest, **sizes, dtype=manifest["dtype"]))

    def has(self, row: int, block: Block) -> bool:
        return self._shares.has(self._store, block, partial(self._store.finished, row))

    def put(self, row: int, block: Block, values: Array, queries: int) -> None:
        part, count = self._shares.local(values, axis=1), self._shares.count(block)
        if count:
            number, data = self._shares.number(block), self._shares.data(block)
            self._store.write(row, number, check_scores(part[:queries, :count], block.start), data=data)

    def factors(self, row: int, like: PyTree) -> PyTree | None:
        found = self._store.load_factors(row, like)
        return found if bool(agree(int(found is not None)).all()) else None

    def keep_factors(self, row: int, factors: PyTree) -> PyTree:
        kept = jax.tree.map(to_host, factors)
        self._store.save_factors(row, kept)
        return kept

    def finish(self, examples: int) -> Any:
        self._shares.finish(self._store.finish, examples)
        return self._store


def describe(what: str, influence: Influence, queries: list[PyTree] | None, blocks: Blocks) -> dict[str, Any]:
    """Return all that makes scores comparable."""
    objective, params = influence.objective, influence.params
    manifest = describe_gradients(what, objective, params, blocks)
    asked = None
    if queries is not None and (influence.measurement is not None or _kind(queries[0]) != _kind(blocks.head())):
        asked = of_loss(influence.measurement or objective, params, queries[0])
    return {
        **manifest,
        "query": None if queries is None else fingerprint(queries),
        "measurement": asked,
        "inverse": of_inverse(influence.inverse, params),
        "units": "gradient of the query, inverse curvature of the mean loss, gradient of the example; no factor 1/N",
    }


def describe_gradients(what: str, objective: Any, params: PyTree, blocks: Blocks) -> dict[str, Any]:
    """Return all that makes gradients comparable."""
    names = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "numpy": np.__version__}
    found = of_loss(objective, params, blocks.head())
    return {
        "what": what,
        "params": fingerprint(jax.tree.map(to_host, params)),
        "objective": found,
        "losses of the first rows": _first_losses(pinned(as_objective(objective), found), params, blocks),
        "sign": "positive inner product: training on the example lowers the loss of the query",
        "dtype": np.dtype(tree.accumulation_dtype(*(x.dtype for x in jax.tree.leaves(params)))).name,
        "versions": {"influence_jax": version("influence-jax"), **names},
    }


def pin(influence: Influence, manifest: Mapping[str, Any]) -> Influence:
    """Return an influence that is computed by programs compiled for what the manifest says of it."""
    objective = as_objective(influence.objective)
    asked, found = influence.measurement, manifest["measurement"] or manifest["objective"]
    return dataclasses.replace(
        influence,
        objective=pinned(objective, manifest["objective"]),
        inverse=pinned_inverse(influence.inverse, manifest["inverse"]),
        measurement=None if asked is None else pinned(as_objective(asked), found),
    )


def _kind(batch: PyTree) -> Any:
    """Return what a program knows of one example."""
    shapes = [shape_of(leaf) for leaf in jax.tree.leaves(batch)]
    return jax.tree.structure(batch), [(leaf.shape[1:], leaf.dtype) for leaf in shapes]


def _first_losses(objective: Any, params: PyTree, blocks: Blocks) -> dict[str, Any] | None:
    """Return the losses of the first rows, which see what no program shows, e.g. what a callback reads.

    Of several processes none has all of them.
    """
    if blocks.several:
        return None
    rows = jax.tree.map(jnp.asarray, blocks.head())
    losses = np.asarray(_losses(objective, params, rows))
    rounding = max(float(jnp.finfo(x.dtype).eps) for x in [losses, *jax.tree.leaves(params)])
    return {"rows": fingerprint(rows), "tolerance": rounding**0.5, "losses": [repr(float(loss)) for loss in losses]}


@compiled
def _losses(objective: Any, params: PyTree, rows: PyTree) -> Array:
    return jax.vmap(objective, (None, 0))(params, rows)


def check_sink(sink: Any, kind: str, expected: str) -> None:
    """Raise unless it is a store of that kind."""
    if isinstance(sink, type) or getattr(sink, "kind", {}).get("kind") != kind:
        raise TypeError(f"sink: got {sink!r}, expected influence_jax.store.{expected}.create(path)")


def check_scores(values: np.ndarray, start: int) -> np.ndarray:
    """Raise if scores to be kept are not finite."""
    bad = np.flatnonzero(~np.isfinite(values).all(axis=0))
    if bad.size:
        raise ValueError(
            f"scores: those of {bad.size} examples are NaN or infinite, the first of them example {start + bad[0]}; "
            "look at its loss and at how the solves went, nothing of this batch is written"
        )
    return values
