"""What a computation is made of, as a fingerprint: arrays by their entries, functions by their code."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import types
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from ..store.files import fingerprint
from .loaders import Blocks
from .processes import to_host


def identity(thing: Any) -> str:
    """A fingerprint that is the same in the next run of the same program, and another where anything differs.

    Arrays count by shape, dtype and entries, functions by their code, defaults and what they close over, loaders by
    their first batch, other objects by their representation.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(thing, set()):
        digest.update(part.encode() + b"\n")
    return digest.hexdigest()


def named(thing: Any) -> str:
    """A description, without addresses in memory, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(thing))


def _parts(thing: Any, seen: set[int]) -> list[str]:
    if isinstance(thing, jax.Array) and not jax.dtypes.issubdtype(thing.dtype, jax.dtypes.prng_key):
        return [fingerprint(to_host(thing))]
    if isinstance(thing, jax.Array | np.ndarray | np.generic):
        return [fingerprint(thing)]
    if id(thing) in seen:
        return ["seen"]
    for kind, content in CONTENTS.items():
        if isinstance(thing, kind):
            return [type(thing).__name__, *_of_all(content(thing), {*seen, id(thing)})]
    if dataclasses.is_dataclass(thing) and type(thing).__module__.split(".")[0] == __name__.split(".")[0]:
        fields = [getattr(thing, field.name) for field in dataclasses.fields(thing)]
        return [type(thing).__name__, *_of_all(fields, {*seen, id(thing)})]
    return [named(thing)]


# What things are made of.
CONTENTS: dict[type, Callable[[Any], Iterable[Any]]] = {
    types.CodeType: lambda code: (code.co_code, code.co_names, code.co_consts),
    types.FunctionType: lambda fn: (
        fn.__code__,
        fn.__defaults__,
        fn.__kwdefaults__,
        *(cell.cell_contents for cell in fn.__closure__ or ()),
    ),
    types.MethodType: lambda method: (named(method.__self__), method.__func__),
    functools.partial: lambda made: (made.func, made.args, made.keywords),
    Blocks: lambda blocks: (blocks.first(),),
    dict: lambda mapping: mapping.items(),
    frozenset: lambda items: sorted(map(named, items)),
    list: lambda items: items,
    tuple: lambda items: items,
}


def _of_all(things: Any, seen: set[int]) -> list[str]:
    return [part for thing in things for part in _parts(thing, seen)]
