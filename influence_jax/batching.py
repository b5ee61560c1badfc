"""Batches, and the only place that splits one.

A batch is any pytree whose leaves share a leading example axis.  It is folded column-major: example `i` of `N` lands in
chunk `i % M` of `M`, so that data split over devices by examples stay split within every chunk.  The tail is padded
with a copy of the last example and given weight zero, so a ragged batch neither compiles a second program nor changes a
sum.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import AbstractMesh, PartitionSpec

from . import _reprs, tree
from ._jaxpr_compat import constants, opened, uses
from ._mesh import compiled
from ._pytree import dataclass
from ._typing import Array, Key, PyTree

Carry = TypeVar("Carry")

DEFAULT_CHUNK = 256
# Entries of a chunk's largest intermediate beyond which a default chunk shrinks: 128 MiB of float32.
CHUNK_BUDGET = 2**25
# The same where a chunk is passed over several times, on CPU: what the caches of a core hold, 2 MiB of float32.
CACHE_BUDGET = 2**19


@dataclass
class Batch:
    """Inputs and labels that share a leading example axis.

    Args:
      x: Inputs, leaves `(N, ...)`; any pytree.
      y: Labels, leaves `(N, ...)`; any pytree, or None.

    Raises:
      ValueError: If the leaves disagree in length, or there are no examples.

    Example:
      >>> import influence_jax as ij
      >>> batch = ij.Batch(np.ones((8, 2), np.float32), np.zeros(8, np.int32))
      >>> len(batch)
      8
    """

    x: PyTree
    y: PyTree = None

    def __post_init__(self) -> None:
        batch_size({"x": self.x, "y": self.y}, "Batch")

    def __len__(self) -> int:
        return batch_size(self, "Batch")

    def __repr__(self) -> str:
        return f"Batch({describe(self.x)}, {describe(self.y)})"


def describe(data: PyTree) -> Any:
    """Shapes and dtypes of the leaves, for messages and reprs."""
    return jax.tree.map(_reprs.array, data)


def batch_size(batch: PyTree, name: str) -> int:
    """Number of examples, after checking that all leaves agree on it.

    Raises:
      TypeError: If a leaf is not an array, e.g. a loader was passed.
      ValueError: If the batch is empty, or its leaves disagree in length.
    """
    leaves = tree.named_leaves(batch)
    if not leaves:
        raise ValueError(f"{name}: got a tree without arrays, expected leaves with a leading example axis")
    for path, leaf in leaves:
        if not ((hasattr(leaf, "shape") and hasattr(leaf, "dtype")) or tree.is_foreign(leaf)):
            raise TypeError(
                f"{name}: leaf '{path}' is a {type(leaf).__name__}, expected an array with a leading example axis; "
                "turn lists into arrays with numpy.asarray, and gather a loader's batches into one batch first, e.g. "
                "jax.tree.map(lambda *parts: numpy.concatenate(parts), *loader)"
            )
        if len(leaf.shape) == 0:
            raise ValueError(f"{name}: leaf '{path}' is a scalar, expected a leading example axis; use x[None] for one")
    lengths = {path: leaf.shape[0] for path, leaf in leaves}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"{name}: leaves disagree in length, got {lengths}; all need the same leading example axis; "
            f"of a single example, give jax.tree.map(lambda a: a[None], {name})"
        )
    (count,) = set(lengths.values())
    if count == 0:
        raise ValueError(f"{name}: got no examples (leading axis of length 0), expected at least one")
    return count


def check_like(batch: PyTree, others: PyTree, name: str, of: str, *, other_kind: bool = False) -> None:
    """Raise if a batch can only be one example, without its leading axis, of the kind that is in another batch.

    Args:
      batch: Leaves `(Q, ...)`.
      others: Leaves `(N, ...)`; of another structure, nothing is compared.
      name: Of the argument.
      of: What the others are.
      other_kind: Whether they may be examples of another kind, so that only what is one of these exactly is refused.

    Raises:
      ValueError: Naming the leaf and both shapes, or both dtypes, as `check_kinds`.
    """
    pairs = list(zip(tree.named_leaves(batch), tree.named_leaves(others), strict=False))
    if jax.tree.structure(batch) != jax.tree.structure(others):
        return
    if not other_kind:
        check_kinds(batch, others, name, of)
    apart = [(path, x.shape, y.shape) for (path, x), (_, y) in pairs if len(x.shape) != len(y.shape)]
    if other_kind and any(x.shape != y.shape[1:] or x.dtype != y.dtype for (_, x), (_, y) in pairs):
        return
    if apart:
        path, got, expected = apart[0]
        leaf = f"leaf '{path}'" if path else "the array"
        raise ValueError(
            f"{name}: {leaf} has shape {got}, that of {of} {expected}, so that one example of it has shape {got[1:]} "
            f"there and {expected[1:]} here; expected a leading axis of examples: of a single one, give "
            f"jax.tree.map(lambda a: a[None], {name})"
        )


def check_kinds(batch: PyTree, others: PyTree, name: str, of: str) -> None:
    """Raise if a part of a batch is integers and of another one floating, as pixels before and after their scaling.

    Widths may differ, booleans may be either, and of another structure nothing is compared.

    Raises:
      ValueError: Naming the leaf and both dtypes.
    """
    if jax.tree.structure(batch) != jax.tree.structure(others):
        return
    for (path, x), (_, y) in zip(tree.named_leaves(batch), tree.named_leaves(others), strict=True):
        for one, other in ((x, y), (y, x)):
            if jnp.issubdtype(one.dtype, jnp.integer) and jnp.issubdtype(other.dtype, jnp.floating):
                leaf = f"leaf '{path}'" if path else "the array"
                raise ValueError(
                    f"{name}: {leaf} is {x.dtype}, that of {of} {y.dtype}; expected examples that were prepared alike, "
                    "for pixels from 0 to 255 are other numbers than those from 0 to 1; if these are the same numbers, "
                    "cast them to one dtype"
                )


def as_dicts(data: PyTree) -> PyTree:
    """Turn mappings that are no trees to JAX, e.g. `collections.UserDict`, into dicts; arrays stay as they are."""
    as_dict = lambda x: {key: as_dicts(x[key]) for key in x}
    known = lambda x: isinstance(x, dict) or not isinstance(x, Mapping)
    return jax.tree.map(lambda x: x if known(x) else as_dict(x), data, is_leaf=tree.is_opaque)


def plain(batch: PyTree, name: str) -> PyTree:
    """Turn arrays of other frameworks into NumPy's, and mappings that are no trees to JAX into dicts, at any depth.

    Raises:
      TypeError: As `tree.readable`, e.g. of an array that is on another device, masked or sparse.
    """
    return tree.readable(as_dicts(batch), name)


def as_batch(batch: PyTree, name: str) -> PyTree:
    """Check a batch and turn its leaves into JAX arrays.

    Raises:
      TypeError, ValueError: As `check_batch`, and for a list of batches.
    """
    batch = plain(batch, name)
    _refuse_loader(batch, name)
    check_batch(batch, name)
    with jax.ensure_compile_time_eval():  # under jit, too, what is concrete stays so, to be looked at
        return jax.tree.map(jnp.asarray, batch)


def _refuse_loader(batch: PyTree, name: str) -> None:
    """Raise if it is a list of batches alike: of containers, or a tuple of `Batch`es or of several dicts."""
    if type(batch) not in (list, tuple) or not batch:
        return
    kinds = (Batch, Mapping, list, tuple) if isinstance(batch, list) else (Batch, Mapping)
    alone = isinstance(batch, tuple) and len(batch) == 1 and not isinstance(batch[0], Batch)
    alike = all(isinstance(x, kinds) for x in batch) and len({jax.tree.structure(x) for x in batch}) == 1
    if alike and not alone:
        raise ValueError(
            f"{name}: got a {type(batch).__name__} of {len(batch)}, each a {type(batch[0]).__name__}, which is a "
            "loader; expected one batch. Use influence_jax.stream, e.g. stream.invert and stream.scores, which read "
            "batch after batch, or join them: jax.tree.map(lambda *parts: numpy.concatenate(parts), *loader)"
        )


def check_batch(batch: PyTree, name: str) -> None:
    """Raise unless it is a batch of numbers that JAX can hold.

    Raises:
      TypeError: If a leaf is not an array of numbers, or is float64 while 64-bit mode is off.
      ValueError: As `batch_size`.
    """
    batch_size(batch, name)
    for path, leaf in tree.named_leaves(batch):
        if isinstance(leaf, np.ndarray) and not tree.is_number(leaf.dtype):
            hint = "; rows of several lengths have to be padded to one" if leaf.dtype == object else ""
            raise TypeError(
                f"{name}: leaf '{path}' has dtype {leaf.dtype}, expected numbers or booleans; encode it first{hint}"
            )
        if tree.is_float64_lost(leaf):
            raise TypeError(
                f"{name}: leaf '{path}' is float64 but 64-bit mode is off, so JAX would cut it to float32; cast it "
                "with .astype(numpy.float32) or run under jax.enable_x64(True)"
            )
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "iu" and leaf.size:
            kept = np.iinfo(jax.dtypes.canonicalize_dtype(leaf.dtype))
            if kept.dtype.itemsize < leaf.dtype.itemsize and not kept.min <= leaf.min() <= leaf.max() <= kept.max:
                raise TypeError(
                    f"{name}: leaf '{path}' holds integers beyond {kept.dtype} but 64-bit mode is off, so JAX would "
                    "cut them; leave out what is no input, e.g. ids, or run under jax.enable_x64(True)"
                )


def check_finite(values: PyTree, name: str) -> None:
    """Raise, on the host, if an entry is NaN or infinite; traced values pass unseen.

    Raises:
      ValueError: Naming the leaf.
    """
    for path, leaf in tree.named_leaves(values):
        if isinstance(leaf, jax.core.Tracer) or not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        if not isinstance(leaf, jax.Array) or readable_in_place(leaf):
            bad = int(np.count_nonzero(~np.isfinite(np.asarray(leaf))))
        else:
            with jax.ensure_compile_time_eval():  # under jit, too, what is concrete is counted now
                bad = int(jnp.sum(~jnp.isfinite(leaf)))
        if bad:
            raise ValueError(
                f"{name}: leaf '{path}' holds {bad} entries that are NaN or infinite, expected finite numbers"
            )


def readable_in_place(leaf: Array) -> bool:
    """Whether numpy reads it without a copy, which spares compiling a program for every shape."""
    return len(leaf.devices()) == 1 and next(iter(leaf.devices())).platform == "cpu" and leaf.is_fully_addressable


def check_chunk(chunk: int | None, name: str = "chunk") -> None:
    """Raise unless `chunk` is None or a positive int."""
    if chunk is not None:
        check_positive(chunk, name)


def check_positive(count: int, name: str) -> None:
    """Raise unless `count` is a positive int."""
    if isinstance(count, bool) or not isinstance(count, int | np.integer):
        raise TypeError(f"{name}: got {count!r}, expected a positive int")
    if count < 1:
        raise ValueError(f"{name}: got {count}, expected a positive int")


def check_key(key: Any, why: str) -> Key:
    """The key, if it is one random key; `why` says who needs it and how to pass it."""
    if isinstance(key, jax.Array):
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if (typed and key.shape == ()) or (key.dtype == jnp.uint32 and key.shape == (2,)):
            return key
    got = f"an array {key.dtype}{list(key.shape)}" if isinstance(key, jax.Array) else repr(key)
    wrong = ValueError if key is None or isinstance(key, jax.Array) else TypeError
    raise wrong(f"key: {why}; got {got}, expected one random key such as jax.random.key(0)")


def chunk_for(entries_per_example: int) -> int:
    """The default chunk when every example makes an intermediate of that many entries."""
    return max(1, min(DEFAULT_CHUNK, CHUNK_BUDGET // max(1, entries_per_example)))


def chunk_in_cache(entries_per_example: int, wanted: int = 1) -> int:
    """The default chunk when what every example holds is read again and again, as captured factors are.

    Args:
      entries_per_example: What it holds.
      wanted: How many examples it takes, up to 64, for other work to pay, as a product with that many vectors.
    """
    budget = CACHE_BUDGET if jax.default_backend() == "cpu" else CHUNK_BUDGET
    return max(min(DEFAULT_CHUNK, budget // max(1, entries_per_example)), min(wanted, 64), 1)


def rhs_chunk_or_default(rhs_chunk: int | None) -> int:
    """How many right-hand sides to multiply at once: four on CPU, where more fall out of its caches, else 32."""
    if rhs_chunk is not None:
        return rhs_chunk
    return 4 if jax.default_backend() == "cpu" else 32


@dataclasses.dataclass(frozen=True)
class _Fold:
    """How `count` examples are laid out as `chunks` equal chunks of `length`."""

    count: int
    chunks: int
    length: int

    def part(self, batch: PyTree, number: Array) -> tuple[PyTree, Array]:
        """One chunk, leaves `(length, ...)`, and its examples' indices; those `>= count` are padding.

        Slices inside the loop, so that no second copy of the data is laid out.
        """
        indices = number + self.chunks * jnp.arange(self.length, dtype=jnp.int32)

        def leaf_part(x: Array) -> Array:
            if self.chunks * self.length == self.count:
                folded = rearrange(x, "(length chunks) ... -> length chunks ...", chunks=self.chunks)
                return lax.dynamic_index_in_dim(folded, number, axis=1, keepdims=False)
            return jnp.take(x, jnp.minimum(indices, self.count - 1), axis=0)

        return jax.tree.map(leaf_part, batch), indices

    def numbers(self) -> Array:
        """Of the chunks, `(chunks,)`."""
        return jnp.arange(self.chunks, dtype=jnp.int32)

    def join(self, folded: PyTree) -> PyTree:
        """Leaves `(chunks, length, ...)` back to `(N, ...)`."""
        return jax.tree.map(lambda x: rearrange(x, "chunks length ... -> (length chunks) ...")[: self.count], folded)


@functools.cache
def _fold(count: int, chunk: int | None, devices: int = 1) -> _Fold:
    """As few chunks as may be; for a batch on several devices, such that each has its share of every chunk."""
    shares = math.gcd(count, devices)
    fewest = -(-count // min(max(chunk or DEFAULT_CHUNK, shares), count))
    if shares > 1 and fewest > 1:
        chunks = next(n for n in range(fewest, count // shares + 1) if (count // shares) % n == 0)
        return _Fold(count, chunks, count // chunks)
    return _Fold(count, fewest, -(-count // fewest))


def _devices(batch: PyTree) -> int:
    """Of the mesh that a batch is on: how many may share it, for a program is not told over which axes it is split."""
    return max(1, _mesh(batch).size)


def _mesh(batch: PyTree) -> AbstractMesh:
    """The mesh that a batch is on, of size 0 if there is none."""
    return max((jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(batch)), key=lambda mesh: mesh.size)


def each(fn: Callable[..., PyTree], batch: PyTree, *shared: PyTree) -> PyTree:
    """`fn(example, *shared)` of every example of a chunk, for functions that differentiate in the parameters.

    XLA computes gradients of single examples wrongly for convolutions with channels last when it splits the examples
    over devices: those of the first device are right, the others are not (seen in jax 0.9.2 and 0.12.0).  There every
    device is given its examples, and all that is shared, by hand; the rest is left to the compiler.
    """
    mesh, axes, shares = _mesh(batch), [], 1
    for name, size in mesh.shape.items():
        if tree.count(batch) % (shares * size) == 0:
            axes, shares = [*axes, name], shares * size
    mapped = jax.vmap(fn, (0, *(None,) * len(shared)))
    if mesh.size <= 1 or mesh.manual_axes or not uses(jax.make_jaxpr(mapped)(batch, *shared), "conv"):
        return mapped(batch, *shared)
    split, everywhere = PartitionSpec(tuple(axes)), PartitionSpec()
    specs = (split, *(everywhere,) * len(shared))
    return jax.shard_map(mapped, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)(batch, *shared)


def scan_chunks(
    step: Callable[[Carry, PyTree, Array], Carry], carry: Carry, batch: PyTree, *, chunk: int | None = None
) -> Carry:
    """Fold `carry = step(carry, chunk_of_batch, indices)` over the chunks of a batch.

    `indices` `(length,)` are the examples' places in the batch; those `>= N` are padding.
    """
    fold = _fold(tree.count(batch), chunk, _devices(batch))
    if fold.chunks == 1:
        return step(carry, batch, jnp.arange(fold.count, dtype=jnp.int32))
    return lax.scan(lambda c, number: (step(c, *fold.part(batch, number)), None), carry, fold.numbers())[0]


def sum_over(
    fn: Callable[[PyTree, Array], PyTree],
    batch: PyTree,
    weights: Array | None = None,
    *,
    chunk: int | None = None,
    dtype: np.dtype | None = None,
) -> tuple[PyTree, Array]:
    """Weighted sum over a batch, and the sum of the weights, both undivided.

    An example of weight zero is not looked at: another one takes its place, without weight, for zero times what is not
    finite is not zero.  The derivative in its weight is what it would add, NaN where that is not finite.

    Args:
      fn: `fn(chunk_of_batch, chunk_weights) -> tree`, the weighted sum over that chunk, linear in the weights.
      batch: Leaves `(N, ...)`.
      weights: `(N,)`, ones if None.
      chunk: Examples per chunk; at most 256 if None.
      dtype: Dtype of the weights, float32 if None.

    Returns:
      The tree summed in at least float32, and `sum(weights)`.
    """
    count = jax.tree.leaves(batch)[0].shape[0]
    spare = None if weights is None else Spare.of(batch, weights)
    weights = jnp.ones(count, dtype or jnp.float32) if weights is None else weights.astype(dtype or weights.dtype)

    def step(carry: PyTree, part: PyTree, indices: Array) -> PyTree:
        batch_part, weight_part = part
        masked = jnp.where(indices < count, weight_part, jnp.zeros_like(weight_part))
        summed = fn(batch_part, masked) if spare is None else spare.sum(fn, batch_part, masked)
        return jax.tree.map(lambda acc, x: acc + x.astype(acc.dtype), carry, summed)

    zero = tree.zeros_like(tree.promote_shapes(jax.eval_shape(fn, batch, weights)))
    return scan_chunks(step, zero, (batch, weights), chunk=chunk), jnp.sum(weights)


class Spare(NamedTuple):
    """An example that has weight, to stand in for those that have none.

    Attributes:
      row: The first one with weight, leaves `(1, ...)`.
      found: Whether there is one.
    """

    row: PyTree
    found: Array

    @staticmethod
    def of(batch: PyTree, weights: Array) -> Spare:
        """Find it."""
        counts = weights != 0
        place = jnp.argmax(counts)
        row = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, place, keepdims=True), batch)
        return Spare(row, jnp.any(counts))

    def instead(self, batch: PyTree, weights: Array) -> PyTree:
        """Put it in the place of every example of a chunk that has no weight."""
        counts = lambda x: (weights != 0).reshape((-1,) + (1,) * (x.ndim - 1))
        return jax.tree.map(lambda x, row: jnp.where(counts(x), x, row), batch, self.row)

    def sum(self, fn: Callable[[PyTree, Array], PyTree], batch: PyTree, weights: Array) -> PyTree:
        """Sum over the examples of a chunk that have weight, differentiable in the weights of all."""
        none = jnp.zeros_like(weights)
        summed = fn(self.instead(batch, weights), jnp.where(weights != 0, weights, none))
        of_rest = _nothing_yet(fn, batch, jnp.where(weights != 0, none, weights))
        return jax.tree.map(lambda x, rest: jnp.where(self.found, x, jnp.zeros_like(x)) + rest, summed, of_rest)


def _nothing_yet(fn: Callable[[PyTree, Array], PyTree], batch: PyTree, weights: Array) -> PyTree:
    """Return the zeros that `fn` would if no weight were other than zero, with its derivatives in the weights.

    Nothing of `fn` is computed unless somebody differentiates in the weights.  What it closes over is hoisted out by
    hand, for the rule may be asked for when the trace that it was made in is over.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(batch, weights)
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    @jax.custom_jvp
    def nothing(weights: Array, batch: PyTree, values: list[Any]) -> PyTree:
        # vmap takes the tangents to be mapped only where the values are: so these depend on all that is mapped.
        zero = functools.reduce(jnp.add, map(_sum_of_none, jax.tree.leaves((weights, batch, values))))
        return jax.tree.map(lambda x: x + zero.astype(x.dtype), zeros())

    def rule(primals: tuple, tangents: tuple) -> tuple[PyTree, PyTree]:
        weights, batch, values = primals
        if isinstance(tangents[0], SymbolicZero):
            return nothing(*primals), zeros()
        run = jaxpr_as_fun(ClosedJaxpr(opened(closed), values))
        summed = lambda w: jax.tree.structure(shapes).unflatten(run(*jax.tree.leaves(batch), w))
        return nothing(*primals), jax.jvp(summed, (weights,), (tangents[0],))[1]

    nothing.defjvp(rule, symbolic_zeros=True)
    return nothing(weights, batch, list(constants(closed)))


