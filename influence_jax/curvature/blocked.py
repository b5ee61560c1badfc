"""Operators that are known to be zero outside of diagonal blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from functools import singledispatch

from .. import tree
from .._typing import Array
from ..blocks import Block
from .capabilities import checked, unsupported
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
    return OrderedDict({"": tuple(name for name, _ in tree.named_leaves(checked(op).space))})


@singledispatch
def shifted(op: LinearOperator, dampings: Mapping[str, Array]) -> LinearOperator:
    r"""An operator of diagonal blocks with a multiple of the identity added to each, $A + \oplus_b \lambda_b I$.

    Args:
      op: Operator with `diagonal_blocks`.
      dampings: A scalar for each of them.

    Raises:
      TypeError: If the operator is not known to be made of blocks.
    """
    raise unsupported(shifted, op, "a solve with a damping for each block")
