"""What is odd in how a model predicts: probabilities where logits are meant, entries that are dropped at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._jaxpr_compat import called, is_literal, opened, replaced

# Through these the result of a function is still that.
THROUGH = ("convert_element_type", "reshape", "squeeze", "broadcast_in_dim", "copy", "transpose")
DRAWS = ("random_bits", "threefry2x32", "rng_bit_generator")


def ends_in(jaxpr: Any, place: int) -> str:
    """Return `"softmax"` or `"sigmoid"` if that is the last of what an output of a jaxpr is made by, else `""`."""
    jaxpr = opened(jaxpr)
    made = {variable: equation for equation in jaxpr.eqns for variable in equation.outvars}
    variable = jaxpr.outvars[place]
    while not is_literal(variable) and variable in made:
        equation = made[variable]
        inner = called(equation) or replaced(equation)
        if inner is not None:
            return ends_in(inner, equation.outvars.index(variable))
        if equation.primitive.name not in THROUGH:
            return _made_by(equation, made)
        variable = equation.invars[0]
    return ""


def _made_by(equation: Any, made: dict[Any, Any]) -> str:
    if equation.primitive.name == "logistic":
        return "sigmoid"
    if equation.primitive.name != "div":
        return ""
    above, below = (_origin(variable, made) for variable in equation.invars)
    return "softmax" if (above, below) == ("exp", "reduce_sum") else ""


def _origin(variable: Any, made: dict[Any, Any]) -> str:
    """Return the primitive that a value comes from."""
    while not is_literal(variable) and variable in made and made[variable].primitive.name in THROUGH:
        variable = made[variable].invars[0]
    return "" if is_literal(variable) or variable not in made else made[variable].primitive.name


def drops(jaxpr: Any) -> bool:
    """Return whether entries that depend on the arguments are chosen by numbers drawn from a key that does not."""
    jaxpr = opened(jaxpr)
    return _search(jaxpr, ["given"] * len(jaxpr.invars))[1]


def _search(jaxpr: Any, kinds: Sequence[str]) -> tuple[list[str], bool]:
    """Return the kinds of a jaxpr's outputs, `"fixed"`, `"drawn"` or `"given"`, and whether something is dropped."""
    jaxpr = opened(jaxpr)
    known = dict(zip(jaxpr.invars, kinds, strict=True))
    kind = lambda v: "fixed" if is_literal(v) else known.get(v, "fixed")
    for equation in jaxpr.eqns:
        operands = [kind(v) for v in equation.invars]
        inner = called(equation) or replaced(equation)
        if inner is not None and len(opened(inner).invars) == len(operands):
            results, found = _search(inner, operands)
        else:
            name = equation.primitive.name
            drawn = "given" not in operands and (name in DRAWS or "drawn" in operands)
            results = ["given" if "given" in operands else "drawn" if drawn else "fixed"] * len(equation.outvars)
            found = name == "select_n" and operands[0] == "drawn" and "given" in operands[1:]
        if found:
            return [], True
        known.update(zip(equation.outvars, results, strict=True))
    return [kind(v) for v in jaxpr.outvars], False
