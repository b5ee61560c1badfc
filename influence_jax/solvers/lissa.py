r"""LiSSA: a Neumann series, on all data or on random minibatches."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import tree
from .._pytree import dataclass, static
from .._typing import Array, Key, PyTree
from ..batching import check_key, check_positive
from ..curvature import LinearOperator, minibatch
from ..curvature.capabilities import wide_dtype
from ..curvature.loops import fori_loop, while_loop
from ..curvature.operator import Wrapper
from .base import Solver, iterate
from .damping import (
    Damping,
    DampingLike,
    check_damping,
    check_number,
    check_tolerance,
    damped_product,
    every_value,
    needs_damping,
)
from .info import NOT_FINITE, Info, is_nan, solved

# Power iterations for the scale, and how far above the estimate it is put: the estimate comes from below.
POWER_STEPS = 30
HEADROOM = 1.1
# How many times longer than a contraction's a series may grow, minibatches being noisy, before it counts as divergent.
BOUND = 10


class LissaFit(NamedTuple):
    """What the scale and the minibatches of a series are drawn from."""

    largest: Array | None  # (), largest eigenvalue; None where the scale is given
    key: Key | None  # of minibatches


@needs_damping
@dataclass
class LiSSA(Solver):
    r"""Sum a Neumann series: $h \leftarrow v + h - (A_B + \lambda I) h / \sigma$ from $h = v$, and $x = h / \sigma$.

    On all data in every step, or on random minibatches B, whose noise `repeats` independent chains average away:
    `Info.standard_error` is what is left of it.  Damping is exactly $\lambda$, whatever the scale.  A chain that grows
    beyond bounds is stopped, and shows in the true residual, for which one product is spent.  Derivatives are those of
    the exact solution, each another series.

    Args:
      damping: $\lambda \ge 0$, a `RelativeDamping`, or a dict or tree of these by block or leaf.
      scale: $\sigma$, at least the largest eigenvalue plus damping (of the minibatches, if there are any); 1.1 times
        a power iteration's estimate if None.
      depth: Most steps; static.
      repeats: Independent chains; static.
      batch_size: Examples per step, drawn with replacement; all data if None; static.
      rtol: Relative residual at which a solve counts as converged, and at which a chain on all data stops.

    Raises:
      ValueError: In `invert`, without a key where one is needed (`batch_size`, or no scale), or if `batch_size`
        is given for an operator without data.

    Example:
      >>> import influence_jax as ij
      >>> op = ij.Diagonal({"w": jnp.array([1.0, 3.0])})
      >>> inverse = ij.invert(op, ij.LiSSA(1.0, scale=5.0, depth=100))
      >>> inverse.mv({"w": jnp.array([2.0, 4.0])})["w"].round(2).tolist()
      [1.0, 1.0]

    Reference: Agarwal et al. 2017, arXiv:1602.03943; Koh & Liang 2017, arXiv:1703.04730.
    """

    damping: DampingLike
    scale: float | Array | None = dataclasses.field(default=None, kw_only=True)
    depth: int = static(default=1000, kw_only=True)
    repeats: int = static(default=1, kw_only=True)
    batch_size: int | None = static(default=None, kw_only=True)
    rtol: float | Array = dataclasses.field(default=1e-3, kw_only=True)

    def __post_init__(self) -> None:
        check_damping(self.damping)
        check_tolerance(self.rtol)
        check_positive(self.depth, "depth")
        check_positive(self.repeats, "repeats")
        if self.scale is not None:
            check_number(self.scale, "scale")
            if not isinstance(self.scale, jax.core.Tracer) and float(self.scale) == 0:
                raise ValueError("scale: got 0, expected a number above the largest eigenvalue + damping, or None")
        if self.batch_size is not None:
            check_positive(self.batch_size, "batch_size")
        elif self.repeats > 1:
            raise ValueError(f"repeats: got {self.repeats}, but chains on all data are alike; give batch_size too")

    @property
    def symmetric(self) -> bool:
        return self.batch_size is None

    def fit(self, op: LinearOperator, damping: Damping, *, key: Key | None = None) -> LissaFit:
        if self.batch_size is not None and not _examples(op):
            raise ValueError(f"batch_size: got {self.batch_size}, but {op!r} has no data to draw from; drop it")
        if self.batch_size is None and self.scale is not None:
            return LissaFit(None, None)
        key = check_key(key, "LiSSA draws minibatches, and its scale by power iteration; pass it to invert")
        key_scale, key_batches = jax.random.split(key)
        largest = _largest_eigenvalue(lax.stop_gradient(op), key_scale) if self.scale is None else None
        return LissaFit(largest, key_batches)

    def solve(self, op: LinearOperator, damping: Damping, fit: LissaFit, V: PyTree) -> tuple[PyTree, Info]:
        scale, key, rtol = lax.stop_gradient((self._scale(damping, fit), fit.key, self.rtol))
        return iterate(op, damping, V, lambda op, damping, B: self._solve(_Series(op, damping, scale), key, B, rtol))

    def _scale(self, damping: Damping, fit: LissaFit) -> Array:
        dampings = every_value(damping)
        if fit.largest is None:
            return jnp.asarray(self.scale, dampings.dtype)
        return HEADROOM * (fit.largest + jnp.max(dampings))

    def _solve(self, series: _Series, key: Key | None, B: PyTree, rtol: float | Array) -> tuple[PyTree, Info]:
        norm = tree.norms(B)
        tolerance = (rtol * norm).astype(norm.dtype)
        if self.batch_size is None or key is None:
            X, steps = self._chain(series, B, tolerance, None)
            spread: Array | None = jnp.zeros_like(norm)
        else:
            keys = jax.random.split(key, self.repeats)
            chains, counts = lax.map(lambda key: self._chain(series, B, tolerance, key), keys)
            X, steps = jax.tree.map(lambda x: jnp.mean(x, axis=0), chains), jnp.max(counts, axis=0)
            spread = _standard_error(chains, X)
        mm = partial(damped_product, series.op, series.damping)
        X, info = solved(mm, X, B, jnp.full_like(norm, rtol), steps, None)
        return X, info._replace(standard_error=spread)

    def _chain(self, series: _Series, B: PyTree, tolerance: Array, key: Key | None) -> tuple[PyTree, Array]:
        norm = tree.norms(B)
        inverse_scale = 1 / series.scale.astype(norm.dtype)

        def step(it: _Chain) -> _Chain:
            op = series.op
            if key is not None:
                shape, count = (self.batch_size or 1,), _examples(op)
                indices = jax.random.randint(jax.random.fold_in(key, it.step), shape, 0, count)
                op = minibatch(op, indices)
            update = tree.subtract(B, tree.scale(inverse_scale, damped_product(op, series.damping, it.h)))
            h = tree.add(it.h, update)
            # The series of a contraction is no longer than its number of terms times the first.
            sound = tree.norms(h) <= BOUND * (it.step + 2).astype(norm.dtype) * norm
            going = it.going & sound & ((tree.norms(update) > tolerance) if key is None else True)
            return _Chain(
                tree.where_rows(it.going & sound, h, it.h), going, it.steps + it.going.astype(jnp.int32), it.step + 1
            )

        start = _Chain(B, norm > 0, jnp.zeros(norm.shape, jnp.int32), jnp.zeros((), jnp.int32))
        end = while_loop(series.op)(lambda it: jnp.any(it.going) & (it.step < self.depth), step, start)
        return tree.scale(inverse_scale, end.h), end.steps

    def advice(self, info: Info) -> str:
        if is_nan(info):
            return NOT_FINITE
        if info.residual is not None and np.max(info.residual) >= 1:
            given = "leave scale to None" if self.scale is not None else "raise the damping"
            return f"the series diverges: its scale is below the largest eigenvalue + damping; raise scale or {given}"
        noise = "repeats or batch_size, " if self.batch_size is not None else ""
        return f"the series is not done: raise depth ({self.depth}), {noise}the damping, which shortens it, or rtol"


class _Series(NamedTuple):
    """What every step of a series multiplies with."""

    op: LinearOperator
    damping: Damping
    scale: Array  # ()


class _Chain(NamedTuple):
    """State of the series for K right-hand sides."""

    h: PyTree  # (K, *leaf)
    going: Array  # (K,) bool
    steps: Array  # (K,) int32
    step: Array  # () int32


def _standard_error(chains: PyTree, mean: PyTree) -> Array | None:
    """Of the mean over chains, leaves `(R, K, *leaf)`, relative to its length; None from one chain."""
    repeats = tree.count(chains)
    if repeats == 1:
        return None
    squares = jnp.sum(jax.vmap(lambda x: tree.dots(*[tree.subtract(x, mean)] * 2))(chains), axis=0)
    size = tree.norms(mean)
    return jnp.sqrt(squares / (repeats * (repeats - 1))) / jnp.where(size > 0, size, 1)


def _examples(op: LinearOperator) -> int:
    """Number of examples behind an operator, 0 if there are none."""
    if isinstance(op, Wrapper):
        counts = {_examples(part) for part in op.parts} - {0}
        if len(counts) > 1:
            raise ValueError(
                f"batch_size: {op!r} is a sum over data of {sorted(counts)} examples, which have no minibatch in "
                "common; drop batch_size"
            )
        return max(counts, default=0)
    return getattr(op, "count", 0)


def _largest_eigenvalue(op: LinearOperator, key: Key) -> Array:
    """Largest absolute eigenvalue by power iteration: from below, hence the headroom."""
    normal = jax.random.normal(key, (op.size,), wide_dtype(op.space))

    def step(_: int, carry: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
        product = tree.promote(op.mv(carry[0]))
        length = jnp.sqrt(tree.dot(product, product))
        return tree.scale(1 / jnp.where(length > 0, length, 1), product), length

    start = tree.unflatten(normal / jnp.linalg.norm(normal), op.space)
    return fori_loop(op)(0, POWER_STEPS, step, (start, jnp.zeros((), normal.dtype)))[1]
