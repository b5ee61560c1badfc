r"""Kronecker-factored curvature as an operator: rotations of both sides of every layer's matrix, and eigenvalues."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import _reprs, blocks, tree
from .._mesh import compiled
from .._pytree import dataclass, static
from .._typing import Array, Key, PyTree
from ..capture import Layer, components, rotate
from .blocked import diagonal_blocks
from .capabilities import (
    Restricted,
    Spectral,
    diagonal,
    minibatch,
    restrict,
    spectral,
    to_dense,
    trace,
    wide_dtype,
)
from .operator import LinearOperator


@dataclass
class KroneckerLayer:
    r"""One layer's curvature, $v \mapsto Q_{in} (\Lambda \odot (Q_{in}^\top v\, Q_{out})) Q_{out}^\top$ on matrices.

    Attributes:
      layer: Which parameters, and how they are arranged as matrices `(G, I, O)`; static.
      q_in: Eigenvectors of the inputs' second moment `(G, I, I)`; None for the identity.
      q_out: Eigenvectors of the output cotangents' second moment `(G, O, O)`; None for the identity.
      values: Eigenvalues $\Lambda$, `(G, I, O)`.
    """

    layer: Layer = static()
    q_in: Array | None
    q_out: Array | None
    values: Array

    def to_basis(self, leaves: dict[str, Array]) -> Array:
        """Coordinates `(K, G, I, O)` of leaves `(K, *leaf)`."""
        return rotate(self.layer.matrix(leaves), self.q_in, self.q_out)

    def from_basis(self, coordinates: Array, space: dict[str, Array]) -> dict[str, Array]:
        """Leaves `(K, *leaf)` from coordinates."""
        back = [None if q is None else q.swapaxes(-1, -2) for q in (self.q_in, self.q_out)]
        return self.layer.leaves(rotate(coordinates, *back), space)

    def __repr__(self) -> str:
        return _reprs.call(
            self, self.layer.kernel, _reprs.shape((self.layer.groups, self.layer.rows, self.layer.columns))
        )


@dataclass
class Kronecker(LinearOperator):
    r"""Block-diagonal curvature with a Kronecker-factored eigenbasis in every block; made by `kfac` and `ekfac`.

    Its eigendecomposition is known, so `Direct` and `Eigh` solve in closed form, at any damping, and a
    `RelativeDamping` is relative to the mean eigenvalue of each block, or of all for a block that has no curvature but
    rounding.

    $v \mapsto Q_{in} (\Lambda \odot (Q_{in}^\top v\, Q_{out})) Q_{out}^\top$ for each layer's matrix, `(I, O)`.

    Attributes:
      params: Defines the space.
      layers: The layers, which hold every parameter once.
      psd: Whether no eigenvalue is known to be negative; static.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: 0.5 * jnp.sum((z @ params["w"]) ** 2)
      >>> ij.ekfac(f, {"w": jnp.ones((3, 2))}, jnp.ones((5, 3)), labels="empirical")
      Kronecker(6 parameters in 1 block)

    Reference: Martens & Grosse 2015, arXiv:1503.05671; George et al. 2018, arXiv:1806.03884.
    """

    params: PyTree
    layers: tuple[KroneckerLayer, ...]
    psd: bool = static(default=True)  # type: ignore[assignment]

    def mv(self, v: PyTree) -> PyTree:
        tree.check_vector(v, self.space, "v")
        return tree.only(self.mm(tree.stack_of_one(v)))

    def mm(self, V: PyTree) -> PyTree:
        tree.check_stack(V, self.space, "V")
        return _product(self, V)

    @property
    def space(self) -> PyTree:
        return self.params

    @property
    def is_curvature(self) -> bool:
        return True

    @property
    def fitted_at(self) -> tuple[PyTree, ...]:
        return (self.space,)

    @property
    def blocks(self) -> OrderedDict[str, blocks.Block]:
        """Names of the diagonal blocks, and of the leaves in each."""
        return components([layer.layer for layer in self.layers])

    def __repr__(self) -> str:
        return _reprs.call(self, f"{_reprs.parameters(self.space)} in {_reprs.counted(len(self.blocks), 'block')}")


@compiled
def _product(op: Kronecker, V: PyTree) -> PyTree:
    pairs = zip(_to_basis(op, V), op.layers, strict=True)
    scaled = [x * layer.values.astype(x.dtype)[None] for x, layer in pairs]
    return tree.cast_like(_from_basis(op, scaled), V)


def _to_basis(op: Kronecker, V: PyTree) -> tuple[Array, ...]:
    leaves = dict(tree.named_leaves(tree.promote(V)))
    return tuple(layer.to_basis(leaves) for layer in op.layers)


def _from_basis(op: Kronecker, coordinates: Sequence[Array]) -> PyTree:
    space, whole = dict(tree.named_leaves(op.space)), {}
    for layer, x in zip(op.layers, coordinates, strict=True):
        for name, leaf in layer.from_basis(x, space).items():
            whole[name] = whole[name] + leaf if name in whole else leaf
    return jax.tree.structure(op.space).unflatten([whole[name] for name in space])


@minibatch.register
def _(op: Kronecker, indices: Array) -> LinearOperator:
    return op


@spectral.register
def _(op: Kronecker) -> Spectral:
    values = tuple(layer.values for layer in op.layers)
    return Spectral(lambda V: _to_basis(op, V), lambda coordinates: _from_basis(op, coordinates), values)


@diagonal_blocks.register
def _(op: Kronecker) -> OrderedDict[str, blocks.Block]:
    return op.blocks


@restrict.register
def _(op: Kronecker, block: Sequence[str]) -> LinearOperator:
    chosen = blocks.as_block(block, op.space)
    layers = [layer for layer in op.layers if set(layer.layer.names) & set(chosen)]
    if not all(set(layer.layer.names) <= set(chosen) for layer in layers):
        return Restricted(op, chosen)
    return Kronecker(blocks.select(op.params, chosen), tuple(layers), op.psd)


@diagonal.register
def _(op: Kronecker) -> PyTree:
    return _diagonal(op)


@compiled
def _diagonal(op: Kronecker) -> PyTree:
    space, whole = dict(tree.named_leaves(op.space)), {}
    for layer in op.layers:
        squared = [None if q is None else q.swapaxes(-1, -2) ** 2 for q in (layer.q_in, layer.q_out)]
        for name, leaf in layer.layer.leaves(rotate(layer.values[None], *squared), space).items():
            whole[name] = whole[name] + leaf if name in whole else leaf
    return tree.only(jax.tree.structure(op.space).unflatten([whole[name] for name in space]))


@to_dense.register
def _(op: Kronecker) -> Array:
    identity = tree.unflatten(jnp.eye(op.size, dtype=wide_dtype(op.space)), op.space)
    return tree.flatten(op.mm(identity), op.space)


@trace.register
def _(op: Kronecker, *, key: Key | None = None) -> Any:
    return jnp.sum(jnp.stack([jnp.sum(layer.values) for layer in op.layers]))
