"""Reading jaxprs in a way that holds across the jax versions supported."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


def matmul_flops(jaxpr: Any) -> int:
    """Floating-point operations in the matrix products and convolutions of a jaxpr, loops and calls included."""
    total = 0
    for equation in _open(jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, features = equation.invars[1].aval, params["dimension_numbers"].rhs_spec[0]
            total += 2 * equation.outvars[0].aval.size * kernel.size // kernel.shape[features]
        repeats = params.get("length", 1) if name == "scan" else 1
        total += repeats * sum(matmul_flops(inner) for value in params.values() for inner in _jaxprs(value))
    return total


def uses(jaxpr: Any, primitive: str) -> bool:
    """Whether a primitive whose name starts like that occurs, at any depth."""
    equations = _open(jaxpr).eqns
    if any(equation.primitive.name.startswith(primitive) for equation in equations):
        return True
    inner = (jaxpr for equation in equations for value in equation.params.values() for jaxpr in _jaxprs(value))
    return any(uses(jaxpr, primitive) for jaxpr in inner)


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _jaxprs(value: Any) -> Iterator[Any]:
    for item in value if isinstance(value, tuple | list) else (value,):
        if hasattr(_open(item), "eqns"):
            yield item
