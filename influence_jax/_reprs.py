"""Short representations: one line that says what a thing is, and at most the range of what its arrays hold.

Nothing is computed on a device: numbers are read where they are few, and shapes stand for all others, for traced and
for abstract values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

# Larger arrays are not fetched to look at them.
FEW = 2**20


def call(thing: Any, *parts: str, **named: Any) -> str:
    """The constructor's name with what is to be said; empty parts are left out.

    Example:
      >>> call(1, "2 blocks", "", damping=np.float32(0.1))
      'int(2 blocks, damping=0.1)'
    """
    shown = [part for part in parts if part] + [f"{name}={value(x)}" for name, x in named.items()]
    return f"{type(thing).__name__}({', '.join(shown)})"


def settings(thing: Any) -> str:
    """A dataclass by its first field, and by those that differ from their defaults."""
    fields = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
    shown = [f for f in fields if f is fields[0] or not _is(getattr(thing, f.name), f.default)]
    return call(thing, **{field.name: getattr(thing, field.name) for field in shown})


def _is(x: Any, default: Any) -> bool:
    """Whether a setting is known to be its default."""
    if not isinstance(default, int | float):
        return x is default
    read = numbers(x)
    return read is not None and read.size == 1 and bool(read == default)


def value(x: Any) -> str:
    """A scalar by its value, arrays, traced and abstract values by dtype and shape, anything else by its repr.

    Example:
      >>> value(0.5), value(np.float32(0.1)), value(jax.ShapeDtypeStruct((2, 3), np.float32)), value(None)
      ('0.5', '0.1', 'float32[2, 3]', 'None')
    """
    if not hasattr(x, "shape"):
        return repr(x)
    read = numbers(x) if x.shape == () else None
    return array(x) if read is None else str(read)


def array(x: Any) -> str:
    """Dtype and shape of an array, or of what stands for one."""
    if isinstance(getattr(x, "shape", None), tuple) and hasattr(x, "dtype"):
        return f"{x.dtype}{list(x.shape)}"
    return f"{jax.numpy.result_type(x)}[]" if isinstance(x, int | float | complex) else type(x).__name__


def numbers(x: Any) -> np.ndarray | None:
    """What an array holds, on the host; None where it is traced, abstract, on other hosts, deleted or large."""
    if not isinstance(x, jax.Array | np.ndarray | np.generic | int | float) or isinstance(x, jax.core.Tracer):
        return None
    if getattr(x, "size", 1) > FEW or jax.dtypes.issubdtype(
        getattr(x, "dtype", None) or np.float64, jax.dtypes.prng_key
    ):
        return None
    if isinstance(x, jax.Array) and (x.is_deleted() or not x.is_fully_addressable):
        return None
    return np.asarray(x)


def span(x: Any, figures: int = 2) -> str:
    """Return the least and the greatest entry, and how many are NaN; dtype and shape where they cannot be read.

    Example:
      >>> span(np.array([3.0, -1.25, np.nan])), span(np.array([2, 2])), span(np.float32("nan"))
      ('-1.2 to 3 and 1 NaN', '2', 'NaN')
    """
    read = numbers(x)
    if read is None or np.iscomplexobj(read):
        return array(x)
    read = read.astype(np.float64).ravel()
    known = read[~np.isnan(read)]
    if known.size == 0:
        return "NaN" if read.size else ""
    ends = [f"{end:.{figures}g}" for end in (known.min(), known.max())]
    missing = f" and {read.size - known.size:,} NaN" if known.size < read.size else ""
    return " to ".join(dict.fromkeys(ends)) + missing


def counted(number: int, noun: str) -> str:
    """A number and what it counts.

    Example:
      >>> counted(1, "block"), counted(17226, "query")
      ('1 block', '17,226 queries')
    """
    several = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else several}"


def parameters(space: Any, *, stacked: bool = False) -> str:
    """How many there are, and their dtypes where they are not what jax makes by default; of one row of a stack.

    Example:
      >>> parameters({"w": jax.ShapeDtypeStruct((2, 3), jax.numpy.bfloat16)})
      '6 bfloat16 parameters'
    """
    dtypes = sorted({str(leaf.dtype) for leaf in jax.tree.leaves(space) if hasattr(leaf, "dtype")})
    usual = str(jax.dtypes.canonicalize_dtype(np.float64))
    return entries(space, "parameter" if dtypes in ([usual], []) else f"{' and '.join(dtypes)} parameter", int(stacked))


def entries(values: Any, noun: str = "entry", axis: int = 0) -> str:
    """How many numbers there are in all leaves, from an axis on."""
    return counted(sum(math.prod(getattr(leaf, "shape", ())[axis:]) for leaf in jax.tree.leaves(values)), noun)


def rows(data: Any, noun: str = "example") -> str:
    """How many rows there are in a batch or a stack."""
    lengths = [leaf.shape[0] for leaf in jax.tree.leaves(data) if getattr(leaf, "shape", ())]
    return counted(lengths[0], noun) if lengths else ""


def first(stack: Any) -> int | str:
    """Length of the leading axis, where there is one."""
    return stack.shape[0] if getattr(stack, "shape", ()) else array(stack)


def some(names: Sequence[str], most: int = 4) -> str:
    """Names, or the first of them and how many more there are.

    Example:
      >>> some("abcdefg")
      'a, b, c, d and 3 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def shape(lengths: Iterable[int]) -> str:
    """Lengths of axes, `2 x 3`."""
    return " x ".join(map(str, lengths))
