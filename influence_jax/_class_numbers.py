"""Class numbers of a batch, looked at on the host: whether they fit what a loss does with them.

What a loss does with which part of an example is read from its jaxpr, once for the shapes of its arguments.  Then
the smallest and the largest number of that part say that all is well, or that examples are to be looked at one by one.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _reprs, tree
from ._crossed import Crossed, crossed
from ._jaxpr_compat import largest
from ._lookups import Marked, Reader, Site, is_read_in_vain, sites_of
from ._mesh import compiled
from ._one_hot import FIX, Broadcast, broadcast
from ._predicted import drops, ends_in
from ._traced import described, traced
from ._typing import Array, PyTree
from ._words import levels_inside, name_of
from .batching import chunk_for, map_chunks, map_over, readable_in_place
from .objective import LossOnly, Objective

SURE = 8  # bits


def check_class_numbers(
    objective: Objective | LossOnly,
    params: PyTree,
    batch: PyTree,
    name: str,
    *,
    counted: Array | np.ndarray | None = None,
    start: int = 0,
    chunk: int | None = None,
    point: Callable[[], PyTree] | None = None,
) -> None:
    """Look at the class numbers of a batch; within a program that is being traced, of one that it closes over.

    Args:
      objective: The loss.
      params: Leaves `(*leaf)`.
      batch: Leaves `(N, ...)`.
      name: Of the argument that the batch is in.
      counted: Which examples count, `(N,)` bool; all if None.
      start: Place of the first of them in the whole data.
      chunk: Examples at once; chosen from the sizes if None.
      point: Makes the parameters at which losses are computed, if they are needed; `params` may then be shapes.

    Raises:
      ValueError: If numbers are out of range of what is read at them, and the loss depends on what is read there.
    """
    leaves, structure = jax.tree.flatten((objective, params, batch))
    if not all(hasattr(leaf, "dtype") for leaf in leaves):
        return
    if any(isinstance(leaf, jax.core.Tracer) for leaf in (*leaves, counted)):
        return
    plan = _plan(structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
    if plan.doubtful is not None:
        _tell_doubtful(objective, plan.doubtful, leaves[plan.leaves[plan.doubtful.part]], counted, name)
    if plan.crossed is not None:
        _tell_crossed(objective, plan.crossed, name)
    for oddity in plan.odd:
        _warn(f"{name}: {oddity}", structure, oddity)
    for site in plan.sites:
        _tell_one_hot(objective, site, leaves, plan, counted, name)
    suspects = plan.suspects(leaves)
    if suspects:
        counted = np.ones(tree.count(batch), bool) if counted is None else counted
        params = params if point is None else point()
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params)):
            return  # made within a program that is being traced
        _judge(objective, params, batch, suspects, counted, start, name, chunk or plan.chunk)


class _Plan(NamedTuple):
    """What is to be looked at in batches of some shapes.

    Attributes:
      sites: What the loss reads at numbers of the example.
      doubtful: What may be a label that it broadcasts.
      crossed: What it broadcasts to a square with the output.
      leaves: The place of each part of an example among all leaves.
      ranges: Leaves, from which number to which, that say that all of `sites` are in range; None if they cannot.
      chunk: Examples at once, by what the loss computes of one.
      odd: What is odd in how the model predicts, in words.
    """

    sites: tuple[Site, ...] = ()
    doubtful: Broadcast | None = None
    crossed: Crossed | None = None
    leaves: Mapping[str, int] = {}
    ranges: tuple[tuple[int, float, float], ...] | None = ()
    chunk: int = 1
    odd: tuple[str, ...] = ()

    def suspects(self, leaves: Sequence[Any]) -> tuple[Site, ...]:
        """Return the sites at which numbers may be out of range."""
        if self.ranges is None:
            return self.sites
        for place, lowest, highest in self.ranges:
            low, high = _ends(leaves[place])
            if not (low >= lowest and high <= highest):
                return self.sites
        return ()


@functools.lru_cache(maxsize=1024)
def _plan(structure: Any, shapes: tuple[tuple[tuple[int, ...], Any], ...]) -> _Plan:
    """Read from the traced loss what is to be looked at."""
    arguments = structure.unflatten([jax.ShapeDtypeStruct(*shape) for shape in shapes])
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), arguments[2])
    losses, descriptions = arguments[0], [described(x) for x in (*arguments[:2], example)]
    alone = isinstance(losses, LossOnly) and losses.frozen is None  # then it has been traced for `check_bare`
    program = traced(losses.fn, *descriptions[1:]) if alone else traced(_loss_and_output, *descriptions)
    if program is None:
        return _Plan()
    jaxpr, returned = program
    doubtful, square = broadcast(losses.fn, arguments[1], example, bare=True) if alone else None, None
    if isinstance(losses, Objective):
        doubtful = broadcast(losses.loss, returned[1], example)
        square = crossed(losses.loss, returned[1], example)
    met = sites_of(jaxpr, _marked(losses, arguments[1], example, empty=True))
    sites = tuple(dict.fromkeys(site for site, _ in met))
    names = [name for name, _ in tree.named_leaves(example)]
    places = {name: len(shapes) - len(names) + i for i, name in enumerate(names)}
    low = {"lookup": 0, "switch": 0, "write": 0, "one_hot": -np.inf, "scatter": -np.inf}
    ranges = dict.fromkeys((places[part], low[site.kind], site.size - 1) for site in sites for part in site.parts)
    known = tuple(ranges) if all(site.direct for site in sites) else None
    return _Plan(sites, doubtful, square, places, known, chunk_for(largest(jaxpr)), tuple(_odd(losses, jaxpr)))


def _odd(losses: Objective | LossOnly, jaxpr: Any) -> Iterator[str]:
    """Say what is odd in how a model predicts."""
    loss = losses.loss if isinstance(losses, Objective) else None
    applied = getattr(loss, "applies", "")
    if applied and ends_in(jaxpr, 1) == applied:
        yield (
            f"the model ends in a {applied}, and {name_of(loss)} applies one itself, to logits; leave out that "
            "of the model, unless it was trained so"
        )
    if drops(jaxpr):
        yield (
            f"the model or the loss {_name(losses)} drops entries at random by a key of its own, so the same for every "
            "example; turn dropout off, as train=False or deterministic=True does, unless that choice is part of the "
            "model"
        )


def _loss_and_output(objective: Objective | LossOnly, params: PyTree, example: PyTree) -> tuple[Array, PyTree]:
    if isinstance(objective, LossOnly):
        return objective(params, example), None
    output = objective.output(params, example)
    return objective.cost(output, example), output


def _marked(objective: PyTree, params: PyTree, example: PyTree, *, empty: bool = False) -> list[Marked]:
    """Mark the arguments of `_loss_and_output`, leaf by leaf."""
    value = lambda x: None if empty else x
    marked = [Marked(value(x), value(x), model=True, arithmetic=False) for x in jax.tree.leaves((objective, params))]
    for path, x in tree.named_leaves(example):
        number = bool(jnp.issubdtype(x.dtype, jnp.number)) or x.dtype == bool
        low = 0 if jnp.issubdtype(x.dtype, jnp.unsignedinteger) else -np.inf
        marked.append(Marked(value(x), value(x), frozenset([path]), arithmetic=number, low=low))
    return marked


def _ends(leaf: Any) -> tuple[float, float]:
    """Return the smallest and the largest number of an array."""
    if leaf.size == 0:
        return 0, 0
    if not isinstance(leaf, jax.Array) or readable_in_place(leaf):
        values = np.asarray(leaf)
        return values.min(), values.max()
    low, high = _now(_ends_on_device, leaf)
    return low.item(), high.item()


_ends_on_device = compiled(lambda leaf: (jnp.min(leaf), jnp.max(leaf)))


def _judge(
    objective: Objective | LossOnly,
    params: PyTree,
    batch: PyTree,
    sites: tuple[Site, ...],
    counted: Array | np.ndarray,
    start: int,
    name: str,
    chunk: int | None,
) -> None:
    """Raise, or warn, if what is read at numbers out of range makes a difference."""
    outside, numbers, found = _now(_out_of_range, objective, params, batch, counted, sites=sites, chunk=chunk)
    for place, site in enumerate(sites):
        if not found[place]:
            continue
        of_site = outside[:, place], numbers[:, place]
        matter = _now(_that_matter, objective, params, batch, *of_site, site=site, chunk=chunk)
        count, first, number = (x.item() for x in matter)
        if not count:
            continue
        examples = _reprs.counted(int(np.sum(_now(_total, counted))), "example")
        which = f"in {count:,} of {examples}, the first example {start + first} ({number:g})"
        part = " and ".join(repr(part) for part in site.parts)
        numbers_of = f"the numbers of part {part}" if site.direct else f"the numbers made of part {part}"
        told = f"{name}: {numbers_of} are out of range {which}; expected 0 to {site.size - 1}, "
        if not site.parts:
            raise ValueError(
                f"{name}: {_who(objective, params, batch, site)} reads an axis of length {site.size} at a fixed place, "
                f"{number:g}, that it does not have, and JAX another place of it in silence; expected one from "
                f"{-site.size} to {site.size - 1}"
            )
        if site.kind in ("lookup", "write", "switch"):
            verb = "reads" if site.kind == "lookup" else "writes to"
            reads = f"{verb} an axis of length {site.size} at them, and JAX another place of it"
            if site.kind == "switch":
                reads = f"chooses by them among {site.size} functions or arrays, and JAX another one"
            raise ValueError(
                f"{told}where {_who(objective, params, batch, site)} {reads} in silence; number from 0, and mask what "
                "is not to count, by jnp.where or influence_jax.losses.cross_entropy(ignore=...); if the nearest is "
                f"meant, say so of the numbers, jnp.clip(number, 0, {site.size - 1}), whatever the mode of the lookup"
            )
        does = "compares them with these, as jax.nn.one_hot does: the row is zero"
        if site.kind == "scatter":
            does = f"writes to an axis of length {site.size} at them: they are left out"
        _warn(
            f"{told}for {_who(objective, params, batch, site)} {does}, and so is what such an example adds; number "
            "from 0, or mask what is not to count, e.g. by influence_jax.losses.cross_entropy(ignore=...)",
            jax.tree.structure(objective),
            site,
        )


def _now(program: Any, *arrays: PyTree, **static: Any) -> tuple[Any, ...]:
    """Run a compiled program on concrete arrays, within one that is being traced as well, and not as part of it.

    `jax.ensure_compile_time_eval` would not do: it reads constants within the traced loss, and leaves nothing to find.
    """
    if not isinstance(jnp.zeros(()), jax.core.Tracer):
        return program(*arrays, **static)
    return jax.tree.map(np.asarray, program.lower(*arrays, **static).compile()(*arrays))


_total = compiled(lambda counted: (jnp.sum(counted),))


def _traced_again(objective: PyTree, params: PyTree, example: PyTree) -> tuple[Any, list[Marked]]:
    jaxpr = jax.make_jaxpr(_loss_and_output)(objective, params, example)
    return jaxpr, _marked(objective, params, example)


@partial(compiled, static_argnames=("sites", "chunk"))
def _out_of_range(
    objective: Objective | LossOnly,
    params: PyTree,
    batch: PyTree,
    counted: Array,
    sites: tuple[Site, ...],
    chunk: int | None,
) -> tuple[Array, Array, Array]:
    """Tell which examples are read at numbers out of range, `(N, sites)`, one such number, and of which sites."""

    def one(example: PyTree) -> tuple[Array, Array]:
        jaxpr, marked = _traced_again(objective, params, example)
        reader = Reader(indices=True)
        reader.run(jaxpr, marked)
        return _of_sites(reader, sites)

    outside, numbers = map_over(one, batch, chunk=chunk)
    outside &= counted[:, None]
    return outside, numbers, jnp.any(outside, axis=0)


def _of_sites(reader: Reader, sites: Sequence[Site]) -> tuple[Array, Array]:
    """Gather what a reader met at each site, which may be at several places."""
    flags, numbers = [], []
    for site in sites:
        met = [x for x in reader.met if x.site == site]
        bad = jnp.stack([jnp.zeros((), bool), *(x.bad for x in met if x.bad is not None)])
        read_at = jnp.stack([jnp.zeros((), jnp.float32), *(x.number for x in met if x.number is not None)])
        flags.append(jnp.any(bad))
        numbers.append(read_at[jnp.argmax(bad)])
    return jnp.stack(flags), jnp.stack(numbers)


@partial(compiled, static_argnames=("site", "chunk"))
def _that_matter(
    objective: Objective | LossOnly,
    params: PyTree,
    batch: PyTree,
    outside: Array,
    numbers: Array,
    site: Site,
    chunk: int | None,
) -> tuple[Array, Array, Array]:
    """Count the examples whose finite loss depends on what is read out of range; the first one's place, and number."""
    params = tree.promote(params)

    def one(example: PyTree) -> Array:
        jaxpr, marked = _traced_again(objective, params, example)
        in_vain, loss = is_read_in_vain(jaxpr, marked, site)
        return ~in_vain & jnp.isfinite(loss)

    def one_chunk(part: tuple[PyTree, Array]) -> Array:
        examples, flags = part
        judged = lambda: jax.vmap(one)(examples) & flags
        return lax.cond(jnp.any(flags), judged, lambda: jnp.zeros_like(flags))

    matter = map_chunks(one_chunk, (batch, outside), chunk=chunk)
    first = jnp.argmax(matter)
    return jnp.sum(matter), first, numbers[first]


