"""Parts of a parameter tree: leaves chosen by name, and trees put together again.

A block is a tuple of leaf names; a block vector is a flat dict `{name: leaf}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from . import tree
from ._pytree import dataclass, static
from ._typing import Array, PyTree

Block = tuple[str, ...]


def as_block(block: Sequence[str], space: PyTree) -> Block:
    """Check a block against the leaves of `space` and put its names in leaf order.

    Raises:
      TypeError: If `block` is a single string.
      ValueError: If it is empty, or names a leaf that does not exist.
    """
    if isinstance(block, str):
        raise TypeError(f"block: got the string {block!r}, expected a sequence of leaf names, e.g. ({block!r},)")
    names = [name for name, _ in tree.named_leaves(space)]
    unknown = sorted(set(block) - set(names))
    if unknown or not block:
        raise ValueError(f"block: got {tuple(block)}, expected names among {names}")
    return tuple(name for name in names if name in set(block))


def select(params: PyTree, block: Block) -> dict[str, Array]:
    """The leaves of a block, as a flat dict."""
    leaves = dict(tree.named_leaves(params))
    return {name: leaves[name] for name in block}


def embed(vector: dict[str, Array], space: PyTree) -> PyTree:
    """A block vector as a vector of the whole space, zero elsewhere."""
    leaves, structure = jax.tree.flatten(tree.zeros_like(space))
    names = [name for name, _ in tree.named_leaves(space)]
    return structure.unflatten([vector.get(name, zero) for name, zero in zip(names, leaves, strict=True)])


@dataclass
class Frozen:
    """The leaves outside a block, and how to put the whole tree together.

    Args:
      leaves: Flat dict of the leaves that are held fixed.
      names: All leaf names in leaf order.
      structure: Tree structure of the whole.
    """

    leaves: dict[str, Array]
    names: tuple[str, ...] = static()
    structure: Any = static()

    def merge(self, block: dict[str, Array]) -> PyTree:
        """The whole tree, with `block` in its place."""
        return self.structure.unflatten([block[name] if name in block else self.leaves[name] for name in self.names])


def freeze_rest(params: PyTree, block: Block, frozen: Frozen | None) -> tuple[dict[str, Array], Frozen]:
    """Split `params` into a block and the rest; a block of a block adds to what is already frozen."""
    leaves = dict(tree.named_leaves(params))
    rest = {name: leaf for name, leaf in leaves.items() if name not in block}
    if frozen is None:
        return select(params, block), Frozen(rest, tuple(leaves), jax.tree.structure(params))
    return select(params, block), Frozen({**frozen.leaves, **rest}, frozen.names, frozen.structure)
