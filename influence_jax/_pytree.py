"""Frozen dataclasses that are JAX pytrees.

Unflattening never runs `__init__`: JAX rebuilds containers with tracers, sentinels and stacked leaves, and a check
meant for what a person passes must not see those.  So `__post_init__` may check and convert its arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar, dataclass_transform

import jax
from jax.tree_util import GetAttrKey

_T = TypeVar("_T")


def static(**options: Any) -> Any:
    """A field that is part of the tree structure: hashable, compared by value, never traced."""
    return dataclasses.field(metadata={"static": True}, **options)


def set_field(instance: Any, name: str, value: Any) -> None:
    """Assign a field of a frozen instance, for use in `__post_init__` only."""
    object.__setattr__(instance, name, value)


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field, static))
def dataclass(cls: type[_T]) -> type[_T]:
    """Make `cls` a frozen dataclass and a pytree: fields are children, `static()` fields are structure."""
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)  # type: ignore[assignment]
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    dynamic = tuple(f.name for f in fields if not f.metadata.get("static"))
    structure = tuple(f.name for f in fields if f.metadata.get("static"))

    def flatten_with_keys(instance: _T) -> tuple[tuple, tuple]:
        children = tuple((GetAttrKey(name), getattr(instance, name)) for name in dynamic)
        return children, tuple(getattr(instance, name) for name in structure)

    def flatten(instance: _T) -> tuple[tuple, tuple]:
        return tuple(getattr(instance, name) for name in dynamic), tuple(getattr(instance, name) for name in structure)

    def unflatten(aux: tuple, children: Iterable[Any]) -> _T:
        instance = object.__new__(cls)
        for name, value in zip(structure + dynamic, tuple(aux) + tuple(children), strict=True):
            object.__setattr__(instance, name, value)
        return instance

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
