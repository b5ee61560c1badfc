r"""Scores of data that are read batch by batch: one solve per query, memory flat in the number of examples."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from .. import tree
from .._memory import memory_errors
from .._mesh import compiled
from .._sound import Watch, look
from .._typing import Array, PyTree
from ..batching import as_dicts, batch_size as length, check_finite, check_positive
from ..curvature import Identity
from ..influence import Influence, _up, look_at_factors
from ..scoring import Best, TopK, merge_best
from ..store.scores import ScoreStore
from .loaders import Block, Blocks, is_batch
from .processes import to_host, together
from .tables import Memory, Stored, Table, check_sink, describe, pin


@overload
def scores(
    influence: Influence,
    query: Any,
    loader: Iterable[PyTree],
    sink: None = None,
    progress: bool = True,
    *,
    batch_size: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> np.ndarray: ...
@overload
def scores(
    influence: Influence,
    query: Any,
    loader: Iterable[PyTree],
    sink: ScoreStore,
    progress: bool = True,
    *,
    batch_size: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> ScoreStore: ...
@memory_errors("stream.scores")
def scores(
    influence: Influence,
    query: Any,
    loader: Iterable[PyTree],
    sink: Any = None,
    progress: bool = True,
    *,
    batch_size: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Any:
    r"""Influence of every example of a loader on every query, $\nabla f_q^\top P \nabla\ell_i$.

    One solve per query; then one pass over the loader for each block of queries.  With a store as sink the factors
    and every finished block are kept, and the same call continues where it was interrupted, whatever interrupted it.

    Positive: training on the example lowers the query's loss, as everywhere.

    Args:
      influence: Objective, parameters and inverse; the inverse may read a loader itself (`stream.invert`).
      query: A batch, or a loader of batches of queries, whose factors are then in memory one batch at a time.
      loader: Re-iterable of batches, always in the same order, a function that makes an iterator of them, or arrays
        given whole (memory maps).  Of several processes each gives its own rows, see `share`.
      sink: A `store.ScoreStore`; memory if None.
      progress: Whether to show a bar.
      batch_size: Examples on device at once; the length of the first batch if None.
      sharding: Where batches go, e.g. `NamedSharding(mesh, PartitionSpec("data"))`.

    Returns:
      `(Q, N)` NumPy array, in the order of the loader, or the store.

    Raises:
      TypeError: If the influence or the loader is none, e.g. a one-shot iterator.
      ValueError: If a batch is malformed or holds NaN or infinity; if the store is of another computation or other
        data.
      ConvergenceError: If a solve fails and `influence.throw`.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: 0.5 * (params["w"] * z) ** 2
      >>> params = {"w": jnp.array(1.0)}
      >>> influence = ij.Influence(f, params, ij.Identity(params))
      >>> ij.stream.scores(influence, jnp.array([1.0]), [jnp.array([1.0, 2.0]), jnp.array([3.0])]).tolist()
      [[1.0, 4.0, 9.0]]
    """
    _check_influence(influence)
    queries, count = _queries(query)
    blocks = Blocks(loader, "loader", batch_size, sharding, "scores" if progress else None)
    influence.check_query(queries[0].batch, blocks.head(), "loader")
    with together(), _table(sink, "scores", influence, queries, count, blocks) as (table, influence):
        losses, watches = _without_inverse(influence), _watches(influence, kept=sink is not None)
        for row, block in enumerate(queries):
            factors = _Factors(influence, row, block, table, watches[0])
            watch = watches[1] if row == 0 else None  # the losses of examples are the same for all queries
            _fill(table, row, block.count, blocks, lambda part, f=factors: _up(losses, f.get(), part), watch)
        finished = table.finish(blocks.examples or 0)
    _warn(watches)
    return finished


@memory_errors("stream.influence_factors")
def influence_factors(influence: Influence, query: Any, progress: bool = True) -> PyTree:
    r"""Factors $P\,\nabla f_q$ of every query of a loader, leaves `(Q, *leaf)`; as `Influence.influence_factors`.

    Args:
      influence: Objective, parameters and inverse.
      query: Re-iterable of batches, a function that makes an iterator of them, or a batch.
      progress: Whether to show a bar.

    Returns:
      Tree like the parameters.

    Raises:
      TypeError, ValueError: As `scores`.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: 0.5 * (params["w"] * z) ** 2
      >>> params = {"w": jnp.array(1.0)}
      >>> influence = ij.Influence(f, params, ij.Identity(params))
      >>> ij.stream.influence_factors(influence, [jnp.array([1.0, 2.0]), jnp.array([3.0])])["w"].tolist()
      [1.0, 4.0, 9.0]
    """
    _check_influence(influence)
    blocks = Blocks(query, "query", bar="factors" if progress else None)
    influence.check_query(blocks.head())
    watch = influence.query_watch("factors")
    parts = [jax.tree.map(lambda x, n=block.count: x[:n], _solved(influence, block, watch)) for block in blocks]
    watch.warn()
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


@overload
def self_influences(
    influence: Influence,
    loader: Iterable[PyTree],
    sink: None = None,
    progress: bool = True,
    *,
    batch_size: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> np.ndarray: ...
@overload
def self_influences(
    influence: Influence,
    loader: Iterable[PyTree],
    sink: ScoreStore,
    progress: bool = True,
    *,
    batch_size: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> ScoreStore: ...
@memory_errors("stream.self_influences")
def self_influences(
    influence: Influence,
    loader: Iterable[PyTree],
    sink: Any = None,
    progress: bool = True,
    *,
    batch_size: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Any:
    r"""Influence of every example of a loader on itself, $\nabla\ell_i^\top P \nabla\ell_i$.

    Takes a solve per example: with an inverse that reads a loader, several passes for each block.

    Args:
      influence: Objective, parameters and inverse.
      loader: As in `scores`.
      sink: A `store.ScoreStore`, which then has one row; memory if None.
      progress: Whether to show a bar.
      batch_size: Examples on device at once; the length of the first batch if None.
      sharding: Where batches go.

    Returns:
      `(N,)` NumPy array, or the store.

    Raises:
      TypeError, ValueError, ConvergenceError: As `scores`.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: 0.5 * (params["w"] * z) ** 2
      >>> params = {"w": jnp.array(1.0)}
      >>> influence = ij.Influence(f, params, ij.Identity(params))
      >>> ij.stream.self_influences(influence, [jnp.array([1.0, 2.0]), jnp.array([3.0])]).tolist()
      [1.0, 16.0, 81.0]
    """
    _check_influence(influence)
    blocks = Blocks(loader, "loader", batch_size, sharding, "self-influences" if progress else None)

    watches = _watches(influence, kept=sink is not None)
    with together(), _table(sink, "self_influences", influence, None, 1, blocks) as (table, at_hand):
        _fill(table, 0, 1, blocks, lambda part: at_hand.self_influences_untold(part)[None], watches[1])
        whole = table.finish(blocks.examples or 0)
    _warn(watches)
    return whole[0] if sink is None else whole


@memory_errors("stream.top_k")
def top_k(
    influence: Influence,
    query: Any,
    loader: Iterable[PyTree],
    k: int,
    progress: bool = True,
    *,
    batch_size: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> TopK:
    """The k most helpful examples of a loader for each query; memory grows with `Q (k + batch)`, not with N.

    The most harmful are those of an `Influence` with `measurement=lambda params, z: -objective(params, z)`.

    Args:
      influence: Objective, parameters and inverse.
      query: A batch, or a loader of batches of queries.
      loader: As in `scores`.
      k: How many.
      progress: Whether to show a bar.
      batch_size: Examples on device at once; the length of the first batch if None.
      sharding: Where batches go.

    Returns:
      `TopK(values, indices)` of NumPy arrays `(Q, k)`, descending; indices count the loader's examples.  Ties go to the
      lower index.

    Raises:
      TypeError, ValueError, ConvergenceError: As `scores`; if k is not between 1 and N.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: 0.5 * (params["w"] * z) ** 2
      >>> params = {"w": jnp.array(1.0)}
      >>> influence = ij.Influence(f, params, ij.Identity(params))
      >>> ij.stream.top_k(influence, jnp.array([1.0]), [jnp.array([1.0, 3.0]), jnp.array([2.0])], 2).indices.tolist()
      [[1, 2]]
    """
    _check_influence(influence)
    check_positive(k, "k")
    queries, _ = _queries(query)
    blocks = Blocks(loader, "loader", batch_size, sharding, f"top {k}" if progress else None)
    influence.check_query(queries[0].batch, blocks.head(), "loader")
    if blocks.examples is not None:
        _check_k(k, blocks.examples)
    found: list[Any] = []
    losses, watches = _without_inverse(influence), _watches(influence, kept=False)
    with together():
        for row in queries:
            factors = _solved(influence, row, watches[0])
            dtype = tree.accumulation_dtype(*(leaf.dtype for leaf in jax.tree.leaves(factors)))
            best = Best.none(tree.count(row.batch), k, dtype)
            for block, part in _seen(blocks, losses, factors, watches[1] if row.number == 0 else None):
                best = _merged(best, part, np.int32(block.start), np.int32(block.count))
            found.append([to_host(x)[: row.count] for x in best.top_k()])
    _warn(watches)
    _check_k(k, blocks.examples or 0)
    values, indices = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return TopK(values, indices)  # type: ignore[arg-type]  # arrays of NumPy


def _without_inverse(influence: Influence) -> Influence:
    """The losses alone, so that a program is not tied to an inverse, and the loader that it may read."""
    return dataclasses.replace(influence, inverse=Identity(influence.params))


def _check_k(k: int, examples: int) -> None:
    if k > examples:
        raise ValueError(f"k: got {k}, expected between 1 and {examples}, the number of examples in the loader")


@compiled
def _merged(best: Best, part: Array, start: Array, count: Array) -> Best:
    places = jnp.arange(part.shape[1], dtype=jnp.int32)
    return merge_best(best, part, start + places, places >= count)


def _check_influence(influence: Any) -> None:
    if not isinstance(influence, Influence):
        raise TypeError(
            f"influence: got a {type(influence).__name__}, expected an Influence(objective, params, inverse); of a "
            "fitted InfluenceFunctionModel it is model.influence"
        )
    check_finite(influence.params, "params")


def _queries(query: Any) -> tuple[list[Block], int]:
    """Blocks of queries, and how many queries there are."""
    rows = length(as_dicts(query), "query") if is_batch(query) else None
    queries = list(Blocks(query, "query", rows))
    return queries, queries[-1].start + queries[-1].count


def _solved(influence: Influence, query: Block, watch: Watch) -> PyTree:
    """Solve for a block of queries, and look at what is asked of them."""
    factors = influence.factors_untold(query.batch)
    watch.batch(look_at_factors(factors), query.batch, query.start, query.count)
    return factors


def _watches(influence: Influence, *, kept: bool) -> tuple[Watch, Watch]:
    """Make the watches of queries and of examples; scores to be kept are refused rather than warned about."""
    watches = influence.query_watch(), influence.train_watch("loader")
    for watch in watches:
        watch.refuses = kept
    return watches


def _warn(watches: Iterable[Watch]) -> None:
    for watch in watches:
        watch.warn()


def _seen(blocks: Blocks, losses: Influence, factors: PyTree, watch: Watch | None) -> Iterator[tuple[Block, Array]]:
    """Yield the scores of every block, looked at when the next are on their way."""
    before: tuple[Block, Array] | None = None
    for block, part in ((b, _up(losses, factors, b.batch)) for b in blocks):
        if before is not None:
            _look(watch, *before)
        before = block, part
        yield block, part
    if before is not None:
        _look(watch, *before)


def _look(watch: Watch | None, block: Block, scores: Array) -> None:
    """Look at the scores of a block, `(Q, rows)`; waits for them."""
    jax.block_until_ready(scores)
    if watch is not None:
        watch.batch(look(scores, 1), block.batch, block.start, block.count)


class _Factors:
    """Factors of a block of queries, solved for when first needed, or found where they were kept."""

    def __init__(self, influence: Influence, row: int, block: Block, table: Table, watch: Watch) -> None:
        self._influence, self._row, self._block, self._table, self._watch = influence, row, block, table, watch
        self._factors: PyTree = None

    def get(self) -> PyTree:
        if self._factors is None:
            params, count = tree.promote(self._influence.params), tree.count(self._block.batch)
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), params)
            kept = self._table.factors(self._row, like)
            if kept is None:
                kept = self._table.keep_factors(self._row, _solved(self._influence, self._block, self._watch))
            self._factors = jax.tree.map(_placed_like, kept, self._influence.params)
        return self._factors


def _placed_like(stack: Any, leaf: Array) -> Array:
    """Factors where the parameter is, so that kept ones meet the same program as new ones."""
    sharding = leaf.sharding
    if isinstance(stack, jax.Array) or not isinstance(sharding, jax.sharding.NamedSharding):
        return jnp.asarray(stack)
    spec = jax.sharding.PartitionSpec(None, *sharding.spec)
    return jax.device_put(stack, jax.sharding.NamedSharding(sharding.mesh, spec))


def _fill(
    table: Table, row: int, queries: int, blocks: Blocks, compute: Callable[[PyTree], Array], watch: Watch | None
) -> None:
    """Compute what is not there yet; while one block is looked at and written the device is at the next."""
    waiting: tuple[int, Block, Array, int] | None = None

    def put(row: int, block: Block, values: Array, queries: int) -> None:
        _look(watch, block, values)
        table.put(row, block, values, queries)

    for block in blocks:
        if table.has(row, block):
            continue
        values = compute(block.batch)
        if waiting is not None:
            put(*waiting)
        waiting = row, block, values, queries
    if waiting is not None:
        put(*waiting)


@contextlib.contextmanager
def _table(
    sink: Any,
    what: str,
    influence: Influence,
    queries: list[Block] | None,
    count: int,
    blocks: Blocks,
) -> Iterator[tuple[Table, Influence]]:
    """Where scores go, and what computes them; a store is closed whatever happens, and others may then write."""
    if sink is None:
        yield Memory(), influence
        return
    check_sink(sink, "scores", "ScoreStore")
    rows = 1 if queries is None else tree.count(queries[0].batch)
    asked = None if queries is None else [block.host for block in queries]
    try:
        manifest = describe(what, influence, asked, blocks)
        yield Stored(sink, manifest, count, rows, blocks), pin(influence, manifest)
    finally:
        sink.close()