def _tell_doubtful(
    objective: Objective | LossOnly, found: Broadcast, part: Any, counted: Array | np.ndarray | None, name: str
) -> None:
    """Warn if a part that is broadcast over the output holds class numbers: whole, in range, and several."""
    classes = found.over[-1] if found.over else 1
    if classes < 2 or (isinstance(part, jax.Array) and not readable_in_place(part)):
        return
    values = np.asarray(part, np.float64 if part.dtype != bool else None).reshape(len(part), -1)
    values = values[np.asarray(counted)] if counted is not None else values
    kinds = np.unique(values)
    if len(kinds) < 2 or not all(float(x).is_integer() and 0 <= x < classes for x in kinds.tolist()):
        return
    _warn(
        f"{name}: {_name(objective)} broadcasts part '{found.part}' of the example, {part.dtype}{list(found.shape)}, "
        f"over an array {found.over} made of the output, and all its values are whole numbers from 0 to "
        f"{classes - 1}: class numbers given to a function of one-hot labels? Then make them integers, and use {FIX} "
        "of the output, nothing is wrong",
        jax.tree.structure(objective),
        found,
    )


def _tell_crossed(objective: Objective | LossOnly, found: Crossed, name: str) -> None:
    """Warn of a part and an output that are broadcast to a square."""
    length = found.shape[0]
    _warn(
        f"{name}: {_name(objective)} broadcasts part '{found.part}' of the example, {found.shape}, with the output or "
        f"what is made of it, {found.output}, to ({length}, {length}), every entry of one with every entry of the "
        "other; bring them to one shape, by jnp.squeeze or reshape; if all pairs are meant, nothing is wrong",
        jax.tree.structure(objective),
        found,
    )


