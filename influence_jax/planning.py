"""Memory planning: what a call will take, and the largest chunks that fit a budget, before anything is allocated.

The numbers are the compiler's own: programs are compiled for shapes alone and asked how much memory they were given.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping

from ._footprint import Memory, Programs, memory, with_chunks
from ._memory import readable
from ._typing import PyTree
from .batching import check_positive
from .influence import Influence

__all__ = ["Memory", "Plan", "as_bytes", "memory", "plan"]

# Where fewer examples at once than this would fit, the training data are read in blocks instead.
FEW = 16
# Tries at the size that the line through the last two predicts; then halving, for needs need not grow along a line.
PREDICTED = 3

UNITS = {
    **{"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    **{"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
}


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """Chunks that fit a budget, made by `plan`; prints as a table.

    Attributes:
      chunk: Training examples at once, for `Influence(..., chunk=...)`.
      rhs_chunk: Factors at once, for `Influence(..., rhs_chunk=...)`.
      batch_size: Training examples in memory at once, for `influence_jax.stream`; all of them where they fit.
      bytes: What that takes on each device, at most.
      budget: What was allowed.
      method: What was planned.
      parts: Of its programs, in the order they run: what each takes, with all arrays that are held meanwhile.

    Example:
      >>> import jax.numpy as jnp
      >>> import influence_jax as ij
      >>> params = {"w": jnp.ones(2)}
      >>> influence = ij.Influence(lambda params, z: params["w"] @ z, params, ij.Identity(params))
      >>> Plan(64, 4, 1000, 2**20, 2**21, "influences", {}).apply(influence).chunk
      64
    """

    chunk: int
    rhs_chunk: int
    batch_size: int
    bytes: int
    budget: int
    method: str
    parts: Mapping[str, Memory]

    def apply(self, influence: Influence) -> Influence:
        """The influence with these chunks."""
        return with_chunks(influence, self.chunk, self.rhs_chunk)

    def __repr__(self) -> str:
        rows: list[tuple[str, ...]] = [("", "arguments", "outputs", "temporary", "total")]
        for name, part in self.parts.items():
            rows.append((name, *map(readable, (part.arguments, part.outputs, part.temporary, part.total))))
        return "\n".join(
            [
                f"Plan for {self.method}: {readable(self.bytes)} of {readable(self.budget)} on each device",
                f"  chunk       {self.chunk:>12,}  training examples at once",
                f"  rhs_chunk   {self.rhs_chunk:>12,}  factors at once",
                f"  batch_size  {self.batch_size:>12,}  training examples in memory at once",
                *(f"  {row[0]:<16}" + "".join(f"{cell:>13}" for cell in row[1:]) for row in rows),
            ]
        )


def plan(
    influence: Influence,
    query: PyTree,
    train: PyTree,
    *,
    budget: int | str,
    method: str = "influences",
    wrt: str | int = "x",
) -> Plan:
    """The largest chunks with which scores fit a budget, and what every part takes; nothing is computed.

    Counted is all that the call has in memory on each device: the arrays of the influence, once each, queries, training
    data, factors, scores, and what the programs hold in between.  Arrays that a loss closes over and whatever else is
    on the device are not; leave room for them, and about a tenth for the allocator.

    The training data are in memory as a whole where they fit, else in blocks of `batch_size`, as functions of
    `influence_jax.stream` read them.  Two to seven programs are compiled, or a few more where little fits: chunks
    are powers of two, and needs grow about linearly with them, so two sizes predict the next.

    Args:
      influence: Arrays or `jax.ShapeDtypeStruct`s, e.g. of `jax.eval_shape`.
      query: Leaves `(Q, ...)`, arrays or `jax.ShapeDtypeStruct`s; None for `"self_influences"`.
      train: Leaves `(N, ...)`, arrays or `jax.ShapeDtypeStruct`s.
      budget: Bytes on each device, or a string such as `"2 GiB"`.
      method: What to plan for: `"influences"`, `"perturbation"` for that mode of it, `"token_influences"` or
        `"self_influences"`.  Chunks that fit one need not fit another.
      wrt: The perturbed part of a training example.

    Returns:
      A `Plan`; `plan.apply(influence)` has its chunks.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a batch is malformed, or not even one example at a time fits the budget.
      NotImplementedError: If the backend does not tell what a program takes.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import influence_jax as ij
      >>> params = {"w": jnp.ones((100, 10))}
      >>> f = lambda params, z: jnp.sum((z @ params["w"]) ** 2)
      >>> train, query = (jax.ShapeDtypeStruct((count, 100), jnp.float32) for count in (10_000, 8))
      >>> found = plan(ij.Influence(f, params, ij.Identity(params)), query, train, budget="6 MiB")
      >>> found.batch_size, 16 <= found.chunk < 10_000
      (10000, True)
    """
    limit, programs = as_bytes(budget), Programs(influence, query, train, method, wrt)
    rhs_chunk = programs.rhs_chunk
    chunk, rows = _sizes(programs, rhs_chunk, limit)
    least = programs.least
    if not chunk and programs.directional:
        needs = lambda size: programs.needs(least, least, size, limit)
        rhs_chunk = _largest(
            needs, {size: size for size in _powers(rhs_chunk)}, lambda: programs.unavoidable(0, limit), limit
        )
        chunk = rows = least if rhs_chunk else 0
    if not chunk:
        raise ValueError(_too_small(programs, limit))
    parts = programs.parts(rows, chunk, rhs_chunk)
    return Plan(chunk, rhs_chunk, rows, max(part.total for part in parts.values()), limit, method, parts)


def as_bytes(budget: int | str) -> int:
    """Bytes from a number of them or a string such as `"2 GiB"`.

    Args:
      budget: A positive integer, or a string of a number and a unit.

    Returns:
      An integer.

    Raises:
      TypeError: If it is neither.
      ValueError: If it is not positive, or the string has no such form.

    Example:
      >>> as_bytes("2 GiB"), as_bytes("1.5MB"), as_bytes(512)
      (2147483648, 1500000, 512)
    """
    if not isinstance(budget, str):
        check_positive(budget, "budget")
        return int(budget)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", budget)
    if found is None or found[2] not in UNITS or float(found[1]) * UNITS[found[2]] < 1:
        raise ValueError(
            f"budget: got {budget!r}, expected a positive number of bytes, or one with a unit such as '2 GiB' or "
            f"'500 MB'; the units are {', '.join(UNITS)}"
        )
    return int(float(found[1]) * UNITS[found[2]])


def _sizes(programs: Programs, rhs_chunk: int, budget: int) -> tuple[int, int]:
    """Training examples at once, and in memory at once; zero at once if none fit."""
    count = programs.rows
    few = 1 if programs.from_train else min(FEW, count)
    # Chunks are balanced: of a hundred examples, two chunks of fifty for any size from 50 to 99.
    whole = _largest(
        lambda size: programs.needs(count, size, rhs_chunk, budget),
        {size: -(-count // -(-count // size)) for size in _powers(count) if size >= few},
        lambda: programs.unavoidable(count, budget),
        budget,
    )
    if whole or programs.from_train:
        return whole, count
    powers = _powers(count, programs.least)
    for sizes in ([size for size in powers if size >= few], [size for size in powers if size < few]):
        blocks = _largest(
            lambda rows: programs.needs(rows, rows, rhs_chunk, budget),
            {size: size for size in sizes},
            lambda: programs.unavoidable(0, budget),
            budget,
        )
        if blocks:
            return blocks, blocks
    return 0, 0


def _powers(top: int, step: int = 1) -> list[int]:
    """Powers of two times `step` below `top`, and `top`."""
    return [*(step * 2**k for k in range((-(-top // step) - 1).bit_length())), top]


def _largest(needs: Callable[[int], float], sizes: Mapping[int, int], start: Callable[[], float], budget: int) -> int:
    """The largest size that needs at most the budget, or 0.

    Args:
      needs: Bytes that a size takes; a call compiles.
      sizes: Sizes, ascending, each with what its needs grow with.
      start: What no size avoids, as far as the sizes tried so far have shown.
      budget: Bytes.
    """
    order, extents = list(sizes), list(sizes.values())
    if not order or start() > budget:
        return 0
    if (most := needs(order[-1])) <= budget:
        return order[-1]
    if len(order) == 1 or start() > budget or (least := needs(order[0])) > budget:
        return 0
    low, high, tried = 0, len(order) - 1, [(extents[-1], most), (extents[0], least)]
    while high - low > 1:
        middle = (low + high) // 2
        (one, at_one), (other, at_other) = tried[-2:]
        slope = (at_other - at_one) / (other - one)
        if len(tried) < 2 + PREDICTED and 0 < slope < math.inf:
            reachable = other + (budget - at_other) / slope
            middle = min(max(sum(extent <= reachable for extent in extents) - 1, low + 1), high - 1)
        tried.append((extents[middle], needs(order[middle])))
        low, high = (middle, high) if tried[-1][1] <= budget else (low, middle)
    return order[low]


def _too_small(programs: Programs, budget: int) -> str:
    least, rhs_chunk = programs.least, 1 if programs.directional else programs.rhs_chunk
    chunk = 1 if programs.from_train else least
    parts = programs.parts(least, chunk, rhs_chunk)
    name, most = max(parts.items(), key=lambda item: item[1].total)
    fewer = f"fewer queries at once (now {programs.queries}), " if programs.queries else ""
    return (
        f"budget: got {readable(budget)}, but {name} takes at least {readable(most.total)} on each device, one "
        f"example at a time: {readable(most.arguments)} for the arrays it is given or that the influence holds, "
        f"{readable(most.outputs)} for its results, {readable(most.temporary)} in between. Less is taken by {fewer}"
        "a smaller chunk= or rhs_chunk= of the curvature operator, a solver that holds less, or parameters sharded "
        "over more devices; or raise the budget"
    )
