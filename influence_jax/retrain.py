r"""Retraining: what an outcome becomes when examples are left out, the ground truth that attribution predicts.

Masks say which examples each training keeps, `True` for kept; `retrain` runs all trainings as vectorised programs.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from ._memory import memory_errors
from ._mesh import compiled
from ._outcomes import Memory, Stored, Table, describe
from ._progress import bar
from ._runs import WAYS, Runs
from ._typing import Array, Key, PyTree
from .batching import check_key, check_positive
from .store.outcomes import OutcomeStore
from .stream.tables import check_sink
from .training import Training, about_losses, training

__all__ = ["Training", "leave_k_out", "leave_one_out", "retrain", "subsets", "training"]

_LOG = logging.getLogger(__name__)
_KNOBS = 'how="each" or "map", of which one training is in memory at a time, or fewer runs at once (group=)'


def subsets(n: int, fraction: float, count: int, key: Key) -> np.ndarray:
    r"""Random subsets of equal size, for the linear datamodelling score.

    Subset i depends on the key, i and the sizes alone, so asking for more later keeps those of before.  With the same
    key larger subsets hold the smaller ones: use another key for another fraction, unless that is wanted.

    $m_s \in \{0, 1\}^N$, uniform among those with $\sum_i m_{si} = \mathrm{round}(\alpha N)$.

    Args:
      n: How many examples there are.
      fraction: How many of them a subset keeps, `round(fraction * n)` exactly.
      count: How many subsets.
      key: Which ones.

    Returns:
      Masks `(count, n)`, True for kept.

    Raises:
      TypeError, ValueError: If a number is not of that kind, or a subset would be empty.

    Example:
      >>> masks = subsets(6, 0.5, 4, jax.random.key(0))
      >>> masks.shape, masks.sum(axis=1).tolist()
      ((4, 6), [3, 3, 3, 3])

    Reference: Ilyas et al. 2022, arXiv:2202.00622, section 2.
    """
    check_positive(n, "n")
    if isinstance(fraction, bool) or not isinstance(fraction, float | int | np.number):
        raise TypeError(f"fraction: got {fraction!r}, expected a number above 0 and at most 1")
    if not (0 < fraction <= 1 and round(float(fraction) * n) > 0):
        raise ValueError(f"fraction: got {fraction} of {n} examples, expected at least one of them and at most all")
    return _random_masks(n, round(float(fraction) * n), count, key)


def leave_k_out(n: int, k: int, count: int, key: Key) -> np.ndarray:
    r"""Random masks that leave out k examples each; as with `subsets`, asking for more later keeps those of before.

    $m_s \in \{0, 1\}^N$, uniform among those with $\sum_i m_{si} = N - k$.

    Args:
      n: How many examples there are.
      k: How many are left out.
      count: How many masks.
      key: Which ones.

    Returns:
      Masks `(count, n)`, True for kept.

    Raises:
      TypeError, ValueError: If a number is not of that kind, or nothing would be left.

    Example:
      >>> (~leave_k_out(6, 2, 3, jax.random.key(0))).sum(axis=1).tolist()
      [2, 2, 2]

    Reference: Koh et al. 2019, arXiv:1905.13289.
    """
    check_positive(n, "n")
    check_positive(k, "k")
    if k >= n:
        raise ValueError(f"k: got {k}, expected less than the {n} examples there are")
    return _random_masks(n, n - k, count, key)


def leave_one_out(n: int, indices: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    r"""Masks that leave out one example each.

    $m_{si} = 1 - \delta_{i, i_s}$.

    Args:
      n: How many examples there are.
      indices: Which ones are left out, one by one; all if None.

    Returns:
      Masks `(len(indices), n)`, True for kept.

    Raises:
      TypeError, ValueError: If a number is not of that kind.

    Example:
      >>> leave_one_out(3).astype(int).tolist()
      [[0, 1, 1], [1, 0, 1], [1, 1, 0]]

    Reference: Koh & Liang 2017, arXiv:1703.04730, section 4.1.
    """
    check_positive(n, "n")
    if n == 1:
        raise ValueError("n: got 1, expected 2 or more, so that something is left")
    indices = np.arange(n) if indices is None else np.asarray(indices)
    if indices.dtype.kind not in "iu":
        raise TypeError(f"indices: got {indices.dtype}, expected ints; of a mask they are numpy.flatnonzero(mask)")
    if indices.ndim != 1 or indices.size == 0 or not (0 <= indices.min() <= indices.max() < n):
        raise ValueError(f"indices: got {indices.tolist()}, expected a list of places from 0 to {n - 1}")
    return indices[:, None] != np.arange(n)


def _random_masks(n: int, kept: int, count: int, key: Key) -> np.ndarray:
    check_positive(count, "count")
    key = check_key(key, "masks are drawn at random, and another key gives others")
    return np.asarray(_first_of_orders(key, np.arange(count, dtype=np.int32), np.int32(kept), n))


@functools.partial(compiled, static_argnames="n")
def _first_of_orders(key: Key, numbers: Array, kept: Array, n: int) -> Array:
    """Which examples come first when all n are put in a random order, one for each number."""
    places = jnp.arange(n, dtype=jnp.int32)
    return lax.map(lambda number: jax.random.permutation(jax.random.fold_in(key, number), places) < kept, numbers)


@memory_errors("retrain", _KNOBS)
def retrain(
    train_fn: Any,
    masks: np.ndarray | Array,
    keys: Key,
    measure: Any = None,
    *,
    how: str | None = None,
    group: int | None = None,
    sink: OutcomeStore | None = None,
    sharding: NamedSharding | None = None,
    throw: bool = True,
    progress: bool = True,
) -> Any:
    """Train once for every mask and every key, and measure: `measure(train_fn(weights, key))`.

    The two functions are pure JAX.  Arrays in them are arguments of the compiled program if they are trees, as a
    `Training` and `jax.tree_util.Partial` are, or made by `functools.partial`; what a plain function closes over is
    compiled in.

    Args:
      train_fn: `train_fn(weights (N,), key) -> params`.
      masks: `(S, N)`, True for kept; the weights are then ones and zeros of JAX's default floating dtype.  Or weights
        of a floating dtype, which are passed on as they are.
      keys: One key; or several `(K,)`, the same for every mask.
      measure: `measure(params) -> (Q,)`, e.g. the losses of Q queries; any tree of arrays.  The parameters if None.
      how: `"each"` calls a program for each training, `"map"` loops over a group inside of one, `"vmap"` trains a group
        at once.  If None, the first groups are computed each in its way, and the rest in the fastest; the ways agree
        to rounding, so give one if every bit must be the same in every call.
      group: Runs in a group: so many are lost by an interruption, and with `"vmap"` so many are in memory at once.
        If None an eighth of all, at most 8 for each device on CPU and 32 elsewhere.
      sink: A `store.OutcomeStore`; the same call continues, bit for bit, where it was interrupted, and one with more
        masks behind the same ones continues with those.
      sharding: Runs go to several devices at once, e.g. `NamedSharding(mesh, PartitionSpec("runs"))`.
      throw: Whether an outcome that is NaN or infinite is an error, and not stored; else a warning counts them.
      progress: Whether to show a bar, with runs per minute.

    Returns:
      Outcomes `(S, K, *measured)`, or `(S, *measured)` for a single key; NumPy, in a tree if they are one.

    Raises:
      TypeError, ValueError: If an argument is not of that form, a training diverged, or the store is of another
        computation.
      BlockingIOError: If another process writes to the store.

    Example:
      >>> data = jnp.array([1.0, 2.0, 6.0])
      >>> mean = lambda weights, key: (weights @ data) / weights.sum()
      >>> retrain(mean, leave_one_out(3), jax.random.key(0), progress=False).tolist()
      [4.0, 3.5, 1.5]
    """
    recorded = _recorded(sink)
    runs = Runs(train_fn, measure, masks, keys, recorded("group") if group is None else group, sharding)
    how = _checked_how(recorded("how") if how is None else how, runs)
    table: Table = Memory() if sink is None else Stored(sink, runs, describe(train_fn, measure, runs, how))
    with contextlib.closing(table), bar("retraining", runs.count, show=progress) as advance:
        _run_all(runs, how, table, throw, advance)
        outcomes = table.finish()
    _check_outcomes(outcomes, runs, 0, throw)
    axes = (len(runs.masks),) if runs.seeds is None else (len(runs.masks), runs.seeds)
    return jax.tree.map(lambda x: x.reshape(axes + x.shape[1:]), outcomes)


def _run_all(runs: Runs, how: str, table: Table, throw: bool, advance: Any) -> None:
    """Compute what is not there yet; of several ways, time each on a group of its own, and go on with the fastest."""
    tried = runs.ways if how == "measured" else ()
    chosen = (table.chosen or "") if tried else how
    seconds: dict[str, float] = {}
    done, begun = 0, time.perf_counter()
    for number in range(runs.groups):
        timing = not chosen and number < len(tried)
        way = tried[number] if number < len(tried) else chosen
        if not timing and table.has(number):
            advance(runs.size(number), "")
            continue
        if timing:
            runs.compile(way)
        start = time.perf_counter()
        values = runs.compute(number, way)
        seconds[way] = time.perf_counter() - start
        if throw:
            _check_outcomes(values, runs, number * runs.group, throw)
        table.put(number, values)
        done += runs.size(number)
        advance(runs.size(number), f"{way}, {_per_minute(done, time.perf_counter() - begun)}")
        if timing and len(seconds) == len(tried):
            chosen = min(seconds, key=lambda way: seconds[way])
            table.choose(chosen)
            rates = ", ".join(f"{way} {_per_minute(runs.group, spent)}" for way, spent in seconds.items())
            _LOG.info("retrain: %s; going on with %s", rates, chosen)
    _LOG.info("retrain: %d runs, %s", done, _per_minute(done, time.perf_counter() - begun))


def _per_minute(runs: int, seconds: float) -> str:
    return f"{60 * runs / max(seconds, 1e-9):,.0f} a minute"


def _checked_how(how: str | None, runs: Runs) -> str:
    """A way to compute, or `"measured"` where it pays to find one."""
    if how is None and runs.groups >= 2 * len(WAYS) and runs.group > runs.devices:
        return "measured"
    if how is None:
        return "each" if jax.default_backend() == "cpu" or runs.group == runs.devices else runs.ways[-1]
    if how not in (*WAYS, "measured"):
        raise ValueError(f"how: got {how!r}, expected one of {', '.join(map(repr, WAYS))}, or None to find the fastest")
    if how == "vmap" and how not in runs.ways:
        raise ValueError(
            f"how: got 'vmap' with keys of {runs.keys.dtype}, which draw other numbers when vectorised; use 'map' or "
            "'each', or keys of jax.random.key(seed, impl='threefry2x32')"
        )
    return how


def _recorded(sink: OutcomeStore | None) -> Callable[[str], Any]:
    """What a store says of the computation that began it."""
    if sink is None:
        return lambda name: None
    check_sink(sink, "outcomes", "OutcomeStore")
    return sink.recorded


def _check_outcomes(outcomes: PyTree, runs: Runs, first: int, throw: bool) -> None:
    """Raise or warn if what was measured of some runs, from the first on, is not finite."""
    leaves = [x.reshape(len(x), -1) for x in jax.tree.leaves(outcomes) if jnp.issubdtype(x.dtype, jnp.inexact)]
    bad = np.concatenate([np.flatnonzero(~np.isfinite(leaf).all(axis=1)) for leaf in leaves] or [np.zeros(0, int)])
    if not bad.size:
        return
    mask, seed = runs.pair(first + int(bad.min()))
    why = about_losses(runs.train_fn, runs.masks[mask]) if isinstance(runs.train_fn, Training) else ""
    message = (
        f"outcomes: {len(np.unique(bad))} of {len(leaves[0])} runs gave NaN or infinity, the first of them mask {mask} "
        f"with key {seed}; "
    )
    message += why or (
        "the training diverged, or the measure is not defined there: lower the learning rate, or look at train_fn with "
        "that mask and key"
    )
    if throw:
        raise ValueError(f"{message}. What is finished is kept; throw=False keeps such outcomes, too")
    warnings.warn(message, RuntimeWarning, stacklevel=4)
