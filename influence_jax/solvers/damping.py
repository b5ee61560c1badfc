"""Damping: what is added to an operator's eigenvalues before it is inverted."""

from __future__ import annotations

import functools
import numbers
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from .. import _reprs, tree
from .._mesh import compiled
from .._pytree import dataclass, static
from .._typing import Array, Key, PyTree
from .._words import levels_inside
from ..batching import check_positive
from ..blocks import Block, is_below
from ..curvature import LinearOperator, diagonal_blocks, restrict, trace
from ..curvature.capabilities import EXACT_TRACE_SIZE, wide_dtype


@dataclass
class RelativeDamping:
    r"""Damping as a multiple c of the operator's mean eigenvalue, $\lambda = c\,\mathrm{tr}(A) / P$ of P parameters.

    Args:
      factor: Non-negative number; 0.1 is common for Kronecker-factored curvature.

    Raises:
      TypeError, ValueError: If it is not a non-negative number.

    Example:
      >>> import influence_jax as ij
      >>> inverse = ij.invert(3.0 * ij.Identity({"w": jnp.ones(2)}), ij.Direct(ij.RelativeDamping(0.5)))
      >>> float(inverse.damping)
      1.5

    Reference: Grosse et al. 2023, arXiv:2308.03296, section 3.2.
    """

    factor: float | Array

    def __post_init__(self) -> None:
        check_number(self.factor, "factor")

    def __repr__(self) -> str:
        return _reprs.call(self, _reprs.value(self.factor))


_T = TypeVar("_T")

# A parameter that the loss does not depend on, as in front of a normalisation, has a gradient of rounding only, some
# multiple c of the machine epsilon times the gradients of others, and hence a curvature of c² eps² times theirs.
# Measured on instance, layer and RMS norms (8 to 64 channels, up to 200 positions): mean eigenvalues of such a block
# are 8e-16 to 7e-12 of the largest block's in float32, bfloat16 parameters included, whose gradients are taken in
# float32, and 1e-33 to 1e-29 in float64; so c is 0.2 to 22, the most for K-FAC with many positions.  64 is three times
# that, 6e-11 in float32, where a block that is small but real, 1e-8 of the largest, keeps a damping of its own.
NOISE = 64

CHOICES = (
    "a number >= 0 in units of the loss, influence_jax.RelativeDamping(0.1) for a tenth of the mean eigenvalue, or 0.0 "
    "if the matrix is known to be well conditioned"
)


def needs_damping(cls: type[_T]) -> type[_T]:
    """Make a solver that is called without a damping say which there are.

    None of them has a default: a network's curvature is singular, what to add to it is a modelling choice with the
    units of the loss, and an undamped solve of a singular system is the commonest wrong number of all.
    """
    make: Any = cls.__init__

    @functools.wraps(make)
    def init(self: Any, *args: Any, **options: Any) -> None:
        if not args and "damping" not in options:
            raise TypeError(f"damping: {cls.__name__} got none, expected {CHOICES}, e.g. {cls.__name__}(damping=1e-2)")
        make(self, *args, **options)

    setattr(cls, "__init__", init)  # noqa: B010
    return cls


def check_number(value: Any, name: str) -> None:
    """Raise unless `value` is a finite non-negative scalar; traced values pass unseen."""
    if isinstance(value, jax.core.Tracer):
        return
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Real | np.ndarray | jax.Array)
        or getattr(value, "shape", ()) != ()
    ):
        raise TypeError(f"{name}: got {value!r}, expected a non-negative number")
    if not 0 <= float(value) < float("inf"):
        raise ValueError(f"{name}: got {float(value)}, expected a finite non-negative number")


def check_tolerance(rtol: Any) -> None:
    """Raise unless `rtol` is a number in [0, 1); at 1 the zero vector would be an answer."""
    check_number(rtol, "rtol")
    if not isinstance(rtol, jax.core.Tracer) and float(rtol) >= 1:
        raise ValueError(f"rtol: got {float(rtol)}, expected a number below 1, e.g. 1e-5")


