"""Whether a model of batches treats their rows apart, which a batch of one does not show.

A batch norm over its own batch gives zero on a batch of one: a number that is finite, and wrong.  So a model is called
once on two batches of made-up rows, of which every second row is the same: its output has to be the same, too.  Made-up
ones, for where a model is traced, as it is mostly, neither parameters nor data have values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ._typing import Array, PyTree

# Rows of each batch: enough for experts of a bounded capacity to run full.
ROWS = 8
# Pairs of batches, of a small model and of a larger one: choices that a model makes may by chance be the same in both.
TRIES, FEWER = 16, 4
# Entries of variables beyond which a model is not small, and beyond which nothing is made up, for it takes memory.
SMALL, MOST = 2**20, 2**27


class Batched(Protocol):
    """A hashable model, equal where it computes the same."""

    def on_batch(self, variables: PyTree, inputs: PyTree) -> PyTree:
        """Return the outputs of a batch, leaves `(B, ...)`."""
        ...

    def __hash__(self) -> int: ...


class Leaf(NamedTuple):
    """What is known of a traced array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    keys: Any  # how random keys are drawn, None of numbers

    @staticmethod
    def of(x: Array) -> Leaf:
        """Describe it."""
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return Leaf(tuple(x.shape), x.dtype, str(jax.random.key_impl(x)) if is_key else None)


def described(tree: PyTree) -> tuple[Any, tuple[Leaf, ...]]:
    """Describe a tree of arrays, hashable."""
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, tree))
    return structure, tuple(map(Leaf.of, leaves))


@functools.lru_cache(maxsize=256)
def mixed(model: Batched, variables: Any, inputs: Any) -> str | None:
    """Say how the output of a row depends on the other rows of its batch; None if it is not seen to.

    Args:
      model: Called on batches.
      variables: What `described` says of its variables.
      inputs: What it says of one row.
    """
    size = sum(math.prod(leaf.shape) for leaf in variables[1])
    if size > MOST:
        return None
    try:
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return _compare(model, variables, inputs, TRIES if size <= SMALL else FEWER)
    except Exception:  # what takes one row only, or cannot be run here, has no other rows that it is seen to look at
        return None


def _compare(model: Batched, variables: Any, inputs: Any, tries: int) -> str | None:
    """Call the model on pairs of batches that have every second row in common."""
    rng = np.random.default_rng(0)
    rows = lambda count, signs: _tree(inputs, lambda leaf: _row(rng, leaf._replace(shape=(count, *leaf.shape)), signs))
    weights = lambda: _tree(variables, lambda leaf: _weight(rng, leaf))
    alone = jax.tree.leaves(jax.eval_shape(model.on_batch, weights(), rows(1, False)))
    traced = jax.jit(model.on_batch).trace(weights(), rows(ROWS, False))
    together = jax.tree.leaves(traced.out_info)
    for one, many in zip(alone, together, strict=True):
        if one.shape[1:] != many.shape[1:]:
            return f"has shape {many.shape[1:]} in a batch of {ROWS}, but {one.shape[1:]} alone"
    if traced.jaxpr.effects or any(leaf.shape[:1] != (ROWS,) for leaf in together):
        return None
    quickly: Any = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    program = traced.lower().compile(compiler_options=quickly)
    for number in range(tries):
        drawn, first, second = weights(), rows(ROWS, number % 2 == 1), rows(ROWS, number % 2 == 1)
        batches = first, jax.tree.map(_every_second, first, second)
        pairs = zip(*(jax.tree.leaves(program(drawn, batch)) for batch in batches), strict=True)
        worst = max((_difference(*pair) for pair in pairs), default=0.0)
        if worst:
            return f"changes by {100 * worst:.2g}% of the largest entry if only other rows of a batch of {ROWS} do"
    return None


def _every_second(x: Any, other: Any) -> Any:
    """Return rows 0, 2, ... of `x`, and rows 1, 3, ... of `other`."""
    if isinstance(x, np.ndarray):
        kept = (np.arange(ROWS) % 2 == 0).reshape(-1, *(1,) * (x.ndim - 1))
        return np.where(kept, x, other)
    return jnp.stack([x[i] if i % 2 == 0 else other[i] for i in range(ROWS)])


def _difference(first: Array, second: Array) -> float:
    """Return how far the rows in common are apart, relative to the largest entry; zero within rounding."""
    if not jnp.issubdtype(first.dtype, jnp.inexact):
        return 0.0
    epsilon = float(jnp.finfo(first.dtype).eps)
    wide = np.complex128 if jnp.issubdtype(first.dtype, jnp.complexfloating) else np.float64
    one, other = (np.asarray(x)[::2].astype(wide) for x in (first, second))
    known = np.isfinite(one) & np.isfinite(other)
    largest = np.max(np.abs(one), where=known, initial=0)
    apart = np.max(np.abs(one - other), where=known, initial=0)
    return float(apart / largest) if apart > min(1e3 * epsilon, epsilon**0.5) * largest else 0.0


def _tree(described: Any, make: Callable[[Leaf], Any]) -> PyTree:
    structure, leaves = described
    return structure.unflatten([make(leaf) for leaf in leaves])


def _weight(rng: np.random.Generator, leaf: Leaf) -> Any:
    """Draw the weights of a layer as initialisers do, and what is no matrix as rows."""
    if leaf.keys is not None or len(leaf.shape) < 2 or not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return _row(rng, leaf, signs=False)
    return (rng.normal(size=leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]) or 1)).astype(leaf.dtype)


def _row(rng: np.random.Generator, leaf: Leaf, signs: bool) -> Any:
    """Draw numbers between 1/2 and 3/2, whose logarithm is defined, or normal ones; whole numbers are 0 or 1."""
    if leaf.keys is not None:
        like = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        return jax.random.wrap_key_data(jnp.asarray(rng.integers(0, 2**31, like.shape), like.dtype), impl=leaf.keys)
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return rng.integers(0, 2, leaf.shape).astype(leaf.dtype)
    return (rng.normal(size=leaf.shape) if signs else rng.uniform(0.5, 1.5, leaf.shape)).astype(leaf.dtype)
