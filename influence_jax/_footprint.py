"""What programs take in memory, as the compiler tells: they are compiled for shapes alone and never run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from . import tree
from ._memory import OutOfMemory, memory_errors, readable
from ._typing import PyTree
from .batching import check_batch, rhs_chunk_or_default
from .curvature.outputs import require_split
from .gradients import check_wrt
from .influence import Influence, _factors, _query_grads, _self_influences, _up, _up_from_train
from .objective import as_objective, replace_field
from .scoring import DIRECTIONAL, InfluenceMode, by_position, check_positions
from .stream.loaders import AHEAD

METHODS = ("influences", "perturbation", "token_influences", "self_influences")
# Blocks of a loader on device at once: one in use, one just placed, those waiting.
BLOCKS = AHEAD + 2


@dataclasses.dataclass(frozen=True, repr=False)
class Memory:
    """What one program takes on each device, in bytes.

    Attributes:
      arguments: Arrays passed in.
      outputs: Arrays returned.
      temporary: Whatever is held in between.
      total: All of it and the program's own code, arrays that are passed in and returned in place counted once.

    Example:
      >>> import jax.numpy as jnp
      >>> memory(jnp.outer, jnp.ones(1000, jnp.float32), jnp.ones(500, jnp.float32)).arguments
      6000
    """

    arguments: int
    outputs: int
    temporary: int
    total: int

    def __repr__(self) -> str:
        parts = (self.arguments, self.outputs, self.temporary, self.total)
        return "Memory(arguments {}, outputs {}, temporary {}, total {})".format(*map(readable, parts))


def abstract(values: PyTree) -> PyTree:
    """Shapes and dtypes of the leaves, and shardings where they are spread over devices; nothing is allocated."""

    def leaf_shape(x: Any) -> jax.ShapeDtypeStruct:
        if isinstance(x, jax.ShapeDtypeStruct):
            return x
        kind = jax.typeof(x)
        sharding = getattr(x, "sharding", None)
        spread = sharding is not None and len(sharding.device_set) > 1
        return jax.ShapeDtypeStruct(
            kind.shape, kind.dtype, sharding=sharding if spread else None, weak_type=kind.weak_type
        )

    return jax.tree.map(leaf_shape, values)


def memory(fn: Callable[..., PyTree], *args: PyTree) -> Memory:
    """What a function takes on each device once compiled; it is not run.

    Args:
      fn: Any function that `jax.jit` takes.
      *args: Trees of arrays or of `jax.ShapeDtypeStruct(shape, dtype)`, leaves `(...)`.

    Returns:
      Bytes by kind.  An array that the function does not read is not counted; one that is passed twice counts twice.

    Raises:
      NotImplementedError: If the backend does not say.

    Example:
      >>> import jax.numpy as jnp
      >>> memory(jnp.outer, jnp.ones(1000, jnp.float32), jax.ShapeDtypeStruct((500,), jnp.float32)).outputs
      2000000
    """
    return measured(fn, *args)[0]


def measured(fn: Callable[..., PyTree], *args: PyTree) -> tuple[Memory, PyTree]:
    """What a function takes, and the shapes of what it returns."""
    lowered = jax.jit(fn).lower(*(abstract(arg) for arg in args))
    with memory_errors("memory"):  # some compilers refuse a program that cannot fit
        compiled = lowered.compile()
    stats = compiled.memory_analysis()
    if stats is None:
        raise NotImplementedError(
            f"memory: jax {jax.__version__} does not tell what a program takes on {jax.default_backend()!r}; choose "
            "chunk= and rhs_chunk= by hand, halving them until the call fits"
        )
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
    temporary, shared = stats.temp_size_in_bytes, stats.alias_size_in_bytes
    total = arguments + outputs + temporary - shared + stats.generated_code_size_in_bytes

    def with_sharding(shape: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        spread = sharding if len(sharding.device_set) > 1 else None
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=spread)

    return Memory(arguments, outputs, temporary, total), jax.tree.map(
        with_sharding, lowered.out_info, compiled.output_shardings
    )


def bytes_held(values: PyTree) -> int:
    """Bytes of the leaves on each device, an array that occurs several times counted once."""

    def shard_bytes(x: jax.ShapeDtypeStruct) -> int:
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    distinct = {id(leaf): leaf for leaf in jax.tree.leaves(values)}
    return sum(shard_bytes(abstract(leaf)) for leaf in distinct.values())


def with_chunks(influence: Influence, chunk: int, rhs_chunk: int) -> Influence:
    """The influence with other chunks; no constructor runs, so shapes alone will do."""
    return replace_field(replace_field(influence, "chunk", chunk), "rhs_chunk", rhs_chunk)


class Programs:
    """The programs of a method on shapes alone, and what each takes; none is compiled twice."""

    def __init__(self, influence: Influence, query: PyTree, train: PyTree, method: str, wrt: str | int) -> None:
        _check(influence, query, train, method, wrt)
        self.method, self.wrt = method, wrt
        self.alone = method == "self_influences"
        query = None if self.alone else query
        self.influence, self.query, self.train = abstract((influence, query, train))
        self.rows, self.queries = tree.count(train), 0 if self.alone else tree.count(query)
        self.own_bytes, self.train_bytes = bytes_held((influence, query)), bytes_held(train)
        inverse = influence.inverse
        self.factors_program = _query_grads if inverse.on_host else _factors
        # As Influence.influences decides.
        fewer = method == "influences" and self.rows < self.queries
        self.from_train = fewer and inverse.symmetric and not inverse.on_host
        self.rhs_chunk = min(self.queries or self.rows, rhs_chunk_or_default(influence.rhs_chunk))
        few = method == "influences" and self.queries <= DIRECTIONAL
        self.directional = few or method in ("perturbation", "token_influences")
        self._known: dict[tuple, tuple[Memory, PyTree]] = {}

    @property
    def least(self) -> int:
        """The fewest examples at once: one for each of the shards they are split over."""
        if self.from_train:
            return self.rows
        shardings = [(leaf.sharding, leaf.shape) for leaf in jax.tree.leaves(self.train) if leaf.sharding is not None]
        return max([self.rows // sharding.shard_shape(shape)[0] for sharding, shape in shardings], default=1)

    def held(self, rows: int) -> int:
        """Bytes of all arrays around a program for so many training examples, except factors and scores."""
        blocks = 1 if rows == self.rows else BLOCKS
        return self.own_bytes + blocks * rows * self.train_bytes // self.rows

    def _measured(self, name: str, sizes: tuple, fn: Callable[..., PyTree], *args: PyTree) -> tuple[Memory, PyTree]:
        if (name, *sizes) not in self._known:
            self._known[name, *sizes] = measured(fn, *args)
        return self._known[name, *sizes]

    def factors(self, rows: int, chunk: int) -> Memory:
        """Solving for the queries; where curvature is read from a loader, their gradients only."""
        used, _ = self._factors(min(chunk, self.queries))
        return _with_held(used, self.held(rows))

    def _factors(self, chunk: int) -> tuple[Memory, PyTree]:
        influence = with_chunks(self.influence, chunk, self.rhs_chunk)
        return self._measured("factors", (chunk,), self.factors_program, influence, self.query)

    @property
    def factor_shapes(self) -> PyTree:
        """Of what the solves return."""
        try:
            shapes = self._factors(self.queries)[1]
        except OutOfMemory:  # a compiler that refuses says nothing about shardings
            shapes = jax.eval_shape(self.factors_program, self.influence, self.query)
        return shapes if self.factors_program is _query_grads else shapes[0]

    def scores(self, rows: int, chunk: int, rhs_chunk: int) -> Memory:
        """The method itself, from factors if it takes them."""
        factors = None if self.alone or self.from_train else self.factor_shapes
        train = jax.tree.map(lambda x: x.update(shape=(rows, *x.shape[1:])), self.train)
        influence = with_chunks(self.influence, chunk, rhs_chunk)
        sizes = (rows, chunk, rhs_chunk if self.directional else None)
        used, _ = self._measured("scores", sizes, self._program, influence, self.query, factors, train)
        return _with_held(used, self.held(rows) + bytes_held(factors))

    def _program(self, influence: Influence, query: PyTree, factors: PyTree, train: PyTree) -> PyTree:
        if self.alone:
            return _self_influences(influence, train)
        if self.from_train:
            return _up_from_train(influence, query, train)
        if self.method == "influences":
            return _up(influence, factors, train)
        if self.method == "perturbation":
            return influence._from_factors(factors, train, InfluenceMode.Perturbation, self.wrt)
        objective = require_split(as_objective(influence.objective), self.method)
        check_positions(objective, influence.params, train)
        return by_position(objective, influence.params, factors, train, influence.chunk, influence.rhs_chunk)

    def parts(self, rows: int, chunk: int, rhs_chunk: int) -> dict[str, Memory]:
        """Every program, in the order they run."""
        scores = {self.method: self.scores(rows, chunk, rhs_chunk)}
        return scores if self.alone or self.from_train else {"factors": self.factors(rows, chunk), **scores}

    def needs(self, rows: int, chunk: int, rhs_chunk: int, budget: int) -> float:
        """The most that a program takes, or something beyond the budget; infinite if a compiler refuses it."""
        try:
            scores = self.scores(rows, chunk, rhs_chunk).total
            if scores > budget:
                return scores
            return max(part.total for part in self.parts(rows, chunk, rhs_chunk).values())
        except OutOfMemory:
            return math.inf

    def unavoidable(self, rows: int, budget: int) -> float:
        """What no chunk avoids for so many training examples, as far as is known."""
        known = [used for (name, *sizes), (used, _) in self._known.items() if name == "scores" and sizes[0] == rows]
        least: float = self.held(rows) + max([used.outputs for used in known], default=0)
        if self.alone or self.from_train or least > budget:
            return least
        try:
            solving = self.factors(rows, self.queries).total
            if solving > budget:
                solving = min(solving, self.factors(rows, 1).total)
        except OutOfMemory:
            solving = math.inf
        return max(least, solving)


def _check(influence: Influence, query: PyTree, train: PyTree, method: str, wrt: str | int) -> None:
    if not isinstance(influence, Influence):
        raise TypeError(f"influence: got a {type(influence).__name__}, expected an influence_jax.Influence")
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {list(METHODS)}")
    if method != "self_influences":
        check_batch(query, "query")
    check_batch(train, "train")
    if method == "perturbation":
        check_wrt(train, wrt)


def _with_held(used: Memory, held: int) -> Memory:
    """What a program takes beside arrays that it may or may not read, none counted twice."""
    return Memory(held, used.outputs, used.temporary, held + used.total - used.arguments)
