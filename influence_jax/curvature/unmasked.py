"""Positions that a loss masks, of a fit that was given no mask: they count in its averages, and a warning says so."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from .. import _reprs
from .._mesh import compiled
from .._typing import Array, PyTree
from .._words import levels_inside
from ..batching import take
from ..capture import Layer
from .convexity import is_at_hand
from .exact import EmpiricalFisher
from .fisher import Keyed
from .kronecker_fit import Recipe, heard_at, kept_at
from .masks import Mask, positions

# A share of positions that may count without harm.
FEW = 0.01
# Examples that are looked at, and draws of a model turned into noise.
LOOKED_AT, DRAWS = 8, 32
# A maximum of four lets each position through in a quarter of the draws, a ReLU in half of them: so many pairs of
# example and position that were not heard of, times draws in a row that changed nothing, are not chance.
ENOUGH = 32


def warn_of_padding(
    op: EmpiricalFisher, recipe: Recipe, layers: Sequence[Layer], silence: Sequence[Sequence[Array | None]]
) -> None:
    """Warn, on the host, if a loss masks positions of some layers that no mask, or one that is too wide, leaves out.

    A mask that keeps all positions of all examples says that padding is to count, and one of named layers is taken at
    its word.

    The same position in all examples is the model's design, as the last one of a next-token loss: what differs from
    example to example is a mask.  Where the pass over the data has met such positions, a few examples are looked at
    once more, with the model turned into noise, which moves what a ReLU, a maximum or a hinge hides.

    Args:
      op: The data of the fit, or the first part of them.
      recipe: What was asked for.
      layers: The layers.
      silence: Of each use of each of them, what `masks.silence` says.
    """
    if not is_at_hand((op, silence)) or not any(map(_differs, silence)):
        return
    if callable(recipe.mask) and _keeps_all(op, recipe.mask):
        return
    counted = np.arange(op.count) if op.weights is None else np.flatnonzero(np.asarray(op.weights))
    places = counted[np.unique(np.linspace(0, len(counted) - 1, LOOKED_AT).astype(int))]
    with jax.ensure_compile_time_eval():
        examples = take(op.data.example, places.astype(np.int32))
        few = EmpiricalFisher(op.objective, op.params, Keyed(examples, None))  # type: ignore[arg-type]
        masked = _masked(few, recipe)
        if recipe.mask is not None:
            masked = [
                [x & y for x, y in zip(*uses, strict=True)] for uses in zip(masked, _kept(few, recipe), strict=True)
            ]
    found = {layer.kernel: pairs for layer, uses in zip(layers, masked, strict=True) for pairs in uses if pairs.any()}
    if found:
        lengths = {layer.kernel: x.shape[1] for layer, uses in zip(layers, masked, strict=True) for x in uses}
        message = _message if recipe.mask is None else _too_wide
        warnings.warn(message(found, lengths, places), stacklevel=levels_inside())


def _differs(uses: Sequence[Array | None]) -> bool:
    """Tell whether a layer has positions without a gradient in some examples and with one in others, and not a few."""
    for silent, heard in (np.asarray(x) for x in uses if x is not None):
        if np.sum(silent, where=heard > 0) > FEW * np.sum(silent + heard):
            return True
    return False


def _masked(few: EmpiricalFisher, recipe: Recipe) -> list[list[np.ndarray]]:
    """Find, for each use of each layer, which positions are masked in an example and not in others, `(B, T)`."""
    heard: list[list[np.ndarray]] = []
    pairs, same = -1, 0
    for draw in range(DRAWS):
        params, number = _noisy(few.params, draw)
        new = _heard(dataclasses.replace(few, params=params), recipe, number)
        new = [[np.asarray(x) for x in uses if x is not None] for uses in new]
        heard = [[x | y for x, y in zip(*both, strict=True)] for both in zip(heard or new, new, strict=True)]
        found = [[~x & x.any(axis=0) & x.any(axis=1, keepdims=True) for x in uses] for uses in heard]
        before, pairs = pairs, sum(int(x.sum()) for uses in found for x in uses)
        same = same + 1 if pairs == before else 0
        if same >= 2 and (pairs == 0 or pairs * same >= ENOUGH):
            return found
    return [[np.zeros_like(x) for x in uses] for uses in heard]


def _keeps_all(op: EmpiricalFisher, mask: Mask) -> bool:
    """Tell whether a mask without names leaves nothing out, in any example."""
    counts = jax.vmap(partial(positions, mask))
    with jax.ensure_compile_time_eval():
        return bool(np.all(np.asarray(counts(op.data.example))))


def _kept(few: EmpiricalFisher, recipe: Recipe) -> list[list[np.ndarray]]:
    """Return the positions that the mask keeps, for each use that `_masked` tells of; all of others none."""
    heard = _heard(few, recipe, jnp.float32(0))
    both = zip(heard, kept_at(few, recipe), strict=True)
    none = lambda x: np.zeros(x.shape, bool)
    return [
        [none(x) if y is None else np.asarray(y) for x, y in zip(*uses, strict=True) if x is not None] for uses in both
    ]


def _noisy(params: PyTree, seed: int) -> tuple[PyTree, Array]:
    """Return other parameters of the same size, leaf by leaf, and a number that starts noise; by NumPy, uncompiled."""
    random = np.random.default_rng(seed)

    def other(leaf: Array) -> Array:
        values = np.asarray(leaf).astype(np.float64)
        drawn = random.normal(size=leaf.shape) * np.sqrt(np.mean(values**2))
        return jax.device_put(drawn.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(other, params), jnp.float32(random.uniform(1, 100))


@partial(compiled, static_argnames="recipe")
def _heard(op: EmpiricalFisher, recipe: Recipe, noise: Array) -> list[list[Array | None]]:
    return heard_at(op, recipe, noise)


def _too_wide(found: dict[str, np.ndarray], lengths: dict[str, int], places: np.ndarray) -> str:
    """Say where the mask keeps positions that the loss leaves out."""
    first = next(iter(found.values()))
    row, position = np.argwhere(first)[0]
    return (
        f"mask: it keeps positions of {_reprs.some([repr(name) for name in found])} that the loss masks, first "
        f"position {position} of example {places[row]}: it has no gradient there, and has one there in other examples. "
        "It counts in the averages of this curvature like data; let the mask be that of the loss, e.g. without the "
        "last token of each example, which has no next one (all true says that padding is to count)"
    )


def _message(found: dict[str, np.ndarray], lengths: dict[str, int], places: np.ndarray) -> str:
    """Say where the loss masks positions, and how to pass the mask."""
    first = next(iter(found.values()))
    row, position = np.argwhere(first)[0]
    length = first.shape[1]
    others = [name for name, count in lengths.items() if count == length and name not in found]
    way = f"{{{', '.join(f'{name!r}: fn' for name in found)}}} with fn = " if others else ""
    return (
        f"mask: none was given, but the loss masks positions of {_reprs.some([repr(name) for name in found])}, first "
        f"position {position} of example {places[row]}: it has no gradient there, and has one there in other examples. "
        f"Padding counts in the averages of this curvature like data; pass mask={way}lambda example: ..., {length} "
        "entries, true where a position counts (all true says that padding is to count)"
    )