def _sum_of_none(x: Array) -> Array:
    """Sum up no entry of an array: a zero that depends on it, whatever it holds."""
    entries = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.asarray(x)
    return jnp.sum(entries.reshape(-1)[:0].astype(jnp.float32))


def map_chunks(
    fn: Callable[[PyTree], PyTree], batch: PyTree, *, chunk: int | None = None, shared: bool = True
) -> PyTree:
    """Apply `fn` to chunks, leaves `(length, ...)` to leaves `(length, ...)`, and concatenate in order.

    Args:
      fn: Function of a chunk.
      batch: Leaves `(N, ...)`.
      chunk: Examples per chunk, or as many as there are devices; at most 256 if None.
      shared: Whether the batch may be split over devices, as examples are; every device has all rows of a stack.
    """
    fold = _fold(tree.count(batch), chunk, _devices(batch) if shared else 1)
    if fold.chunks == 1:
        return fn(batch)
    return fold.join(lax.map(lambda number: fn(fold.part(batch, number)[0]), fold.numbers()))


def map_over(fn: Callable[[PyTree], PyTree], batch: PyTree, *, chunk: int | None = None) -> PyTree:
    """Apply `fn` to every example, vectorised within a chunk and sequential over chunks."""
    if chunk == 1 and _devices(batch) == 1:
        return lax.map(fn, batch)
    return map_chunks(jax.vmap(fn), batch, chunk=chunk)


