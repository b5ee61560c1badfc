"""What a training is made of: a step, and in which order, batches and groups of steps it visits its examples.

A place is the index of an example; a place of N or more is beyond the data and fills a batch up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from . import tree
from ._typing import Array, Key, PyTree
from ._words import ask
from .objective import LossOnly, Objective

PLAIN = (
    "its update is given value=, grad= and value_fn= as well, and params as the objective takes them; an optimizer "
    "that wants params of its own kind, such as optax.lookahead, is not for this training"
)


class State(NamedTuple):
    """Between two steps."""

    params: PyTree
    optimizer: PyTree


def mean_loss(
    objective: Objective | LossOnly, penalty: float | Array, batch: PyTree, weights: Array, params: PyTree
) -> Array:
    r"""What a step minimises, $\sum_i w_i\,\ell_i / \sum_i w_i + \frac{\lambda}{2}\|\theta\|^2$ over a batch."""
    losses = jax.vmap(partial(objective, params))(batch)
    dtype = tree.accumulation_dtype(losses.dtype, weights.dtype)
    weights, penalty = weights.astype(dtype), jnp.asarray(penalty).astype(dtype)
    total = jnp.sum(weights)
    mean = jnp.sum(weights * losses.astype(dtype)) / jnp.where(total != 0, total, 1)
    return mean + penalty / 2 * tree.dot(params, params).astype(dtype)


def step(
    loss: Callable[[PyTree, Array, PyTree], Array],
    optimizer: optax.GradientTransformation,
    state: State,
    batch: PyTree,
    weights: Array,
) -> State:
    """One step of the optimizer on `loss(batch, weights, params)`, or none where there is no weight."""
    on_batch = partial(loss, batch, weights)
    value, slope = jax.value_and_grad(on_batch)(state.params)
    extra = {"value": value, "grad": slope, "value_fn": on_batch}
    update = partial(optax.with_extra_args_support(optimizer).update, **extra)
    given = {"gradient": slope, "state": state.optimizer, "params": state.params}
    change, changed = ask("optimizer", update, given, PLAIN)
    stepped = State(optax.apply_updates(state.params, change), changed)
    return jax.tree.map(partial(jnp.where, jnp.any(weights != 0)), stepped, state)


def scan_again(step: Callable[[State, PyTree], State], state: State, parts: PyTree) -> State:
    """The state after a step on each of the parts; going backward, each is run again from the state before it."""
    again = jax.checkpoint(step, prevent_cse=False)  # type: ignore[call-arg]
    return lax.scan(lambda state, part: (again(state, part), None), state, parts)[0]


def order(key: Key, epoch: Array, count: int) -> Array:
    """All places in the order of one epoch, `(N,)`; it depends on the key and the epoch only."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), jnp.arange(count, dtype=jnp.int32))


def kept_first(order: Array, kept: Array) -> Array:
    """The kept places in their order, and behind them places beyond the data.

    Args:
      order: Places, `(N,)`.
      kept: Whether to keep the example at each place, `(N,)` bool.

    Example:
      >>> kept_first(jnp.array([2, 0, 1]), jnp.array([True, True, False])).tolist()
      [0, 1, 3]
    """
    kept = kept[order]
    rank = jnp.where(kept, jnp.cumsum(kept) - 1, order.size)
    return jnp.full_like(order, order.size).at[rank].set(order, mode="drop")


def in_batches(order: Array, batch_size: int) -> Array:
    """An order cut into batches, `(batches, B)`, the last filled up with places beyond the data.

    Example:
      >>> in_batches(jnp.array([2, 0, 1]), 2).tolist()
      [[2, 0], [1, 3]]
    """
    length = min(batch_size, order.size)
    batches = -(-order.size // length)
    return jnp.pad(order, (0, batches * length - order.size), constant_values=order.size).reshape(batches, length)


def weighted(places: Array, weights: Array) -> tuple[Array, Array]:
    """Places of batches `(..., B)`, and the weights there.

    A place beyond the data becomes the first one of its batch, without weight: an example that is not in the batch
    must not be in its program either, for zero times a loss that is not finite is not zero.

    Example:
      >>> places, found = weighted(jnp.array([1, 3]), jnp.array([0.1, 0.5, 0.9]))
      >>> places.tolist(), found.tolist()
      ([1, 1], [0.5, 0.0])
    """
    within = places < weights.size
    places = jnp.where(within, places, places[..., :1])
    found = jnp.take(weights, places, mode="clip")
    return places, jnp.where(within, found, jnp.zeros_like(found))


def groups(steps: int) -> tuple[int, int]:
    """Number of groups and steps in each, both about the square root, with as few steps too many as may be.

    Example:
      >>> groups(9), groups(47), groups(1)
      ((3, 3), (8, 6), (1, 1))
    """
    root = math.isqrt(steps)
    lengths = range(max(1, root * 2 // 3), root * 3 // 2 + 2)
    length = min(lengths, key=lambda length: (-(-steps // length) * length, abs(length - root)))
    return -(-steps // length), length


def check_weights(weights: Any, count: int) -> Array:
    """The weights as an array, if they are one finite number for each example, none of them negative.

    Raises:
      TypeError, ValueError: If they are not; the values of traced weights pass unseen.
    """
    weights = tree.read(weights, "weights")
    if not (hasattr(weights, "shape") and hasattr(weights, "dtype")):
        raise TypeError(f"weights: got a {type(weights).__name__}, expected an array ({count},); use jnp.asarray")
    if weights.shape != (count,):
        raise ValueError(f"weights: got shape {weights.shape}, expected ({count},), one for each example of data")
    real = jnp.issubdtype(weights.dtype, jnp.floating) or jnp.issubdtype(weights.dtype, jnp.integer)
    if not (real or weights.dtype == bool):
        raise TypeError(f"weights: got {weights.dtype}, expected real numbers or a mask")
    if not isinstance(weights, jax.core.Tracer) and getattr(weights, "is_fully_addressable", True):
        values = np.asarray(weights, np.float64)
        wrong = values[~(np.isfinite(values) & (values >= 0))]
        if wrong.size:
            raise ValueError(f"weights: got {wrong[0]}, expected finite numbers that are not negative")
    return jnp.asarray(weights)


def check_epochs(epochs: Any, last: int) -> tuple[int, ...]:
    """The numbers of epochs, if they increase from 0 or more to `last` or less.

    Raises:
      TypeError, ValueError: If they do not.
    """
    chosen = tuple(epochs) if isinstance(epochs, Iterable) else ()
    if not chosen or not all(isinstance(e, int | np.integer) and not isinstance(e, bool) for e in chosen):
        raise TypeError(f"epochs: got {epochs!r}, expected a sequence of ints such as range(0, {last + 1})")
    if list(chosen) != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] <= last:
        raise ValueError(f"epochs: got {list(chosen)}, expected increasing numbers from 0 to {last}")
    return tuple(int(e) for e in chosen)
