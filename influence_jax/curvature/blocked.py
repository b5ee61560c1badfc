"""Operators that are known to be zero outside of diagonal blocks."""

from __future__ import annotations

from collections import OrderedDict
from functools import singledispatch

from .. import tree
from ..blocks import Block
from .capabilities import unsupported
from .operator import LinearOperator


@singledispatch
def diagonal_blocks(op: LinearOperator) -> OrderedDict[str, Block]:
    """The blocks outside of which an operator is known to be zero: names, and leaves in each; one block `""` of all.

    Args:
      op: The operator.

    Returns:
      Names of blocks, and the names of the leaves in each, in leaf order.

    Raises:
      TypeError: If `op` is no operator.

    Example:
      >>> import jax.numpy as jnp
      >>> import influence_jax as ij
      >>> dict(ij.diagonal_blocks(ij.Identity({"a": jnp.ones(2), "b": jnp.ones(3)})))
      {'': ('a', 'b')}
    """
    if not isinstance(op, LinearOperator):
        raise unsupported(diagonal_blocks, op, "a solve block by block")
    return whole(op)


def whole(op: LinearOperator) -> OrderedDict[str, Block]:
    """Return the one block of all leaves."""
    return OrderedDict({"": tuple(name for name, _ in tree.named_leaves(op.space))})
