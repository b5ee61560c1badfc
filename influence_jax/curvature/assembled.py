r"""The Gauss-Newton matrix of layers that are used once per example, from captured inputs and cotangents.

Between layers l and m it is $G_{lm} = \sum_n w_n\, (a_n a_n'^\top) \otimes (D_n^\top H_n D_n')$, with inputs a, output
Jacobians D `(C, O)` and the loss Hessian H in the output: products of matrices whose inner length is N, where gradients
would make it N C.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from .. import tree
from .._mesh import compiled
from .._typing import Array, PyTree
from ..batching import CHUNK_BUDGET
from ..capture import Layer, LayerFactors, Plan, arrange, einsum, layer_factors
from ..objective import floating_output
from .capabilities import check_losses, symmetric, to_dense
from .exact import GGN, divide, sum_over_data
from .outputs import cost_hessian
from .per_example import dense_by_rows


@to_dense.register
def _(op: GGN) -> Array:
    check_losses(op)
    dense = _assembled(op)
    return dense_by_rows(op) if dense is None else dense


@compiled
def _assembled(op: GGN) -> Array | None:
    """The matrix, or None if a layer is used at several positions."""
    params = tree.promote(op.params)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), op.data)
    plan, layers = arrange(partial(floating_output, op.split), params, example)
    if not all(_used_once(plan, layer) for layer in layers):
        return None
    outputs = tree.size(plan.output)

    def chunk_sum(batch: PyTree, weights: Array) -> list[list[Array]]:
        identity = lambda out, _: tree.unflatten(jnp.eye(outputs), out)
        factors = layer_factors(plan, layers, params, batch, identity, op.split.cost)
        hessians = jax.vmap(lambda z: cost_hessian(op.split, floating_output(op.split, params, z), z))(batch)
        return [[_block(f, g, hessians, weights) for g in factors[: k + 1]] for k, f in enumerate(factors)]

    widths = [layer.rows**2 + layer.columns**2 + outputs * layer.columns for layer in layers]
    chunk = max(1, min(op.count, op.chunk or CHUNK_BUDGET // max(widths)))
    lower = divide(*sum_over_data(op, chunk_sum, chunk))
    both = lambda k, m: symmetric(lower[k][k]) if k == m else lower[k][m] if m < k else lower[m][k].T
    whole = jnp.block([[both(k, m) for m in range(len(layers))] for k in range(len(layers))])
    return _in_leaf_order(op, layers, _in_leaf_order(op, layers, whole).T)


def _used_once(plan: Plan, layer: Layer) -> bool:
    if layer.of_entries:
        return layer.groups == 1
    uses = [plan.uses[index] for index, _ in layer.uses]
    simple = len(uses) == 1 and uses[0].rule.kind == "dot" and uses[0].positions == 1
    return simple and layer.groups == 1 and not layer.live


def _block(left: LayerFactors, right: LayerFactors, hessians: Array, weights: Array) -> Array:
    """`sum_n w_n (a a'^T) x (D^T H D')`, `(I O, I' O')`."""
    (f,), (g,) = left.uses, right.uses
    inputs = f.inputs[:, 0, 0, :, None] * g.inputs[:, 0, 0, None, :]
    outputs = einsum("bco,bcp->bop", f.outputs[:, :, 0, 0], einsum("bcd,bdp->bcp", hessians, g.outputs[:, :, 0, 0]))
    scaled = weights.astype(outputs.dtype)[:, None, None] * outputs
    shape = (*inputs.shape[1:], *outputs.shape[1:])
    flat = einsum("bx,by->xy", inputs.reshape(len(inputs), -1), scaled.reshape(len(scaled), -1))
    return flat.reshape(shape).transpose(0, 2, 1, 3).reshape(shape[0] * shape[2], -1)


def _in_leaf_order(op: GGN, layers: tuple[Layer, ...], rows: Array) -> Array:
    """Rows whose entries are in the order of the layers, in that of the leaves."""
    space, leaves, start = dict(tree.named_leaves(op.params)), {}, 0
    for layer in layers:
        size = layer.rows * layer.columns
        part = rows[:, start : start + size].reshape(-1, 1, layer.rows, layer.columns)
        for name, leaf in layer.leaves(part, space).items():
            leaves[name] = leaves[name] + leaf if name in leaves else leaf
        start += size
    return tree.flatten(jax.tree.structure(op.params).unflatten([leaves[name] for name in space]), op.params)