def map_rows(fn: Callable[[PyTree], PyTree], stack: PyTree, rhs_chunk: int | None = None) -> PyTree:
    """Apply `fn` to every row of a stack, `rhs_chunk_or_default` at once."""
    rows = tree.count(stack)
    chunks = -(-rows // min(rhs_chunk_or_default(rhs_chunk), rows))
    if chunks == rows:
        return lax.map(fn, stack)
    if chunks == 1:
        return jax.vmap(fn)(stack)
    length = -(-rows // chunks)
    # The last chunk ends with the last row, and has some of the one before again: a slice costs less than a gather.
    starts = jnp.minimum(jnp.arange(chunks, dtype=jnp.int32) * length, rows - length)
    part = lambda start: jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, length), stack)
    again = chunks * length - rows

    def join(x: Array) -> Array:
        whole = x.reshape(chunks * length, *x.shape[2:])
        last = whole.shape[0] - length
        return jnp.concatenate([whole[:last], whole[last + again :]]) if again else whole

    return jax.tree.map(join, lax.map(lambda start: jax.vmap(fn)(part(start)), starts))


@compiled
def take(batch: PyTree, indices: Array) -> PyTree:
    """The examples at `indices`."""
    return jax.tree.map(lambda x: jnp.take(x, indices, axis=0), batch)