def check_damping(damping: Any, name: str = "damping") -> None:
    """Raise unless `damping` is a non-negative number, a `RelativeDamping`, or a tree of these."""
    for part in jax.tree.leaves(damping, is_leaf=_is_asked) or [damping]:  # an empty container has none
        if isinstance(part, RelativeDamping):
            continue
        try:
            check_number(part, name)
        except TypeError:
            raise TypeError(
                f"{name}: got {damping!r}, expected a non-negative number or influence_jax.RelativeDamping(factor), or "
                "a dict or tree of these by block or leaf"
            ) from None


def check_iteration(solver: Any) -> None:
    """Raise unless the damping, the tolerances and the number of steps of conjugate gradients make sense."""
    check_damping(solver.damping)
    check_tolerance(solver.rtol)
    check_number(solver.atol, "atol")
    check_positive(solver.max_steps, "max_steps")


@dataclass
class BlockDamping:
    r"""A damping for each of several blocks of leaves, $A + \oplus_b \lambda_b I$, as solvers get it.

    Made by `invert` where what is asked for is not one number for all.

    Attributes:
      values: Of each block, `()`.
      blocks: Names of the blocks, and of the leaves in each; static.

    Example:
      >>> import influence_jax as ij
      >>> op = ij.Diagonal({"a": jnp.array([1.0]), "b": jnp.array([3.0])})
      >>> ij.invert(op, ij.BlockCG({"a": 1.0, "b": ij.RelativeDamping(0.5)})).damping
      BlockDamping(a=1.0, b=1.5)
    """

    values: OrderedDict[str, Array]
    blocks: tuple[tuple[str, Block], ...] = static()

    def __repr__(self) -> str:
        return _reprs.call(self, **self.values)


Damping: TypeAlias = Array | BlockDamping
# What a person asks for: a number, or a dict by block or a tree like the parameters of numbers, absolute or relative.
DampingLike: TypeAlias = float | Array | RelativeDamping | PyTree


def of_leaves(damping: Damping, names: Iterable[str]) -> Damping:
    """Return the damping of some leaves: a number, if they are all in one block."""
    if not isinstance(damping, BlockDamping):
        return damping
    wanted = set(names)
    kept = [(name, tuple(leaf for leaf in block if leaf in wanted)) for name, block in damping.blocks]
    kept = [(name, block) for name, block in kept if block]
    if len(kept) == 1:
        return damping.values[kept[0][0]]
    return BlockDamping(OrderedDict((name, damping.values[name]) for name, _ in kept), tuple(kept))


def each_leaf(damping: Damping, space: PyTree) -> PyTree:
    """Return a tree like the parameters with the damping of every leaf, `()`."""
    leaves, structure = jax.tree.flatten(space)
    if not isinstance(damping, BlockDamping):
        return structure.unflatten([damping] * len(leaves))
    of_leaf = {leaf: damping.values[name] for name, block in damping.blocks for leaf in block}
    return structure.unflatten([of_leaf[name] for name, _ in tree.named_leaves(space)])


def every_value(damping: Damping) -> Array:
    """Return the dampings of all blocks, `(B,)`."""
    return jnp.stack(list(damping.values.values())) if isinstance(damping, BlockDamping) else jnp.reshape(damping, -1)


def flat_damping(damping: Damping, space: PyTree) -> Array:
    """Return the damping of flat vectors: one number, or one for each entry, `(P,)`."""
    if not isinstance(damping, BlockDamping):
        return damping
    leaves = jax.tree.map(lambda d, leaf: jnp.broadcast_to(d, leaf.shape), each_leaf(damping, space), space)
    return tree.flatten(leaves, space)


def divide(X: PyTree, damping: Damping) -> PyTree:
    """Return a stack over its damping, $D^{-1} X$, in the dtypes of the stack."""
    return jax.tree.map(lambda x, d: x / _for_rows(d, x), X, each_leaf(damping, X))


def multiply(X: PyTree, damping: Damping) -> PyTree:
    """Return a stack times its damping, $D X$, in the dtypes of the stack."""
    return jax.tree.map(lambda x, d: x * _for_rows(d, x), X, each_leaf(damping, X))