def _tell_one_hot(
    objective: Objective | LossOnly,
    site: Site,
    leaves: Sequence[Any],
    plan: _Plan,
    counted: Array | np.ndarray | None,
    name: str,
) -> None:
    """Warn if the numbers read at a site are rows of zeros with a single one, more of them than by chance."""
    if not site.direct or len(site.parts) != 1 or site.kind == "scatter":
        return
    part = leaves[plan.leaves[site.parts[0]]]
    here = not isinstance(part, jax.Array) or readable_in_place(part)
    if part.ndim < 2 or part.shape[-1] != site.size or part.dtype == bool or not here:
        return
    values = np.asarray(part)
    values = values if counted is None else values[np.asarray(counted)]
    rows = values.reshape(-1, site.size)
    chance = len(rows) * (site.size - np.log2(site.size))  # bits that rows of 0 and 1 would have to agree in
    if chance < SURE or not (((rows == 0) | (rows == 1)).all() and (rows.sum(axis=1) == 1).all()):
        return
    _warn(
        f"{name}: {_name(objective)} takes part '{site.parts[0]}' of the example, {part.dtype}"
        f"{list(part.shape[1:])}, for class numbers 0 to {site.size - 1}, but all its rows are one-hot; give it "
        "y.argmax(-1), or multiply by the rows instead of reading at them; if they are numbers, nothing is wrong",
        jax.tree.structure(objective),
        site,
        "one-hot rows",
    )


def _who(objective: Objective | LossOnly, params: PyTree, batch: PyTree, site: Site) -> str:
    """Say which function of an objective has a site."""
    if isinstance(objective, Objective):
        shapes = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
        example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
        jaxpr = jax.make_jaxpr(lambda *of: of[0].output(*of[1:]))(*jax.tree.map(shapes, (objective, params)), example)
        if any(found == site for found, _ in sites_of(jaxpr, _marked(objective, params, example, empty=True))):
            return f"predict ({name_of(objective.predict)})"
    return f"the loss of {_name(objective)}"


def _name(objective: Objective | LossOnly) -> str:
    return name_of(objective.fn if isinstance(objective, LossOnly) else objective.loss)


@functools.lru_cache(maxsize=1024)
def _warner(*loss: Any) -> list[str]:
    """Return the warnings given of a loss, a list to add to."""
    return []


def _warn(message: str, *loss: Any) -> None:
    """Warn, once of each loss."""
    given = _warner(*loss)
    if not given:
        given.append(message)
        warnings.warn(message, UserWarning, stacklevel=levels_inside())
