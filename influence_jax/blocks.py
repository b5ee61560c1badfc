"""Parts of a parameter tree: leaves chosen by name, and trees put together again.

A block is a tuple of leaf names; a block vector is a flat dict `{name: leaf}`.  A partition is given by a function from
a leaf's name to its block's name (`full`, `by_layer`, `by_parameter`, or your own), or by a dict from block names to
prefixes of leaf names.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax

from . import _reprs, tree
from ._pytree import dataclass, static
from ._typing import Array, PyTree

Block: TypeAlias = tuple[str, ...]
Blocks: TypeAlias = Callable[[str], str] | Mapping[str, Sequence[str]]


def full(name: str) -> str:
    """All parameters in one block, called `""`.

    Args:
      name: Slash-separated name of a leaf, e.g. `"encoder/dense/kernel"`.

    Returns:
      The name of its block.

    Example:
      >>> full("encoder/dense/kernel")
      ''
    """
    return ""


def by_layer(name: str) -> str:
    """A block per layer: the path of a leaf without its last part; a leaf at the root is a block of its own.

    Args:
      name: Slash-separated name of a leaf, e.g. `"encoder/dense/kernel"`.

    Returns:
      The name of its block.

    Example:
      >>> by_layer("encoder/dense/kernel"), by_layer("scale")
      ('encoder/dense', 'scale')
    """
    return name.rpartition("/")[0] or name


def by_parameter(name: str) -> str:
    """A block per parameter leaf.

    Args:
      name: Slash-separated name of a leaf, e.g. `"encoder/dense/kernel"`.

    Returns:
      The name of its block.

    Example:
      >>> by_parameter("encoder/dense/kernel")
      'encoder/dense/kernel'
    """
    return name


@dataclasses.dataclass(frozen=True, repr=False)
class Prefixes:
    """A partition by prefixes, hashable: what a dict of prefixes becomes."""

    items: tuple[tuple[str, tuple[str, ...]], ...]

    def __call__(self, name: str) -> str:
        """The block of a leaf that `check` has found to be in exactly one."""
        return self.owners(name)[0]

    def owners(self, name: str) -> list[str]:
        """The blocks that a leaf is in."""
        return [block for block, prefixes in self.items if any(is_below(name, prefix) for prefix in prefixes)]

    def check(self, names: Sequence[str]) -> None:
        """Raise if a prefix matches nothing, or a leaf is covered by no block or by several."""
        prefixes = [prefix for _, group in self.items for prefix in group]
        unknown = [prefix for prefix in prefixes if not any(is_below(name, prefix) for name in names)]
        if unknown:
            raise ValueError(f"blocks: prefixes {unknown} match no parameter, expected prefixes of {list(names)}")
        wrong = {name: self.owners(name) for name in names if len(self.owners(name)) != 1}
        if wrong:
            raise ValueError(
                f"blocks: every leaf has to be in exactly one block, but these are in none or several: {wrong}"
            )

    def __repr__(self) -> str:
        return _reprs.call(self, _reprs.some([name for name, _ in self.items]))


def is_below(name: str, prefix: str) -> bool:
    """Whether a leaf's name is the prefix or goes on behind it with a slash; all are below `""`."""
    return name == prefix or prefix == "" or name.startswith(prefix + "/")


def as_blocks(blocks: Blocks) -> Callable[[str], str]:
    """A partition as a hashable function from leaf names to block names.

    Raises:
      TypeError: If it is neither a function nor a dict of lists of prefixes.
    """
    if isinstance(blocks, Mapping):
        for block, prefixes in blocks.items():
            listed = isinstance(prefixes, Sequence) and not isinstance(prefixes, str)
            if not listed or not prefixes or not all(isinstance(prefix, str) for prefix in prefixes):
                raise TypeError(f"blocks: got {block!r}: {prefixes!r}, expected a list of prefixes of leaf names")
        return Prefixes(tuple((block, tuple(prefixes)) for block, prefixes in blocks.items()))
    if not callable(blocks):
        raise TypeError(
            f"blocks: got {blocks!r}, expected full, by_layer, by_parameter, a function from leaf name to block "
            "name, or a dict {block name: [prefixes of leaf names]}"
        )
    return blocks


def partition(space: PyTree, blocks: Blocks) -> OrderedDict[str, Block]:
    """The blocks of a space, in the order of their first leaves.

    Raises:
      TypeError: If `blocks` is not a partition, or names a block by something else than a string.
      ValueError: If a dict of prefixes does not cover every leaf exactly once.
    """
    names = [name for name, _ in tree.named_leaves(space)]
    label = as_blocks(blocks)
    if isinstance(label, Prefixes):
        label.check(names)
    groups: OrderedDict[str, Block] = OrderedDict()
    for name in names:
        block = label(name)
        if not isinstance(block, str):
            raise TypeError(f"blocks: gave {block!r} for leaf '{name}', expected the name of a block, a string")
        groups[block] = (*groups.get(block, ()), name)
    return groups


def join(parts: Mapping[str, dict[str, Array]], space: PyTree) -> PyTree:
    """The whole tree from block vectors (or stacks of them), by name."""
    leaves = {name: leaf for part in parts.values() for name, leaf in part.items()}
    structure = jax.tree.structure(space)
    return structure.unflatten([leaves[name] for name, _ in tree.named_leaves(space)])


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
        """The whole tree, with `block` in its place.

        Derivatives are taken in float32 at least: the rest of a bfloat16 model then has to be computed in it as well.
        """
        promoted = all(leaf.dtype == tree.accumulation_dtype(leaf.dtype) for leaf in block.values())
        rest = tree.promote(self.leaves) if promoted else self.leaves
        return self.structure.unflatten([block[name] if name in block else rest[name] for name in self.names])


def whole(params: PyTree, frozen: Frozen | None) -> PyTree:
    """The whole tree from a block and what is frozen around it; `params` itself if nothing is."""
    return params if frozen is None else frozen.merge(params)


def freeze_rest(params: PyTree, block: Block, frozen: Frozen | None) -> tuple[dict[str, Array], Frozen]:
    """Split `params` into a block and the rest; a block of a block adds to what is already frozen."""
    leaves = dict(tree.named_leaves(params))
    rest = {name: leaf for name, leaf in leaves.items() if name not in block}
    if frozen is None:
        return select(params, block), Frozen(rest, tuple(leaves), jax.tree.structure(params))
    return select(params, block), Frozen({**frozen.leaves, **rest}, frozen.names, frozen.structure)


def is_by_block(factors: PyTree, params: PyTree) -> bool:
    """Whether factors are a dict by block, rather than a tree shaped like the parameters."""
    if jax.tree.structure(factors) == jax.tree.structure(params) or not isinstance(factors, Mapping):
        return False
    names = {name for name, _ in tree.named_leaves(params)}
    return all(isinstance(part, Mapping) and names.issuperset(part) for part in factors.values())


def join_whole(factors: Mapping[str, PyTree], params: PyTree) -> PyTree:
    """Factors by block as one tree, checked to hold every leaf once."""
    if not isinstance(factors, Mapping) or not all(isinstance(part, Mapping) for part in factors.values()):
        raise TypeError("factors: expected {block: {leaf name: array}}, as influence_factors_by_block returns")
    got = sorted(name for part in factors.values() for name in part)
    expected = sorted(name for name, _ in tree.named_leaves(params))
    if got != expected:
        raise ValueError(f"factors: got the leaves {got}, expected each of {expected} once")
    return join(factors, params)