def _for_rows(d: Array, x: Array) -> Array:
    """Return the damping of a leaf, or of flat vectors, as what meets every row of a stack alike."""
    return (d if d.ndim == 0 else d[None]).astype(x.dtype)


def damped_product(op: LinearOperator, damping: Damping, X: PyTree) -> PyTree:
    r"""The product of the damped operator with a stack, $(A + \lambda I) X$.

    Args:
      op: Operator A.
      damping: $\lambda$ as a solver gets it, a number or one for each block.
      X: Leaves `(K, *leaf)`.

    Returns:
      Leaves `(K, *leaf)`.

    Example:
      >>> import influence_jax as ij
      >>> op = ij.Identity({"w": jnp.ones(2)})
      >>> ij.solvers.damped_product(op, jnp.array(2.0), {"w": jnp.ones((1, 2))})["w"].tolist()
      [[3.0, 3.0]]
    """
    return tree.add(op.mm(X), multiply(X, damping))


class Asked(NamedTuple):
    """What a person asks for, of some leaves: a number or a `RelativeDamping`."""

    damping: Any
    leaves: Block


def _is_asked(x: Any) -> bool:
    return isinstance(x, RelativeDamping) or x is None


def asked_by_block(damping: Any, op: LinearOperator) -> OrderedDict[str, Asked]:
    """Return what is asked for, block by block.

    A `RelativeDamping` is of each of the operator's diagonal blocks.  A dict has a number or a `RelativeDamping` for
    each such block, or, as a tree like the parameters, for each part of the parameters.

    Raises:
      ValueError: If a dict or tree leaves parameters out, or can be read in both ways.
    """
    diagonal, names = dict(diagonal_blocks(op)), tuple(name for name, _ in tree.named_leaves(op.space))
    if isinstance(damping, RelativeDamping):
        return OrderedDict((name, Asked(damping, block)) for name, block in diagonal.items())
    given = jax.tree_util.tree_leaves_with_path(damping, is_leaf=_is_asked)
    asked = OrderedDict((tree.path_name(path), value) for path, value in given)
    if list(asked) == [""]:
        return OrderedDict({"": Asked(asked[""], names)})
    below = {name: tuple(leaf for leaf in names if is_below(leaf, name)) for name in asked}
    readings = [diagonal] if set(asked) == set(diagonal) else []
    covers = all(below.values()) and sorted(leaf for part in below.values() for leaf in part) == sorted(names)
    of_both = [{name: set(block) for name, block in reading.items()} for reading in (below, *readings)]
    if covers and of_both[0] not in of_both[1:]:
        readings.append(below)
    if len(readings) != 1:
        expected = f"one for each of the blocks {list(diagonal)}, or " if len(diagonal) > 1 else ""
        both = ", which are both names of blocks and parts of parameters that differ" if readings else ""
        raise ValueError(
            f"damping: got one for each of {list(asked)}{both}, expected a number, {expected}one for each part of the "
            f"parameters, which has to cover every leaf once: {list(names)}"
        )
    return OrderedDict((name, Asked(asked[name], leaves)) for name, leaves in readings[0].items())


def resolve(asked: Mapping[str, Asked], op: LinearOperator, key: Key | None) -> tuple[Damping, Mapping[str, Array]]:
    """Return the absolute damping, and for each block that has a relative one, whether it is nothing but rounding."""
    relative = any(isinstance(part.damping, RelativeDamping) for part in asked.values())
    blocks = tuple((name, part.leaves) for name, part in asked.items())
    wanted = OrderedDict((name, part.damping) for name, part in asked.items())
    if relative and not op.at_hand:
        trace(op, key=key)  # raises, for there are no data to take it of
    run = _relative_dampings if op.on_host else _compiled_relative_dampings
    found, noise = run(wanted, op, key, blocks=blocks) if relative else ({}, {})
    dtype = wide_dtype(op.space)
    values = OrderedDict((name, found[name] if name in found else jnp.asarray(wanted[name], dtype)) for name in wanted)
    return values[blocks[0][0]] if len(blocks) == 1 else BlockDamping(values, blocks), noise


