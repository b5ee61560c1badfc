"""Loops around products: inside the compiled program, or on the host where an operator reads its data from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from jax import lax

from .._typing import Array
from .operator import LinearOperator

Carry = TypeVar("Carry")


def while_loop(op: LinearOperator) -> Callable[..., Any]:
    """`lax.while_loop`, or the same on the host for an operator that cannot be traced."""
    return _while_on_host if op.on_host else lax.while_loop


def fori_loop(op: LinearOperator) -> Callable[..., Any]:
    """`lax.fori_loop`, or the same on the host for an operator that cannot be traced."""
    return _fori_on_host if op.on_host else lax.fori_loop


def _while_on_host(condition: Callable[[Carry], Array], body: Callable[[Carry], Carry], carry: Carry) -> Carry:
    while bool(condition(carry)):
        carry = body(carry)
    return carry


def _fori_on_host(lower: int, upper: int, body: Callable[[int, Carry], Carry], carry: Carry) -> Carry:
    for index in range(lower, upper):
        carry = body(index, carry)
    return carry
