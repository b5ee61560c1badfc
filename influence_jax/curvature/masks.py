r"""Which positions of which layers count: masks of named layers, and a mask that names none.

A number of positions does not tell what they are positions of: the source of an encoder-decoder may be as long as its
target.  So a mask that names no layers is held to what it means, that padding has no effect: in every layer that it is
applied to, the loss has no gradient where it leaves positions out.  A mask of named layers is taken at its word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp

from .. import _reprs, tree
from .._typing import Array, PyTree
from .._words import ask
from ..blocks import is_below
from ..capture import Factors, Layer, LayerFactors, Plan
from ..objective import check_hashable

Mask: TypeAlias = Callable[[PyTree], Array]
OfUses: TypeAlias = tuple[Mask | None, ...]  # of one layer


@dataclasses.dataclass(frozen=True)
class Named:
    """Masks by prefixes of parameter names, hashable: what a mapping becomes."""

    items: tuple[tuple[str, Mask], ...]


def as_masks(mask: Mask | Mapping[str, Mask] | None) -> Mask | Named | None:
    """Return a mask as a static part of a program.

    Raises:
      TypeError: If it is neither a function nor a mapping from prefixes to functions.
      ValueError: If a mapping is empty.
    """
    if mask is None:
        return None
    if isinstance(mask, Mapping):
        if not mask:
            raise ValueError("mask: got an empty mapping, expected {prefix of parameter names: function}, or None")
        for prefix, fn in mask.items():
            if not isinstance(prefix, str) or not callable(fn):
                raise TypeError(
                    f"mask: got {prefix!r}: {fn!r:.80}, expected a prefix of parameter names and a function "
                    "mask(example) -> (T,)"
                )
            check_hashable(fn, f"mask[{prefix!r}]")
        return Named(tuple(sorted(mask.items(), key=lambda item: item[0])))
    if not callable(mask):
        described = _reprs.array(mask) if hasattr(mask, "shape") and hasattr(mask, "dtype") else repr(mask)[:80]
        raise TypeError(
            f"mask: got {described}, expected a function mask(example) -> (T,), a mapping from prefixes of parameter "
            "names to such functions, or None"
        )
    check_hashable(mask, "mask")
    return mask


def of_layers(mask: Mask | Named | None, plan: Plan, layers: Sequence[Layer], example: PyTree) -> list[OfUses]:
    """Return the mask of each use of each layer, None where all positions count.

    Args:
      mask: From `as_masks`.
      plan: Where the layers are from.
      layers: The layers.
      example: One example's shapes.

    Raises:
      TypeError, ValueError: If a mask is not of that form, fits nothing, or does not fit a layer that it names.
    """
    if isinstance(mask, Named):
        return _by_name(mask, plan, layers, example)
    if mask is None:
        return [(None,) * len(layer.uses) for layer in layers]
    length = _length(mask, example)
    _check_length(length, plan)
    return [tuple(mask if n == length else None for n in _positions_of(plan, layer)) for layer in layers]


def _length(mask: Mask, example: PyTree) -> int:
    return jax.eval_shape(partial(positions, mask), example).shape[0]


def _positions_of(plan: Plan, layer: Layer) -> list[int]:
    """Return how many positions each use of a layer has, none for a leaf that is not used as a matrix."""
    return [0] if layer.of_entries else [plan.uses[index].positions for index, _ in layer.uses]


def _check_length(length: int, plan: Plan) -> None:
    """Raise if nothing in the model has as many positions as the mask."""
    known = {use.positions for use in plan.uses}
    known |= {leaf.shape[0] for leaf in jax.tree.leaves(plan.output) if leaf.ndim > 1}
    if any(leaf.shape == (length,) for leaf in jax.tree.leaves(plan.output)):
        raise ValueError(
            f"mask: the output of shape ({length},) may have an entry for each position, or be something else of that "
            f"length; give positions an axis of their own, an output of shape ({length}, 1), or name the layers whose "
            "positions count, mask={prefix of parameter names: function}"
        )
    if length not in known:
        raise ValueError(
            f"mask: returned {length} entries for one example, but the model's layers and outputs have "
            f"{sorted(known)} positions; return one entry for each of them"
        )


def _by_name(mask: Named, plan: Plan, layers: Sequence[Layer], example: PyTree) -> list[OfUses]:
    """Return the masks that a mapping gives to the layers it names."""
    unknown = [prefix for prefix, _ in mask.items if not any(is_below(name, prefix) for name in plan.names)]
    if unknown:
        raise ValueError(f"mask: {unknown} match no parameter, expected prefixes of {list(plan.names)}")
    found: list[OfUses] = []
    named: set[str] = set()
    for layer in layers:
        below = lambda prefix, names=layer.names: any(is_below(name, prefix) for name in names)
        used = layer.uses and not layer.of_entries
        owners = {prefix: fn for prefix, fn in mask.items if used and below(prefix)}
        if len(owners) > 1:
            raise ValueError(f"mask: {list(layer.names)} are named by each of {list(owners)}, expected by one")
        for prefix, fn in owners.items():
            _check_fits(prefix, fn, layer, _positions_of(plan, layer), example)
        named |= set(owners)
        found.append((next(iter(owners.values()), None),) * len(layer.uses))
    for prefix, _ in mask.items:
        if prefix not in named:
            has = sorted({layer.kernel for layer in layers if layer.uses and not layer.of_entries})
            raise ValueError(f"mask: {prefix!r} names no layer that has positions, expected a prefix of some of {has}")
    return found


def _check_fits(prefix: str, mask: Mask, layer: Layer, uses: Sequence[int], example: PyTree) -> None:
    length = _length(mask, example)
    if set(uses) != {length}:
        raise ValueError(
            f"mask[{prefix!r}]: returned {length} entries for one example, but '{layer.kernel}' is used at "
            f"{sorted(set(uses))} positions; name the layers that have {length} positions only"
        )


def positions(mask: Mask, example: PyTree) -> Array:
    """Return which positions of one example count, `(T,)`."""
    counts = ask("mask", mask, {"example": example}, "it returns one entry per position of ONE example, (T,)")
    if counts is None or isinstance(counts, str):
        raise TypeError(f"mask: returned a {type(counts).__name__} for one example, expected an array (T,)")
    counts = jnp.asarray(counts).astype(bool)
    if counts.ndim != 1:
        raise ValueError(f"mask: returned shape {counts.shape} for one example, expected (T,), one entry per position")
    return counts


def counted(masks: Sequence[OfUses], examples: PyTree) -> list[list[Array | None]]:
    """Return which positions count, `(B, T)` for each use of each layer, None where all do."""
    fns = dict.fromkeys(fn for uses in masks for fn in uses if fn is not None)  # in the same order in every process
    known: dict[Mask | None, Array | None] = {fn: jax.vmap(partial(positions, fn))(examples) for fn in fns}
    return [[known.get(fn) for fn in uses] for uses in masks]


def kept(factors: LayerFactors, counts: Sequence[Array | None]) -> LayerFactors:
    """Return factors whose output cotangents are zero at positions that do not count."""

    def of_use(use: Factors, counts: Array | None) -> Factors:
        if counts is None:
            return use
        return Factors(use.inputs, jnp.where(counts[:, None, None, :, None], use.outputs, 0))

    return LayerFactors([of_use(*pair) for pair in zip(factors.uses, counts, strict=True)], factors.rest)


def kept_output(mask: Mask | Named | None, cotangents: PyTree, example: PyTree) -> PyTree:
    """Return cotangents of the output that are zero where a mask without names leaves its rows out.

    For what a user's function draws, which does not see the example.  That its rows are those of the mask is decided by
    comparing what is left with the loss Hessian.
    """
    if mask is None or isinstance(mask, Named):
        return cotangents
    counts = positions(mask, example)
    rows = lambda x: counts.reshape((-1,) + (1,) * (x.ndim - 1))
    return jax.tree.map(lambda x: jnp.where(rows(x), x, 0) if x.ndim > 1 and len(x) == len(counts) else x, cotangents)


def disagreeing(factors: LayerFactors, counts: Sequence[Array | None], weights: Array) -> Array | None:
    """Return in how many examples the loss depends on positions of a layer that a mask leaves out, None without one.

    Largest cotangents are compared, for whose squares small ones would vanish: what is left of rounding is below the
    square root of the precision, and of padding that has an effect is not.
    """
    found = [use_counts for use_counts in counts if use_counts is not None]
    if not found:
        return None
    leaks = jnp.zeros(len(weights), bool)
    for use, use_counts in zip(factors.uses, counts, strict=True):
        if use_counts is not None:
            size = sizes(use)
            left_out = jnp.max(jnp.where(use_counts, 0, size), axis=1)
            leaks |= left_out > jnp.finfo(size.dtype).eps ** 0.5 * jnp.max(size, axis=1)
    return jnp.sum(jnp.where(leaks & (weights != 0), 1.0, 0.0).astype(weights.dtype))


def sizes(use: Factors) -> Array:
    """Return the largest entry of the cotangents at each position, `(B, T)`."""
    return tree.promote(jnp.max(jnp.abs(use.outputs), axis=(1, 2, 4)))


def silence(use: Factors, counts: Array | None, weights: Array) -> Array | None:
    """Return at how many examples each position has no gradient, and has one, `(2, T)`; None without such an axis.

    Of examples that have a gradient at some position, up to rounding, and of positions that a mask keeps.
    """
    if use.positions == 1:
        return None
    size = sizes(use)
    largest = jnp.max(size, axis=1, keepdims=True)
    heard = size > 100 * jnp.finfo(size.dtype).eps * largest
    counted = ((weights != 0)[:, None] & (largest > 0)).astype(weights.dtype)
    silent = ~heard if counts is None else ~heard & counts
    return jnp.stack([jnp.sum(jnp.where(x, counted, 0), axis=0) for x in (silent, heard)])


def check_agreement(layers: Sequence[Layer], leaks: Sequence[Array | None]) -> None:
    """Raise, on the host, if a mask that names no layers leaves out positions that the loss depends on."""
    counts: dict[str, int] = {}
    for layer, n in zip(layers, leaks, strict=True):
        if n is not None:
            counts[layer.kernel] = max(counts.get(layer.kernel, 0), int(n))
    wrong = {name: n for name, n in counts.items() if n > 0}
    if not wrong:
        return
    agree = [name for name in counts if name not in wrong]
    advice = f"mask={{{', '.join(f'{name!r}: ...' for name in agree or ['...'])}}}"
    raise ValueError(
        f"mask: {list(wrong)} have as many positions as it has entries, but the loss depends on those that it leaves "
        f"out, in {max(wrong.values())} example(s): they are positions of something else of that length, or the loss "
        "does not leave padding out. Mend the loss, or name the layers whose positions count by prefixes of their "
        f"parameters, {advice}, which is taken at its word"
    )
