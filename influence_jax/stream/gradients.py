r"""Projected gradients of data that are read batch by batch, into a store."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp

from .. import tree
from .._memory import memory_errors
from .._sound import Watch, look
from .._typing import LossFunction, PyTree
from ..objective import Objective, as_objective
from ..projections import Projection
from ..store.gradients import GradientStore
from .identity import pinned
from .loaders import Block, Blocks
from .processes import together
from .tables import Shares, check_sink, describe_gradients


@memory_errors("stream.gradients")
def gradients(
    objective: Objective | LossFunction,
    params: PyTree,
    loader: Iterable[PyTree],
    projection: Projection,
    sink: GradientStore,
    progress: bool = True,
    *,
    batch_size: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
    chunk: int | None = None,
) -> GradientStore:
    r"""Projected gradient $R^\top\nabla\ell_i$ of every example of a loader, kept for queries to come.

    The same call continues where it was interrupted.  `sink.scores(factors, projection, params=params)` then scores
    any queries in one pass over the disk, without the model or the data.

    Args:
      objective: Loss of one example.
      params: Leaves `(*leaf)`.
      loader: As in `stream.scores`.
      projection: From `influence_jax.projections`.
      sink: A `store.GradientStore`.
      progress: Whether to show a bar.
      batch_size: Examples on device at once; the length of the first batch if None.
      sharding: Where batches go, e.g. `NamedSharding(mesh, PartitionSpec("data"))`.
      chunk: Examples whose gradients are projected at once; chosen from the sizes if None.

    Returns:
      The store.

    Raises:
      TypeError, ValueError: If an argument is not of that form; if the store is of another computation or other data.

    Example:
      >>> import tempfile
      >>> import influence_jax as ij
      >>> f, params = lambda params, z: 0.5 * jnp.sum(params["w"] * z) ** 2, {"w": jnp.ones(4)}
      >>> projection = ij.projections.rademacher(params, 8, jax.random.key(0))
      >>> sink = ij.store.GradientStore.create(tempfile.mkdtemp() + "/gradients")
      >>> ij.stream.gradients(f, params, [jnp.ones((3, 4)), jnp.ones((2, 4))], projection, sink).shape
      (5, 8)
    """
    objective, params = as_objective(objective), tree.check_params(params)
    check_sink(sink, "gradients", "GradientStore")
    blocks = Blocks(loader, "loader", batch_size, sharding, "gradients" if progress else None)
    shares, manifest = Shares(blocks), describe_gradients("projected gradients", objective, params, blocks)
    objective = pinned(objective, manifest["objective"])
    options = {"projection": projection, "train_rows": shares.rows, "dtype": manifest["dtype"]}
    waiting: tuple[Block, jax.Array] | None = None
    watch = Watch(objective, params, "loader", made="gradients")
    watch.refuses = True

    def put(block: Block, values: jax.Array) -> None:
        watch.batch(look(values, 0), block.batch, block.start, block.count)
        rows, count = shares.local(values, axis=0), shares.count(block)
        if count:
            sink.write(shares.number(block), rows[:count], data=shares.data(block))

    try:
        with together():
            shares.begin(partial(sink.begin, manifest, **options))
            for block in blocks:
                if shares.has(sink, block, sink.finished):
                    continue
                values = projection.project_grads(objective, params, block.batch, chunk=chunk)
                if waiting is not None:
                    put(*waiting)
                waiting = block, jnp.asarray(values, manifest["dtype"])
            if waiting is not None:
                put(*waiting)
            shares.finish(sink.finish, blocks.examples or 0)
    finally:
        sink.close()
    return sink
