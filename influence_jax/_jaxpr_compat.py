"""Reading and running jaxprs in a way that holds across the jax versions supported.

jax gives no promise about these structures: every place that depends on one is in this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

CALLS = ("jit", "pjit", "closed_call", "core_call")
CHECKPOINTS = ("remat2", "remat", "checkpoint")


def uses(jaxpr: Any, primitive: str) -> bool:
    """Whether a primitive whose name starts like that occurs, at any depth."""
    equations = opened(jaxpr).eqns
    if any(equation.primitive.name.startswith(primitive) for equation in equations):
        return True
    inner = (jaxpr for equation in equations for value in equation.params.values() for jaxpr in _jaxprs(value))
    return any(uses(jaxpr, primitive) for jaxpr in inner)


def largest(jaxpr: Any) -> int:
    """Return how many entries the largest value has that is computed, at any depth."""
    equations = opened(jaxpr).eqns
    sizes = [getattr(v.aval, "size", 1) for equation in equations for v in equation.outvars]
    inner = (jaxpr for equation in equations for value in equation.params.values() for jaxpr in _jaxprs(value))
    return max([1, *sizes, *map(largest, inner)])


def opened(jaxpr: Any) -> Any:
    """The jaxpr itself: up to jax 0.11 a closed one is a pair, since 0.12 there is one class."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def constants(jaxpr: Any) -> Sequence[Any]:
    """The values of its constants, as JAX arrays.

    Some versions of jax keep NumPy's, which a traced number cannot index where an equation is run again.
    """
    values = getattr(jaxpr, "consts", ())
    return tuple(jnp.asarray(value) if isinstance(value, np.ndarray) else value for value in values)


def written(jaxpr: Any) -> Sequence[Any]:
    """The values of its constants as they are held, known where the jaxpr is itself read under tracing."""
    return tuple(getattr(jaxpr, "consts", ()))


def called(equation: Any) -> Any | None:
    """The jaxpr that an equation calls once with its own operands, keeping its derivative rules; else None."""
    if equation.primitive.name not in CALLS + CHECKPOINTS:
        return None
    return next((value for value in equation.params.values() if hasattr(opened(value), "eqns")), None)


def replaced(equation: Any) -> Any | None:
    """The jaxpr of a function with a derivative of its own, once it is no longer differentiated; else None."""
    if not equation.primitive.name.startswith(("custom_jvp_call", "custom_vjp_call")):
        return None
    return next((value for value in equation.params.values() if hasattr(opened(value), "eqns")), None)


def scan_arity(equation: Any) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried."""
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    places = params["ft_in"].update(list(range(len(equation.invars))))
    constants, carry, _ = places.unpack()
    return len(list(constants)), len(list(carry))


def run_equation(equation: Any, values: Sequence[Any]) -> list[Any]:
    """The outputs of an equation on new operands."""
    bound = equation.primitive.get_bind_params(equation.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # up to jax 0.9 a pair
    out = equation.primitive.bind(*functions, *values, **params)
    return list(out) if equation.primitive.multiple_results else [out]


def is_literal(variable: Any) -> bool:
    """Whether an operand is a number written into the equation."""
    return isinstance(variable, Literal)


def _jaxprs(value: Any) -> Iterator[Any]:
    for item in value if isinstance(value, tuple | list) else (value,):
        if hasattr(opened(item), "eqns"):
            yield item