def _relative_dampings(
    wanted: Mapping[str, Any], op: LinearOperator, key: Key | None, *, blocks: tuple[tuple[str, Block], ...]
) -> tuple[OrderedDict[str, Array], OrderedDict[str, Array]]:
    parts = {name: restrict(op, block) for name, block in blocks} if len(blocks) > 1 else {blocks[0][0]: op}
    # Keys of its own, for the solver draws from the same one.
    keys = {name: None if key is None else jax.random.fold_in(key, place) for place, name in enumerate(parts)}
    return block_dampings(wanted, parts, keys)


_compiled_relative_dampings = compiled(_relative_dampings, static_argnames="blocks")


def block_dampings(
    wanted: Mapping[str, Any], parts: Mapping[str, LinearOperator], keys: Mapping[str, Key | None]
) -> tuple[OrderedDict[str, Array], OrderedDict[str, Array]]:
    r"""Return the absolute dampings that are relative in `wanted`, and which blocks hold nothing but rounding.

    Relative to the mean eigenvalue of each block.  Of a block without curvature, to rounding, any multiple of its own
    mean would make its scores as loud as all others: it is damped by the mean of all blocks.
    """
    relative = {name: damping for name, damping in wanted.items() if isinstance(damping, RelativeDamping)}
    if not relative:
        return OrderedDict(), OrderedDict()
    found = {name: _known_trace(part, keys[name], name in relative) for name, part in parts.items()}
    traces = {name: total for name, total in found.items() if total is not None}
    means = {name: total / max(parts[name].size, 1) for name, total in traces.items()}
    whole = jnp.sum(jnp.stack(list(traces.values()))) / sum(parts[name].size for name in traces)
    largest = jnp.max(jnp.stack(list(means.values())))
    dampings: OrderedDict[str, Array] = OrderedDict()
    noise: OrderedDict[str, Array] = OrderedDict()
    for name, damping in relative.items():
        dtype = wide_dtype(parts[name].space)
        dead = jnp.abs(means[name]) <= (NOISE * float(jnp.finfo(dtype).eps)) ** 2 * largest
        mean = jnp.where(dead, whole, means[name])
        # Under tracing nothing can raise: NaN turns into `converged=False`, and `invert` raises for it on the host.
        dampings[name] = jnp.where(mean > 0, damping.factor * mean, jnp.nan).astype(dtype)
        noise[name] = dead & (means[name] != 0)
    return dampings, noise


def _known_trace(op: LinearOperator, key: Key | None, needed: bool) -> Array | None:
    """Return the trace of a block; None where it is only compared with and would have to be estimated without a key."""
    if not needed and key is None and not op.on_host and op.size > EXACT_TRACE_SIZE:
        try:
            return trace(op)
        except ValueError:
            return None
    return trace(op, key=key)


def warn_of_noise(noise: Mapping[str, Array], op: LinearOperator) -> None:
    """Name, on the host, the blocks whose curvature is rounding beside that of the others."""
    if any(isinstance(is_noise, jax.core.Tracer) for is_noise in noise.values()):
        return
    named = [repr(name) for name, is_noise in noise.items() if np.asarray(is_noise)]
    if named:
        blocks, their = ("block", "its") if len(named) == 1 else ("blocks", "their")
        warnings.warn(
            f"damping: in {op!r} the curvature of {blocks} {', '.join(named)} is rounding beside that of the others, "
            "as of parameters that the loss does not depend on, e.g. in front of a normalisation; "
            f"{their} RelativeDamping is relative to the mean eigenvalue of all blocks",
            stacklevel=levels_inside(),
        )


def check_positive_means(damping: Damping, solver: Any, op: LinearOperator) -> None:
    """Raise, on the host, if a `RelativeDamping` met a mean eigenvalue that is not positive."""
    of_block = damping.values if isinstance(damping, BlockDamping) else {"": damping}
    for name, value in of_block.items():
        if not isinstance(value, jax.core.Tracer) and not np.isfinite(value):
            where = f" of block '{name}'" if name else ""
            raise ValueError(
                f"damping: {solver!r} on {op!r} asks for a multiple of the mean eigenvalue{where}, which is not "
                "positive; give an absolute damping"
            )
