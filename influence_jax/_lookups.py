"""Where a loss reads an array at a number of the example, or at a fixed one, and whether it matters what it reads.

An index out of range is no error in JAX: it is moved to the nearest place, a negative one counts from the end,
`jax.nn.one_hot` makes zeros of it, `x.at[i].set(1)` leaves it out, and `lax.switch` takes the nearest function.  A loss
is read here from its jaxpr, run over marked values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._jaxpr_compat import called, constants, is_literal, opened, replaced, run_equation, scan_arity, written
from ._typing import Array

# Through these a number of the example stays one, at most in another place.
KEEP = (
    *("convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "copy", "stop_gradient"),
    *("transpose", "rev", "slice", "concatenate"),
)
# Arithmetic from which an index is computed again on its own, to see whether it is in range.
ARITHMETIC = (
    *KEEP,
    *("add", "sub", "mul", "neg", "max", "min", "clamp", "select_n", "rem", "div", "sign", "abs", "floor", "round"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "xor", "iota", "pad", "is_finite"),
)

# Numbers written in a program, of which more are no index but data.
MOST_FIXED = 2**16


class Site(NamedTuple):
    """An axis of an array that is read at numbers of the example.

    Attributes:
      kind: `"lookup"`; `"one_hot"` where the numbers are compared with 0, 1, ...; `"scatter"` where it is written to at
        them, and not where they are too large; `"switch"` where they choose among functions or arrays;
        `"write"` where it is written to at another place.
      parts: Of the example, that the numbers are made of; none if they are fixed.
      size: How long the axis is.
      direct: Whether the numbers are those of the example, as they are.
    """

    kind: str
    parts: tuple[str, ...]
    size: int
    direct: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Marked:
    """A value of the loss, and what is known of it.

    Attributes:
      value: None where it is not computed.
      raw: Of an index, what it was before negative ones were counted from the end.
      parts: Of the example, that it is computed from.
      model: Whether parameters went into it.
      arithmetic: Whether it is computed by arithmetic of numbers of the example alone.
      direct: Whether it is numbers of the example as they are.
      low: What it is not below, as far as the program says.
      high: What it is not above.
      role: `("negative", i)` for i < 0, `("shifted", i)` for i plus a number: both make an index i count from the end.
      columns: What it is joined from, along the last axis.
      counts: The axis along which it is 0, 1, ....
      spread: The axes along which it is broadcast.
      fixed: Its numbers, if they are written in the program.
      clamped: Of what `lax.clamp` made, and moved since: what the numbers were not below, and not above, until then.
        They are in `raw`.
    """

    value: Any = None
    raw: Any = None
    parts: frozenset[str] = frozenset()
    model: bool = False
    arithmetic: bool = True
    direct: bool = True
    low: float = -np.inf
    high: float = np.inf
    role: tuple[str, Marked] | None = None
    columns: tuple[Marked, ...] = ()
    counts: int | None = None
    spread: frozenset[int] = frozenset()
    fixed: np.ndarray | None = None
    clamped: tuple[float, float] | None = None


class Met(NamedTuple):
    """A site on the way through a loss: whether numbers were out of range there, and one that was."""

    site: Site
    bad: Array | None = None
    number: Array | None = None


Change = Callable[[Site, Array, Array], Array]


class Reader:
    """Runs a jaxpr over marked values, and notes the sites it meets.

    Args:
      change: `change(site, value, bad)`: what is to be read instead; then everything is computed.
      indices: Whether the indices are computed, and no more.  If neither, nothing is.
    """

    def __init__(self, change: Change | None = None, *, indices: bool = False) -> None:
        self.met: list[Met] = []
        self.change, self.indices = change, indices

    def run(self, jaxpr: Any, operands: Sequence[Marked]) -> list[Marked]:
        """Return the marked outputs."""
        environment = begun(jaxpr, operands)
        for equation in opened(jaxpr).eqns:
            self.step(equation, environment)
        return [read(environment, v) for v in opened(jaxpr).outvars]

    def step(self, equation: Any, environment: dict[Any, Marked]) -> None:
        """Run one equation."""
        operands = [read(environment, v) for v in equation.invars]
        inner = called(equation) or replaced(equation)
        if inner is not None and len(opened(inner).invars) == len(operands):
            results = self.run(inner, operands)
        elif equation.primitive.name == "scan":
            results = self._scan(equation, operands)
        elif equation.primitive.name == "cond":
            results = self._looked(equation, operands, self._cond(equation, operands))
        else:
            values = self._values(equation, operands)
            results = _marks(equation, operands, values)
            results = self._looked(equation, operands, results)
        environment.update(zip(equation.outvars, results, strict=True))

    def _values(self, equation: Any, operands: Sequence[Marked]) -> list[Any]:
        arithmetic = equation.primitive.name in ARITHMETIC and all(x.arithmetic for x in operands)
        wanted = self.change is not None or (self.indices and arithmetic)
        if not wanted or any(x.value is None for x in operands):
            return [None] * len(equation.outvars)
        return run_equation(equation, [x.value for x in operands])

    def _looked(self, equation: Any, operands: Sequence[Marked], results: list[Marked]) -> list[Marked]:
        """Note the sites of an equation, and let what is read there be changed."""
        for site, index, outside in _sites(equation, operands):
            if index.raw is None or (self.change is None and not self.indices):
                self.met.append(Met(site))
                continue
            bad, numbers = outside(index)
            place = jnp.argmax(bad.reshape(-1))
            self.met.append(Met(site, jnp.any(bad), numbers.reshape(-1)[place].astype(jnp.float32)))
            if self.change is not None:
                changed = [self.change(site, x.value, _at(equation, bad, x.value)) for x in results]
                results = [_with(x, value) for x, value in zip(results, changed, strict=True)]
        return results

    def _cond(self, equation: Any, operands: Sequence[Marked]) -> list[Marked]:
        """Run all branches of a `cond`, and choose what comes of the one that is taken."""
        which, rest = operands[0], [dataclasses.replace(x, role=None, columns=()) for x in operands[1:]]
        values: list[Any] = []
        for number, branch in enumerate(equation.params["branches"]):
            first = len(self.met)
            results = self.run(branch, rest)
            if which.value is None:
                continue
            taken = jnp.asarray(which.value).astype(jnp.int32) == number
            flagged = [met if met.bad is None else met._replace(bad=met.bad & taken) for met in self.met[first:]]
            self.met[first:] = flagged
            given = [x.value for x in results]
            values = (
                [jnp.where(taken, x, y) for x, y in zip(given, values or given, strict=True)] if self.change else []
            )
        parts, model = frozenset().union(*(x.parts for x in operands)), any(x.model for x in operands)
        values = values or [None] * len(equation.outvars)
        return [Marked(x, x, parts, model, arithmetic=False, direct=False) for x in values]

    def _scan(self, equation: Any, operands: Sequence[Marked]) -> list[Marked]:
        """Run a scan; its carry is marked by all that may come into it."""
        constant, carried = scan_arity(equation)
        consts, carry, stacked = operands[:constant], operands[constant:][:carried], operands[constant + carried :]
        body = equation.params["jaxpr"]
        marks, out = _settled(body, consts, carry, stacked)
        results = [_with(unknown(x), None) for x in [*marks[constant:][:carried], *out[carried:]]]
        if not any(x.value is not None for x in (*consts, *stacked)):
            self.run(body, marks)  # for its sites
            return results
        computed, sites = self.change is not None, []

        def one(carry_values: list[Any], step_values: list[Any]) -> tuple[list[Any], Any]:
            reader = Reader(self.change, indices=self.indices)
            given = [*(x.value for x in consts), *(carry_values or [None] * carried), *step_values]
            again = reader.run(body, [_with(mark, x) for mark, x in zip(marks, given, strict=True)])
            sites[:] = [met.site for met in reader.met]
            values = [x.value if computed else None for x in again]
            return values[:carried] if computed else [], (values[carried:], [met[1:] for met in reader.met])

        settings = {name: equation.params[name] for name in ("length", "reverse")}
        first = [x.value for x in carry] if computed else []
        last, (stacks, met) = lax.scan(one, first, [x.value for x in stacked], **settings)
        self.met += [_over_steps(site, *flags) for site, flags in zip(sites, met, strict=True)]
        values = [*last, *stacks] if computed else [None] * len(results)
        return [_with(mark, x) for mark, x in zip(results, values, strict=True)]


def _settled(
    body: Any, consts: Sequence[Marked], carry: Sequence[Marked], stacked: Sequence[Marked]
) -> tuple[list[Marked], list[Marked]]:
    """Mark the operands and results of a step of a scan; the carry by all that may come into it."""
    carried = [_with(unknown(x), None) for x in carry]
    rows = [dataclasses.replace(x, role=None, columns=(), counts=None, spread=frozenset(), fixed=None) for x in stacked]
    while True:
        marks = [*(_with(x, None) for x in consts), *carried, *(_with(x, None) for x in rows)]
        out = Reader().run(body, marks)
        joined = [
            dataclasses.replace(a, parts=a.parts | b.parts, model=a.model or b.model)
            for a, b in zip(carried, out, strict=False)
        ]
        if all((a.parts, a.model) == (b.parts, b.model) for a, b in zip(carried, joined, strict=True)):
            return marks, out
        carried = joined


def begun(jaxpr: Any, operands: Sequence[Marked]) -> dict[Any, Marked]:
    """Return the marked constants and inputs of a jaxpr."""
    known = [Marked(x, x, fixed=_numbers(y)) for x, y in zip(constants(jaxpr), written(jaxpr), strict=True)]
    inner = opened(jaxpr)
    return dict(zip([*inner.constvars, *inner.invars], [*known, *operands], strict=True))


def read(environment: dict[Any, Marked], variable: Any) -> Marked:
    """Return the marked value of a variable, or of a number written into an equation."""
    if not is_literal(variable):
        return environment[variable]
    value = variable.val
    if np.size(value) != 1 or not np.isrealobj(value) or not np.isfinite(value):
        return Marked(value, value)
    return Marked(value, value, low=float(value), high=float(value), fixed=_numbers(value))


def _numbers(value: Any) -> np.ndarray | None:
    """Return whole numbers or booleans that are known where the program is read; None of anything else."""
    dtype = getattr(value, "dtype", None)
    if isinstance(value, jax.core.Tracer) or (dtype is not None and getattr(dtype, "kind", "") not in tuple("iub")):
        return None
    if np.size(value) > MOST_FIXED or (isinstance(value, jax.Array) and not value.is_fully_addressable):
        return None
    numbers = np.asarray(value)
    return numbers if numbers.dtype.kind in "iub" else None


def unknown(x: Marked) -> Marked:
    """Forget all but what it is computed from."""
    return Marked(x.value, x.value, x.parts, x.model, arithmetic=False, direct=False)


def _with(mark: Marked, value: Any) -> Marked:
    return dataclasses.replace(mark, value=value, raw=value)


def _over_steps(site: Site, bad: Array | None, number: Array | None) -> Met:
    if bad is None or number is None:
        return Met(site)
    return Met(site, jnp.any(bad), number[jnp.argmax(bad)])


def _marks(equation: Any, operands: Sequence[Marked], values: Sequence[Any]) -> list[Marked]:
    """Mark the results of an equation."""
    name, parts = equation.primitive.name, frozenset().union(*(x.parts for x in operands))
    model = any(x.model for x in operands)
    wrapped, fixed = _counted_from_end(name, operands), _fixed(equation, operands)
    if wrapped is not None:
        return [dataclasses.replace(wrapped, value=values[0], role=None, fixed=fixed)]
    if name not in ARITHMETIC or not all(x.arithmetic for x in operands):
        return [Marked(x, x, parts, model, arithmetic=False, direct=False) for x in values]
    value = raw = values[0]
    if name in KEEP and value is not None and any(x.raw is not x.value for x in operands):
        raw = run_equation(equation, [x.raw for x in operands])[0]
    clamped = operands[0].clamped if name in KEEP and len(operands) == 1 else None
    if name == "clamp":
        raw, clamped = operands[1].raw, (operands[1].low, operands[1].high)
    low, high = _bounds(equation, operands)
    direct = name in (*KEEP, "clamp") and all(x.direct for x in operands)
    last = equation.outvars[0].aval.ndim - 1
    columns = tuple(operands) if name == "concatenate" and equation.params["dimension"] == last else ()
    if columns and any(v.aval.shape[-1] != 1 for v in equation.invars):
        columns = ()
    counts, spread = _axes(equation, operands)
    role = _role(name, operands)
    return [Marked(value, raw, parts, model, True, direct, low, high, role, columns, counts, spread, fixed, clamped)]


def _fixed(equation: Any, operands: Sequence[Marked]) -> np.ndarray | None:
    """Return the numbers of a result that is made of fixed ones as JAX makes an index of them; None of others."""
    name, given = equation.primitive.name, [x.fixed for x in operands if x.fixed is not None]
    if not given or len(given) < len(operands):
        return None
    shape = equation.outvars[0].aval.shape
    if name in ("lt", "add"):
        return (np.less if name == "lt" else np.add)(*given)
    if name == "select_n" and len(given) == 3:
        return np.where(given[0], given[2], given[1])
    if name in ("reshape", "squeeze", "expand_dims"):
        return given[0].reshape(shape)
    if name == "broadcast_in_dim":
        places = equation.params["broadcast_dimensions"]
        within = [given[0].shape[places.index(i)] if i in places else 1 for i in range(len(shape))]
        return np.broadcast_to(given[0].reshape(within), shape)
    kept = name == "convert_element_type" and equation.outvars[0].aval.dtype.kind in "iu"
    return given[0] if kept else None


def _role(name: str, operands: Sequence[Marked]) -> tuple[str, Marked] | None:
    if name == "lt" and operands[1].low == operands[1].high == 0:
        return "negative", operands[0]
    if name == "add" and not operands[1].parts and operands[1].low == operands[1].high:
        return "shifted", operands[0]
    return None


def _counted_from_end(name: str, operands: Sequence[Marked]) -> Marked | None:
    """Return the index i of `where(i < 0, i + n, i)`; None of anything else."""
    if name != "select_n" or len(operands) != 3:
        return None
    which, index, shifted = operands
    matching = which.role == ("negative", index) and shifted.role == ("shifted", index)
    return index if matching else None


def _bounds(equation: Any, operands: Sequence[Marked]) -> tuple[float, float]:
    """Return what a result is not below, and not above, as far as the program says."""
    name, lows, highs = equation.primitive.name, [x.low for x in operands], [x.high for x in operands]
    if name == "iota":
        return 0, equation.params["shape"][equation.params["dimension"]] - 1
    if name == "clamp":
        return lows[0], highs[2]
    if name in ("max", "min"):
        nearer = max if name == "max" else min
        return nearer(lows), nearer(highs)
    if name == "add":
        return sum(lows), sum(highs)
    if name == "sub":
        return lows[0] - highs[1], highs[0] - lows[1]
    cases = slice(1, None) if name == "select_n" else slice(None)
    if name in KEEP or name == "select_n":
        return min(lows[cases]), max(highs[cases])
    return -np.inf, np.inf


def _axes(equation: Any, operands: Sequence[Marked]) -> tuple[int | None, frozenset[int]]:
    """Return along which axis a result counts 0, 1, ..., and along which it is broadcast."""
    name = equation.primitive.name
    if name == "iota":
        return equation.params["dimension"], frozenset()
    if name == "convert_element_type":
        return operands[0].counts, operands[0].spread
    if name != "broadcast_in_dim":
        return None, frozenset()
    source, places = operands[0], equation.params["broadcast_dimensions"]
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    kept = {place: axis for axis, place in enumerate(places) if before[axis] == after[place]}
    counts = next((place for place, axis in kept.items() if axis == source.counts), None)
    spread = frozenset(i for i in range(len(after)) if i not in kept or kept[i] in source.spread)
    return counts, spread


def _sites(equation: Any, operands: Sequence[Marked]) -> list[tuple[Site, Marked, Callable]]:
    """Return the sites of an equation: each with its index, and how to tell which numbers are out of range."""
    name = equation.primitive.name
    if name in ("cond", "select_n"):
        return _chosen(equation, operands)
    operands = [x if x.clamped is None else dataclasses.replace(x, raw=x.value, clamped=None) for x in operands]
    if name == "eq":
        return _compared(equation, operands)
    if name.startswith("scatter"):
        return _written(equation, operands)
    if name not in ("gather", "dynamic_slice"):
        return []
    shape, found, fills = equation.invars[0].aval.shape, [], False
    if name == "dynamic_slice":
        for axis, index in enumerate(operands[1:]):
            limit = shape[axis] - equation.params["slice_sizes"][axis]
            found.append((axis, index, lambda x, limit=limit: _outside(x.raw, x.raw, limit, False)))
    else:
        numbers = equation.params["dimension_numbers"]
        fills = equation.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
        for column, axis in enumerate(numbers.start_index_map):
            index = operands[1].columns[column] if operands[1].columns else operands[1]
            limit = shape[axis] - equation.params["slice_sizes"][axis]
            place = 0 if operands[1].columns else column
            found.append((axis, index, lambda x, p=place, m=limit: _outside(x.raw[..., p], x.value[..., p], m, fills)))
    own = operands[0].parts and not operands[0].model  # what is read of an example at its own numbers is meant
    sites = [
        (Site("lookup", tuple(sorted(index.parts)), int(shape[axis]), index.direct), index, outside)
        for axis, index, outside in found
        if _may_leave(index, shape[axis]) and not own
    ]
    return sites or ([] if fills else _at_fixed(equation, found))


def _at_fixed(equation: Any, found: Sequence[tuple[int, Marked, Callable]]) -> list[tuple[Site, Marked, Callable]]:
    """Return the sites of an equation that reads at fixed numbers, some of which are out of range."""
    sites, shape = [], equation.invars[0].aval.shape
    for column, (axis, index, _) in enumerate(found):
        if index.fixed is None:
            continue
        numbers, limit = index.fixed, shape[axis] - equation.params["slice_sizes"][axis]
        if equation.primitive.name == "gather":
            numbers = numbers[..., 0 if numbers.shape[-1] == 1 else column]
        bad = (numbers < 0) | (numbers > limit)
        if bad.any():
            numbers = np.where(numbers < 0, numbers - shape[axis], numbers)  # as they were written
            site = Site("lookup", (), int(shape[axis]), False)
            sites.append((site, index, lambda x, bad=bad, n=numbers: (jnp.asarray(bad), jnp.asarray(n))))
    return sites


def _chosen(equation: Any, operands: Sequence[Marked]) -> list[tuple[Site, Marked, Callable]]:
    """Return the site of a choice among functions or arrays, which `lax.switch` makes after clamping the number."""
    index, cases = operands[0], len(operands) - 1
    if equation.primitive.name == "cond":
        cases = len(equation.params["branches"])
    if equation.invars[0].aval.dtype == bool or not index.parts or not index.arithmetic:
        return []
    low, high = (index.low, index.high) if index.clamped is None else index.clamped
    if (index.clamped is None and equation.primitive.name == "cond") or (low >= 0 and high < cases):
        return []
    outside = lambda x: _outside(x.raw, x.raw, cases - 1, False)
    return [(Site("switch", tuple(sorted(index.parts)), cases, index.direct), index, outside)]


def _written(equation: Any, operands: Sequence[Marked]) -> list[tuple[Site, Marked, Callable]]:
    """Return the sites of an array that is written to: negative numbers count from the end, large ones are dropped."""
    numbers, shape, found = equation.params["dimension_numbers"], equation.invars[0].aval.shape, []
    drops = equation.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    for column, axis in enumerate(numbers.scatter_dims_to_operand_dims):
        if axis not in numbers.inserted_window_dims:
            continue
        index = operands[1].columns[column] if operands[1].columns else operands[1]
        if not _may_leave(index, shape[axis]):
            continue
        place, last = 0 if operands[1].columns else column, shape[axis] - 1
        moved = lambda x, p=place, m=last: _outside(x.raw[..., p], x.value[..., p], m, drops)
        above = lambda x, p=place, m=last: (x.raw[..., p] > m, x.raw[..., p])
        site = Site("lookup", tuple(sorted(index.parts)), int(shape[axis]), index.direct)
        found += [(site._replace(kind="write"), index, moved), (site._replace(kind="scatter"), index, above)][
            : 2 if drops else 1
        ]
    return found


def _may_leave(index: Marked, size: int) -> bool:
    """Return whether it is made of numbers of the example, and may be out of range for all that is known."""
    if not index.parts or not index.arithmetic:
        return False
    return index.low < 0 or index.high >= size


def _outside(raw: Array, index: Array, limit: int, fills: bool) -> tuple[Array, Array]:
    """Return which numbers are out of range and read all the same; what fills with NaN is seen in the loss."""
    raw, index = jnp.asarray(raw), jnp.asarray(index)
    bad = (raw < 0) & (index >= 0) & (index <= limit) if fills else (raw < 0) | (raw > limit)
    return bad, raw


def _compared(equation: Any, operands: Sequence[Marked]) -> list[tuple[Site, Marked, Callable]]:
    """Return the site of a comparison with 0, 1, ..., which is how `jax.nn.one_hot` is computed."""
    for count, index, variable in (
        (operands[0], operands[1], equation.invars[1]),
        (operands[1], operands[0], equation.invars[0]),
    ):
        axis, shape = count.counts, equation.outvars[0].aval.shape
        if axis is None or not index.parts or not index.arithmetic:
            continue
        same = variable.aval.ndim == 0 or axis in index.spread or variable.aval.shape[axis] == 1
        if same and shape[axis] > 1 and index.high >= shape[axis]:
            site = Site("one_hot", tuple(sorted(index.parts)), int(shape[axis]), index.direct)
            return [(site, index, lambda x, size=shape[axis]: (jnp.asarray(x.raw) >= size, jnp.asarray(x.raw)))]
    return []


def _at(equation: Any, bad: Array, out: Array) -> Array:
    """Return which entries of the result are read at numbers that are out of range."""
    if equation.primitive.name == "gather":
        bad = jnp.expand_dims(bad, tuple(int(i) for i in equation.params["dimension_numbers"].offset_dims))
    elif equation.primitive.name != "eq" and bad.shape != jnp.shape(out):  # it may be any entry
        bad = jnp.any(bad)
    return jnp.broadcast_to(bad, jnp.shape(out))


def other(value: Array, at: Array, sign: Array) -> Array:
    """Return finite values instead of those `at` some places: each is moved by more than itself, no two alike.

    Uneven, so that what is invariant to a common shift, such as a normalisation or a softmax, sees it.
    """
    chosen = at & (sign != 0)
    if value.dtype == bool:
        return value ^ chosen
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return jnp.where(chosen, value + sign.astype(value.dtype), value)
    wave = 1.5 + jnp.sin(jnp.arange(value.size, dtype=jnp.float32) * 2.4).reshape(value.shape)
    finite = jnp.where(jnp.isfinite(value), value, 0)
    moved = finite + (sign * wave).astype(value.dtype) * (1 + jnp.abs(finite))
    return jnp.where(chosen, moved, value)


def sites_of(jaxpr: Any, operands: Sequence[Marked]) -> list[tuple[Site, int]]:
    """Return the sites of a jaxpr, each with the place of its equation among the outermost ones."""
    reader, environment, found = Reader(), begun(jaxpr, operands), []
    for place, equation in enumerate(opened(jaxpr).eqns):
        reader.step(equation, environment)
        found += [(met.site, place) for met in reader.met[len(found) :]]
    return found


def is_read_in_vain(jaxpr: Any, operands: Sequence[Marked], site: Site) -> tuple[Array, Array]:
    """Return whether the first output stays the same, whatever is read at a site out of range; and that output.

    What comes before the site is computed once.  What follows is one program for all that may be read, for two
    programs may round differently.
    """
    places = [place for found, place in sites_of(jaxpr, [_with(x, None) for x in operands]) if found == site]
    environment, equations, outvars = begun(jaxpr, operands), opened(jaxpr).eqns, opened(jaxpr).outvars
    before = Reader(lambda _, value, at: value)
    for equation in equations[: min(places)]:
        before.step(equation, environment)

    def outcome(sign: Array) -> Array:
        changed = dict(environment)
        reader = Reader(lambda at_site, value, at: other(value, at, sign) if at_site == site else value)
        for equation in equations[min(places) :]:
            reader.step(equation, changed)
        return jnp.asarray(read(changed, outvars[0]).value)

    values = lax.map(outcome, jnp.array([0.0, 1.0, -1.0], jnp.float32))
    return jnp.all((values == values[0]) | jnp.isnan(values[0])), values[0]
