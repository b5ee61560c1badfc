"""Loops around products: inside the compiled program, or on the host where an operator reads its data from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax

from .._typing import Array, PyTree
from .operator import LinearOperator

Carry = TypeVar("Carry")


def while_loop(op: LinearOperator) -> Callable[..., Any]:
    """`lax.while_loop`, or the same on the host for an operator that cannot be traced."""
    return _while_on_host if op.on_host else lax.while_loop


def fori_loop(op: LinearOperator) -> Callable[..., Any]:
    """`lax.fori_loop`, or the same on the host for an operator that cannot be traced."""
    return _fori_on_host if op.on_host else lax.fori_loop


def refuse_tracing(op: LinearOperator, V: PyTree) -> None:
    """Raise if an operator that reads data from outside is asked for a product inside a compiled program."""
    if op.on_host and any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(V)):
        raise TypeError(
            f"inverse: {op!r} reads its data from a loader, which cannot be part of a compiled program; use it outside "
            "of jit, vmap and grad"
        )


def _while_on_host(condition: Callable[[Carry], Array], body: Callable[[Carry], Carry], carry: Carry) -> Carry:
    while bool(condition(carry)):
        carry = body(carry)
    return carry


def _fori_on_host(lower: int, upper: int, body: Callable[[int, Carry], Carry], carry: Carry) -> Carry:
    for index in range(lower, upper):
        carry = body(index, carry)
    return carry
