"""Many trainings as programs: one by one, mapped or vectorised, on one device or split over several."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from . import tree
from ._mesh import compiled, names_of, on_auto_axes
from ._typing import Array, Key, PyTree
from .batching import check_finite, check_positive
from .store.files import fingerprint
from .stream.identity import traced
from .training import Training

WAYS = ("each", "map", "vmap")
# Runs of a group on each device: what is lost by an interruption, and what is in memory at once with vmap.
MOST_ON_CPU, MOST = 8, 32
# Groups that a default size gives at least, so that timing each way once is a small part of the whole.
LEAST_GROUPS = 8


@dataclasses.dataclass(frozen=True)
class Static:
    """What of a function is no array; with its arrays it is the function again.

    Arrays are arguments of a program, never constants in it: they would be compiled into it, slowly.
    """

    structure: Any
    fixed: tuple[Any, ...]
    types: tuple[type, ...]  # for 1, 1.0 and True are equal

    def __call__(self, arrays: list[Array]) -> Callable[..., Any]:
        left = iter(arrays)
        return self.structure.unflatten([next(left) if leaf is None else leaf for leaf in self.fixed])


def split(fn: Any, name: str, form: str) -> tuple[Static, list[Array]]:
    """A function that is a tree, a partial one, or a plain one, as what is static of it, and its arrays.

    Raises:
      TypeError: If it is no function, an array in it is cut to float32, or something else in it is not hashable.
    """
    if not callable(fn):
        raise TypeError(f"{name}: got a {type(fn).__name__}, expected a function {form}")
    if type(fn) is functools.partial:
        fn = jax.tree_util.Partial(fn.func, *fn.args, **fn.keywords)
    leaves, structure = jax.tree.flatten(fn)
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    for path, leaf in tree.named_leaves(fn):
        if hasattr(leaf, "dtype") and tree.is_float64_lost(leaf):
            raise TypeError(
                f"{name}: its array '{path}' is float64 but 64-bit mode is off, so JAX would cut it to float32; cast "
                "it to float32 or run under jax.enable_x64(True)"
            )
    fixed = tuple(None if array else leaf for leaf, array in zip(leaves, is_array, strict=True))
    static = Static(structure, fixed, tuple(map(type, fixed)))
    try:
        hash(static)
    except TypeError as error:
        raise TypeError(
            f"{name}: {error}, but all in it that is no array is part of a program; make it hashable"
        ) from None
    return static, [jnp.asarray(leaf) for leaf in itertools.compress(leaves, is_array)]


@dataclasses.dataclass(frozen=True)
class Program:
    """What does not change from run to run, the arrays of the two functions apart."""

    train_fn: Static
    measure: Static | None
    way: str
    random: str
    sharding: NamedSharding | None


def _outcomes(arrays: tuple[list[Array], list[Array]], weights: Array, keys: Array, *, program: Program) -> PyTree:
    """Outcomes of a group of runs, leaves `(runs, ...)`, from weights `(runs, N)` and the entries of their keys."""

    def here(arrays: tuple[list[Array], list[Array]], weights: Array, keys: Array) -> PyTree:
        train_fn = program.train_fn(arrays[0])
        measure = (lambda params: params) if program.measure is None else program.measure(arrays[1])

        def one(weights: Array, entries: Array) -> PyTree:
            key = jax.random.wrap_key_data(entries, impl=program.random)
            return jax.tree.map(jnp.asarray, measure(train_fn(weights, key)))

        if program.way == "each":
            return tree.stack_of_one(one(weights[0], keys[0]))
        if program.way == "map":
            return lax.map(lambda pair: one(*pair), (weights, keys))
        return jax.vmap(one)(weights, keys)

    if program.sharding is None:
        return here(arrays, weights, keys)
    runs, mesh = program.sharding.spec, program.sharding.mesh
    # By hand, for whatever a training does, no device ever needs another.
    mapped = jax.shard_map(here, mesh=mesh, in_specs=(PartitionSpec(), runs, runs), out_specs=runs, check_vma=False)
    return mapped(arrays, weights, keys)


_computed: Any = compiled(_outcomes, static_argnames="program")


class Runs:
    """All pairs of a mask and a key, group by group.

    Attributes:
      train_fn: The training, as it was given.
      seeds: How many keys there are, None for one without an axis of its own.
      count: How many runs there are.
      devices: How many are computed at once, on a device each.
      group: Runs of a group, a multiple of `devices`.
    """

    def __init__(self, train_fn: Any, measure: Any, masks: Any, keys: Any, group: int | None, sharding: Any) -> None:
        static, arrays = split(train_fn, "train_fn", "train_fn(weights, key) -> params")
        measured, constants = (
            (None, []) if measure is None else split(measure, "measure", "measure(params) -> (Q,), or None for params")
        )
        self.train_fn = train_fn
        self.masks, self.keys = _checked_masks(masks), _checked_keys(keys)
        self.seeds = None if self.keys.ndim == 0 else len(self.keys)
        self._entries = np.asarray(jax.random.key_data(self.keys)).reshape(self.seeds or 1, -1)
        self.count = len(self.masks) * len(self._entries)
        if isinstance(train_fn, Training):
            _check_weights(self.masks, train_fn)
        self.dtype = np.dtype(jnp.result_type(float)) if self.masks.dtype == np.bool_ else self.masks.dtype
        self._sharding, self.devices = (None, 1) if sharding is None else _checked_sharding(sharding)
        self._program = Program(static, measured, "each", str(jax.random.key_impl(self.keys)), self._sharding)
        self._arrays = arrays, constants
        if self._sharding is not None:  # once, not with every call
            self._arrays = jax.device_put(self._arrays, NamedSharding(self._sharding.mesh, PartitionSpec()))
        self.group = self._default_group() if group is None else group
        check_positive(self.group, "group")
        if self.group % self.devices:
            raise ValueError(f"group: got {group}, expected a multiple of the {self.devices} devices it is split over")

    def _default_group(self) -> int:
        most = MOST_ON_CPU if jax.default_backend() == "cpu" else MOST
        return self.devices * min(most, max(1, self.count // (LEAST_GROUPS * self.devices)))

    @property
    def ways(self) -> tuple[str, ...]:
        """The ways that give the same numbers to rounding; other keys than threefry's draw others under vmap."""
        return WAYS if self._program.random == "threefry2x32" else WAYS[:2]

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return -(-self.count // self.group)

    def size(self, number: int) -> int:
        """How many runs a group has."""
        return min(self.group, self.count - number * self.group)

    def pair(self, run: int) -> tuple[int, int]:
        """Mask and key of a run."""
        return divmod(run, len(self._entries))

    def data(self, number: int, rows: int | None = None) -> str:
        """How many runs a group has, or the first of them, and a fingerprint of their masks."""
        rows = self.size(number) if rows is None else rows
        first = number * self.group
        masks = self.masks[self.pair(first)[0] : self.pair(first + rows - 1)[0] + 1]
        return f"{rows} {fingerprint(masks)}"

    def like(self) -> PyTree:
        """Shapes and dtypes of the outcome of one run."""
        shapes = _computed.eval_shape(self._arrays, *self._arguments(0, self.devices), program=self._program)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)

    def identities(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Of the two functions, as programs with their constants; None for a measure that is not given."""
        weights = jax.ShapeDtypeStruct(self.masks.shape[1:], self.dtype)
        key = jax.ShapeDtypeStruct((), self.keys.dtype)
        (train_fn, measure), (arrays, constants) = (self._program.train_fn, self._program.measure), self._arrays
        trained = traced(lambda arrays, weights, key: train_fn(arrays)(weights, key), arrays, weights, key)
        if measure is None:
            return trained, None
        params = jax.eval_shape(lambda arrays, weights, key: train_fn(arrays)(weights, key), arrays, weights, key)
        return trained, traced(lambda arrays, params: measure(arrays)(params), constants, params)

    def compile(self, way: str) -> None:
        """Compile what `compute` calls."""
        _computed.lower(self._arrays, *self._arguments(0, self._step(way)), program=self._of(way)).compile()

    def compute(self, number: int, way: str) -> PyTree:
        """Outcomes of a group on the host, leaves `(runs, ...)`."""
        start, step = number * self.group, self._step(way)
        stop = start + self.size(number)
        program = self._of(way)
        parts = [
            _computed(self._arrays, *self._arguments(first, step), program=program)
            for first in range(start, stop, step)
        ]
        return jax.tree.map(lambda *x: np.concatenate([np.asarray(p) for p in x])[: stop - start], *parts)

    def _of(self, way: str) -> Program:
        return dataclasses.replace(self._program, way=way)

    def _step(self, way: str) -> int:
        """Runs in one call."""
        return self.devices if way == "each" else self.group

    def _arguments(self, first: int, rows: int) -> tuple[Any, Any]:
        """Weights and entries of keys of some runs; those beyond the last are copies of it."""
        masks, keys = self.pair(np.minimum(np.arange(first, first + rows), self.count - 1))  # type: ignore[arg-type]
        arguments = self.masks[masks].astype(self.dtype), self._entries[keys]
        return arguments if self._sharding is None else jax.device_put(arguments, self._sharding)


def _check_weights(masks: np.ndarray, train: Training) -> None:
    """Raise unless a training can take them, which it cannot tell itself once they are traced."""
    if masks.shape[1] != train.count:
        raise ValueError(f"masks: got shape {masks.shape}, expected (S, {train.count}), the examples of {train!r}")
    if masks.dtype != np.bool_ and masks.min() < 0:
        raise ValueError(f"masks: got the weight {masks.min()}, expected weights that are not negative")


def _checked_masks(masks: Any) -> np.ndarray:
    if isinstance(masks, jax.Array) and jnp.issubdtype(masks.dtype, jax.dtypes.prng_key):
        raise TypeError("masks: got random keys, expected (S, N); the order is retrain(train_fn, masks, keys, measure)")
    tree.check_unmasked(masks, "masks")
    masks = np.asarray(masks)
    floating = jnp.issubdtype(masks.dtype, jnp.floating)
    if masks.dtype != np.bool_ and not floating:
        raise TypeError(
            f"masks: got {masks.dtype}, expected booleans, True for what is kept, or weights of a floating dtype; use "
            "masks.astype(bool)"
        )
    if masks.ndim != 2 or masks.size == 0:
        raise ValueError(
            f"masks: got shape {masks.shape}, expected (S, N): a row of N examples for each of S trainings"
        )
    if tree.is_float64_lost(masks):
        raise TypeError("masks: are float64 but 64-bit mode is off; cast them to float32")
    check_finite(masks, "masks")
    empty = np.flatnonzero(~masks.any(axis=1))
    if empty.size:
        raise ValueError(f"masks: {empty.size} of {len(masks)} keep no example, the first of them mask {empty[0]}")
    return masks


def _checked_keys(keys: Any) -> Key:
    """One typed key `()`, or several `(K,)`."""
    form = "expected jax.random.key(0), or several as jax.random.split(jax.random.key(0), K)"
    if not isinstance(keys, jax.Array):
        raise TypeError(f"keys: got {keys!r}, {form}")
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        if keys.dtype != jnp.uint32 or keys.shape[-1:] != (2,):
            raise TypeError(f"keys: got an array {keys.dtype}{list(keys.shape)}, {form}")
        keys = jax.random.wrap_key_data(keys, impl="threefry2x32")
    if keys.ndim > 1 or keys.size == 0:
        raise ValueError(f"keys: got shape {keys.shape}, {form}")
    return keys


def _checked_sharding(sharding: Any) -> tuple[NamedSharding, int]:
    """The sharding on a mesh of automatic axes, and over how many devices it splits runs."""
    form = 'expected a jax.sharding.NamedSharding of the axis of runs, e.g. NamedSharding(mesh, PartitionSpec("runs"))'
    if not isinstance(sharding, NamedSharding):
        raise TypeError(f"sharding: got {sharding!r}, {form}")
    names = [name for axis in sharding.spec for name in names_of(axis)]
    if len(sharding.spec) != 1 or not names:
        raise ValueError(f"sharding: got {sharding.spec}, {form}")
    if not sharding.is_fully_addressable:
        raise ValueError(
            "sharding: its mesh spans several processes; give each process its part of the masks, a mesh of its own "
            "devices (jax.local_devices()), and a store of its own"
        )
    return on_auto_axes(sharding), math.prod(sharding.mesh.shape[name] for name in names)
