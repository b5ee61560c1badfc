"""Running a function as `analyse` read it: inputs of the uses come out, cotangents of their outputs are pulled back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import tree
from .._jaxpr_compat import CHECKPOINTS, called, constants, is_literal, run_equation, scan_arity
from .._typing import Array, PyTree
from .analysis import Node, Plan, Use
from .rules import canonical_input

Values = list[Any]


class Captured(NamedTuple):
    """One example's run.

    Attributes:
      output: The function's output.
      inputs: Of each use `(G, T, I)`; row numbers `(G, T)` where rows are looked up.
      pull: Cotangent of the output to those of the uses' outputs `(G, T, O)` each, and the gradients of live leaves.
    """

    output: PyTree
    inputs: list[Array]
    pull: Callable[[PyTree], tuple[list[Array], dict[int, Array]]]


def capture(plan: Plan, params: PyTree, example: PyTree, noise: Array | None = None) -> Captured:
    """Run the function on one example, so that the gradient of a used leaf is `sum_t input_t cotangent_t^T`.

    With `noise`, a number, others that it starts are added to the outputs of the uses.
    """
    leaves, parts = jax.tree.leaves(params), [jnp.asarray(x) for x in jax.tree.leaves(example)]
    unused = [None] * len(parts)

    def run(probes: dict[int, Array], live: dict[int, Array]) -> tuple[PyTree, dict[int, Array]]:
        moving = [live.get(index) for index in range(len(leaves))]
        out, again, inputs = _run(plan.node, plan.constants, [*leaves, *parts], [*moving, *unused], probes)
        return jax.tree.structure(plan.output).unflatten(_moved(out, again)), inputs

    probes = {index: _probe(use, noise) for index, use in enumerate(plan.uses)}
    output, pullback, inputs = jax.vjp(run, probes, {index: leaves[index] for index in plan.live}, has_aux=True)

    def pull(cotangent: PyTree) -> tuple[list[Array], dict[int, Array]]:
        outputs, live = pullback(tree.cast_like(cotangent, output))
        arranged = [
            _folded(use, use.rule.output.apply(d, len(use.loops)))
            for use, d in zip(plan.uses, outputs.values(), strict=True)
        ]
        return [tree.promote(d) for d in arranged], tree.promote(live)

    return Captured(output, [_input(use, inputs[index]) for index, use in enumerate(plan.uses)], pull)


def _probe(use: Use, noise: Array | None) -> Array:
    """Return what is added to the output of a use: nothing, or numbers between -1 and 1 that look like noise."""
    shape, dtype = use.loops + use.output.shape, use.output.dtype
    if noise is None:
        return jnp.zeros(shape, dtype)
    return jnp.cos(noise * jnp.arange(1, 1 + math.prod(shape), dtype=noise.dtype)).astype(dtype).reshape(shape)


def _input(use: Use, x: Array) -> Array:
    """The input of a use `(G, T, I)`, which may be of integers that a product takes as they are."""
    x = _folded(use, canonical_input(use.rule, x, len(use.loops)))
    return x if use.rule.kind == "gather" else tree.promote(x.astype(use.output.dtype))


def _folded(use: Use, x: Array) -> Array:
    """`(*loops, G, T, ...)` to `(G, T, ...)`: scans that step through the leaf are groups, the others positions."""
    loops = len(use.loops)
    layers = list(use.scanned)
    positions = [depth for depth in range(loops) if depth not in layers]
    x = x.transpose((*layers, loops, *positions, *range(loops + 1, x.ndim)))
    groups = len(layers) + 1
    x = x.reshape((-1, *x.shape[groups:]))
    return x.reshape((x.shape[0], -1, *x.shape[len(positions) + 2 :]))


def _run(
    node: Node, consts: Sequence[Any], fixed: Values, live: Values, probes: dict[int, Array]
) -> tuple[Values, Values, dict[int, Array]]:
    """Run one jaxpr; `live` holds second values for what is differentiated, None where there is none.

    Returns the outputs, their live values, and the inputs of the uses.
    """
    jaxpr = node.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *fixed], strict=True))
    moving = {v: x for v, x in zip(jaxpr.invars, live, strict=True) if x is not None}
    read = lambda v: v.val if is_literal(v) else values[v]
    second = lambda v: None if is_literal(v) else moving.get(v)
    inputs: dict[int, Array] = {}
    for place, equation in enumerate(jaxpr.eqns):
        plain, also = [read(v) for v in equation.invars], [second(v) for v in equation.invars]
        again: Values = [None] * len(equation.outvars)
        if place in node.views:
            out = run_equation(equation, plain[:1])
            again = again if also[0] is None else run_equation(equation, also[:1])
        elif place in node.inner:
            within = {use: probes[use] for use in node.inner[place].all_uses()}
            step = _run_scan if equation.primitive.name == "scan" else _run_call
            out, again, captured = step(equation, node.inner[place], plain, also, within)
            inputs |= captured
        elif place in node.uses:
            use, operand = node.uses[place]
            inputs[use] = plain[1 - operand]
            out = [run_equation(equation, plain)[0] + probes[use]]
        else:
            if place in node.biases:  # its gradient comes with the output that it is added to
                also[node.biases[place]] = None
            out = run_equation(equation, _moved(plain, also))
        values.update(zip(equation.outvars, out, strict=True))
        moving.update((v, x) for v, x in zip(equation.outvars, again, strict=True) if x is not None)
    return [read(v) for v in jaxpr.outvars], [second(v) for v in jaxpr.outvars], inputs


def _moved(fixed: Values, live: Values) -> Values:
    return [x if y is None else y for x, y in zip(fixed, live, strict=True)]


def _run_call(
    equation: Any, node: Node, fixed: Values, live: Values, probes: dict[int, Array]
) -> tuple[Values, Values, dict[int, Array]]:
    inner = called(equation)
    run = lambda fixed, live, probes: _run(node, constants(inner), fixed, live, probes)
    if equation.primitive.name in CHECKPOINTS:
        run = jax.checkpoint(run, policy=equation.params["policy"], prevent_cse=equation.params["prevent_cse"])
    return run(fixed, live, probes)


def _run_scan(
    equation: Any, node: Node, fixed: Values, live: Values, probes: dict[int, Array]
) -> tuple[Values, Values, dict[int, Array]]:
    constant, carried = scan_arity(equation)
    first, rest = constant, constant + carried

    def body(carry: Values, step: tuple[Values, Values, dict[int, Array]]) -> tuple[Values, tuple[Values, dict]]:
        step_fixed, step_live, step_probes = step
        fixed_in = [*fixed[:first], *carry, *step_fixed]
        live_in = [*live[:first], *[None] * carried, *step_live]
        out, again, inputs = _run(node, constants(equation.params["jaxpr"]), fixed_in, live_in, step_probes)
        out = _moved(out, again)
        return out[:carried], (out[carried:], inputs)

    carry, (stacked, inputs) = lax.scan(
        body,
        _moved(fixed[first:rest], live[first:rest]),
        (fixed[rest:], live[rest:], probes),
        length=equation.params["length"],
        reverse=equation.params["reverse"],
        unroll=equation.params["unroll"],
    )
    out = [*carry, *stacked]
    return out, [None] * len(out), inputs
