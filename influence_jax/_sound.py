"""Losses and gradients that are not finite: told on the host, by count and by the first example.

Passes over the data turn what comes of such a loss into NaN.  Where NaN comes out, and only there, the losses are
computed once more to say which they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import _reprs, tree
from ._class_numbers import check_class_numbers
from ._mesh import compiled
from ._typing import Array, PyTree
from ._words import levels_inside
from .batching import chunk_for, each, map_chunks, map_over, readable_in_place
from .objective import LossOnly, Objective

ADVICE = (
    "look at the labels (class numbers from 0 to C - 1? 0 and 1 of a binary loss? padding that is not masked?), and "
    "for logarithms, roots and quotients of zero"
)


class LossWarning(UserWarning):
    """Losses or gradients of some examples are NaN or infinite, and so their scores are NaN.

    Example:
      >>> import influence_jax as ij
      >>> influence = ij.Influence(lambda p, z: jnp.log(z) * p["w"], p := {"w": jnp.array(1.0)}, ij.Identity(p))
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always")
      ...     influence.influences(jnp.array([1.0]), jnp.array([1.0, 0.0]))
      Array([[ 0., nan]], dtype=float...)
      >>> caught[0].category is ij.LossWarning
      True
    """


class Unsound(NamedTuple):
    """Examples whose loss, or gradient, is not finite.

    Attributes:
      losses: How many losses are not finite.
      gradients: How many gradients are not finite though the loss is.
      first: Place of the first of them, and its loss.
      flat: How many gradients are exactly zero.
      examples: Out of how many.
    """

    losses: int = 0
    gradients: int = 0
    first: tuple[int, float] | None = None
    flat: int = 0
    examples: int = 0

    def then(self, more: Unsound) -> Unsound:
        """Add those of further examples."""
        counts = (self.losses + more.losses, self.gradients + more.gradients)
        return Unsound(*counts, self.first or more.first, self.flat + more.flat, self.examples + more.examples)

    def describe(self, what: str, noun: str = "loss") -> str:
        """Say how many there are, and which is the first."""
        place, loss = self.first or (0, 0.0)
        which = noun if self.losses else f"gradient of the {noun}"
        also = f", and the gradient of {self.gradients:,} more" if self.losses and self.gradients else ""
        told = f"{noun} {loss:.3g}" if np.isfinite(loss) else f"{loss:.3g}"
        bad, examples = self.losses or self.gradients, _reprs.counted(self.examples, "example")
        return (
            f"{what}: the {which} of {bad:,} of {examples} is NaN or infinite{also}, the first example {place} ({told})"
        )


def find(
    objective: Objective | LossOnly,
    params: PyTree,
    batch: PyTree,
    *,
    counted: Array | np.ndarray | None = None,
    start: int = 0,
    expected: int = 0,
    chunk: int | None = None,
    name: str = "data",
) -> Unsound:
    """Look at the loss of every example of a batch, and at the gradient if that does not explain enough.

    Looks at the class numbers of the examples first.

    Args:
      objective: The loss.
      params: Leaves `(*leaf)`.
      batch: Leaves `(N, ...)`.
      counted: Which of them count, `(N,)` bool; all if None.
      start: Place of the first of them in the whole data.
      expected: How many are to be explained.
      chunk: Examples at once; chosen from the sizes if None.
      name: Of the argument that they are in.

    Raises:
      ValueError: If class numbers are out of range, as `check_class_numbers`.
    """
    check_class_numbers(objective, params, batch, name, counted=counted, start=start, chunk=chunk)
    with jax.ensure_compile_time_eval():  # under jit, too, what is concrete is looked at now
        return _find(objective, params, batch, counted, start, expected, chunk)


def _find(
    objective: Objective | LossOnly,
    params: PyTree,
    batch: PyTree,
    counted: Array | np.ndarray | None,
    start: int,
    expected: int,
    chunk: int | None,
) -> Unsound:
    counted = np.ones(tree.count(batch), bool) if counted is None else counted
    losses, first, loss, examples = (x.item() for x in _losses(objective, params, batch, counted, chunk))
    found = Unsound(losses, 0, (start + first, loss) if losses else None, 0, examples)
    if losses >= expected:
        return found
    undefined, place, value, flat = (x.item() for x in _gradients(objective, params, batch, counted, chunk))
    if undefined and (not losses or place < first):
        found = found._replace(first=(start + place, value))
    return found._replace(gradients=undefined, flat=flat)


def finite_rows(stack: PyTree) -> Array:
    """Tell which rows of a stack, leaves `(N, *leaf)`, are finite in all entries, `(N,)`."""
    rows = [jnp.isfinite(x).reshape(x.shape[0], -1) for x in jax.tree.leaves(stack)]
    return jnp.all(jnp.stack([jnp.all(x, axis=1) for x in rows]), axis=0)


def _values_and_grads(objective: Objective | LossOnly, params: PyTree, batch: PyTree) -> tuple[Array, PyTree]:
    return each(lambda example, loss, at: jax.value_and_grad(loss)(at, example), batch, objective, params)


@partial(compiled, static_argnames="chunk")
def _losses(
    objective: Objective | LossOnly, params: PyTree, batch: PyTree, counted: Array, chunk: int | None
) -> tuple[Array, ...]:
    """Count losses that are not finite; the first one's place, the loss there, and how many there are in all."""
    losses = map_over(partial(objective, tree.promote(params)), batch, chunk=chunk)
    bad = ~jnp.isfinite(losses) & counted
    first = jnp.argmax(bad)
    return jnp.sum(bad), first, losses[first], jnp.sum(counted)


@partial(compiled, static_argnames="chunk")
def _gradients(
    objective: Objective | LossOnly, params: PyTree, batch: PyTree, counted: Array, chunk: int | None
) -> tuple[Array, ...]:
    """Count gradients that are not finite though the loss is; the first, its loss; and gradients that are zero."""
    params = tree.promote(params)

    def one_chunk(part: PyTree) -> tuple[Array, Array, Array]:
        losses, grads = _values_and_grads(objective, params, part)
        return losses, finite_rows(grads), tree.norms(grads) == 0

    losses, finite, flat = map_chunks(one_chunk, batch, chunk=chunk or chunk_for(tree.size(params)))
    bad = ~finite & jnp.isfinite(losses) & counted
    first = jnp.argmax(bad)
    return jnp.sum(bad), first, losses[first], jnp.sum(flat & counted)


@compiled
def finite_gradients(objective: Objective | LossOnly, params: PyTree, batch: PyTree) -> Array:
    """Tell of which examples the gradient is finite, `(N,)`."""

    def of_chunk(part: PyTree) -> Array:
        losses, grads = _values_and_grads(objective, tree.promote(params), part)
        return finite_rows(grads) & jnp.isfinite(losses)

    return map_chunks(of_chunk, batch, chunk=chunk_for(tree.size(params)))


class Seen(NamedTuple):
    """What is to be seen of scores without knowing where they come from.

    Attributes:
      unsound: For how many examples no score is finite.
      flat: Whether all scores are exactly zero.
      traced: Whether nothing can be seen of them, for they are being traced.
    """

    unsound: int
    flat: bool
    traced: bool = False


def is_finite(values: PyTree) -> bool:
    """Tell, on the host, whether all entries are finite."""
    leaves = jax.tree.leaves(values)
    if all(not isinstance(leaf, jax.Array) or readable_in_place(leaf) for leaf in leaves):
        return all(bool(np.all(np.isfinite(np.asarray(leaf)))) for leaf in leaves)
    with jax.ensure_compile_time_eval():
        return bool(_all_finite(leaves))


_all_finite = compiled(lambda leaves: jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves])))


def look(scores: PyTree, axis: int, *, entire: bool = False) -> Seen:
    """Look at scores of examples along an axis, on the host; `entire` if all of an example's are to be finite."""
    leaves = jax.tree.leaves(scores)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return Seen(0, False, traced=True)
    if all(not isinstance(leaf, jax.Array) or readable_in_place(leaf) for leaf in leaves):
        return Seen(*(x.item() for x in _look(np, [np.asarray(leaf) for leaf in leaves], axis, entire)))
    with jax.ensure_compile_time_eval():
        return Seen(*(x.item() for x in _look_on_device(leaves, axis, entire)))


def _look(numpy: Any, leaves: list[Any], axis: int, entire: bool) -> tuple[Any, Any]:
    """Look with numpy, which compiles nothing, or with its namesake in JAX."""
    over = numpy.all if entire else numpy.any
    others = lambda x: tuple(i for i in range(x.ndim) if i != axis)
    sound = over(numpy.stack([over(numpy.isfinite(x), axis=others(x)) for x in leaves]), axis=0)
    return numpy.sum(~sound), numpy.all(numpy.stack([numpy.all(x == 0) for x in leaves]))


_look_on_device = partial(compiled, static_argnames=("axis", "entire"))(partial(_look, jnp))


def _is_known(arrays: PyTree) -> bool:
    """Tell whether all arrays can be read now: none is traced, or partly with another process."""
    leaves = jax.tree.leaves(arrays)
    return not any(isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True) for x in leaves)


def number(count: Array) -> int:
    """Read a count on the host; zero where it is traced."""
    return 0 if isinstance(count, jax.core.Tracer) else int(count)


class Watch:
    """The losses behind scores: what is found out about them over all batches of a call, for one warning at its end.

    Args:
      objective: The loss, or the measurement.
      params: Leaves `(*leaf)`.
      name: Of the argument that the examples are in.
      noun: What the objective gives.
      made: What is made of it.
      chunk: Examples at once; chosen from the sizes if None.
    """

    def __init__(
        self,
        objective: Objective | LossOnly,
        params: PyTree,
        name: str,
        *,
        noun: str = "loss",
        made: str = "scores",
        chunk: int | None = None,
    ) -> None:
        self.chunk = chunk
        self.objective, self.params, self.name, self.noun, self.made = objective, params, name, noun, made
        self.found, self.flat, self.refuses = Unsound(), True, False

    def batch(self, seen: Seen, batch: PyTree, start: int = 0, count: int | None = None) -> None:
        """Find out why there are no finite scores for some examples of a batch, if that is so.

        Args:
          seen: Of the scores.
          batch: Leaves `(N, ...)`.
          start: Place of the first example in the whole data.
          count: How many of the rows are examples; all if None.

        Raises:
          ValueError: If class numbers are out of range, as `check_class_numbers`.
        """
        rows = tree.count(batch)
        count = rows if count is None else count
        more, counted = Unsound(examples=count), np.arange(rows) < count
        losses, params, chunk = self.objective, self.params, self.chunk
        check_class_numbers(losses, params, batch, self.name, counted=counted, start=start, chunk=chunk)
        if seen.unsound or (seen.flat and self.flat):
            expected = count if seen.flat else seen.unsound
            with jax.ensure_compile_time_eval():
                more = _find(losses, params, batch, counted, start, expected, chunk)
        elif seen.traced and _is_known((losses, params, batch)):  # closed over by a program: its losses are known
            with jax.ensure_compile_time_eval():
                more = _find(losses, params, batch, counted, start, 0, chunk)
        self.flat &= more.flat == count
        self.found = self.found.then(more)
        if self.refuses and more.first is not None:
            raise refusal(self.found, self.name, self.noun)

    def warn(self) -> bool:
        """Warn if there is something to tell, and return whether there is."""
        found, kind = self.found, f"{self.noun}{'es' if self.noun.endswith('s') else 's'}"
        if found.first is not None:
            message = f"{found.describe(self.name, self.noun)}; their {self.made} are NaN: {ADVICE}"
        elif found.examples and found.flat == found.examples:
            message = (
                f"{self.name}: the gradient of all {found.examples:,} {kind} is exactly zero, and so are the "
                f"{self.made}; either the loss has nothing left to lower there, as a hinge, a triplet or a ReLU "
                "that is satisfied or dead, or it counts or rounds, such as an accuracy, and is not differentiable"
            )
        else:
            return False
        warnings.warn(message, LossWarning, stacklevel=levels_inside())
        return True


def warn_of_no_effect(wrt: str | int) -> None:
    """Warn of derivatives in a part of the examples that are all exactly zero, though the gradients are not."""
    warnings.warn(
        f"wrt: the derivatives in part {wrt!r} of all gradients are exactly zero, and so are the scores; the loss does "
        "not depend on that part, or rounds it or casts it to integers, which has no derivative",
        LossWarning,
        stacklevel=levels_inside(),
    )


def warn_of_overflow(scores: Sequence[PyTree]) -> None:
    """Warn of scores, leaves `(Q, N, ...)`, that are not finite though others of the same query and example are.

    A loss that is not finite, or a solve that failed, spoils all scores of an example or a query: what is left is
    beyond the range of its dtype.
    """
    leaves = jax.tree.leaves(scores)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return
    if all(not isinstance(leaf, jax.Array) or readable_in_place(leaf) for leaf in leaves):
        count, query, example = (x.item() for x in _overflown(np, [np.asarray(leaf) for leaf in leaves]))
    else:
        with jax.ensure_compile_time_eval():
            count, query, example = (x.item() for x in _overflown_on_device(leaves))
    if count:
        dtype = leaves[0].dtype
        warnings.warn(
            f"scores: {count:,} are NaN or infinite though all losses and gradients behind them are finite, first that "
            f"of example {example} on query {query}: they are beyond the range of {dtype}; scale the loss or the data "
            "down, or compute in 64-bit mode",
            LossWarning,
            stacklevel=levels_inside(),
        )


def _overflown(numpy: Any, leaves: list[Any]) -> tuple[Any, Any, Any]:
    """Count pairs without finite scores whose query and example have others, and find the first."""
    finite = [numpy.all(numpy.isfinite(x).reshape(*x.shape[:2], -1), axis=2) for x in leaves]
    sound = numpy.all(numpy.stack(finite), axis=0)
    alone = ~sound & numpy.any(sound, axis=1, keepdims=True) & numpy.any(sound, axis=0, keepdims=True)
    first = numpy.argmax(alone.reshape(-1))
    return numpy.sum(alone), first // alone.shape[1], first % alone.shape[1]


_overflown_on_device = compiled(partial(_overflown, jnp))


def refusal(found: Unsound, name: str, noun: str = "loss") -> ValueError:
    """Make the error that refuses a curvature, or scores to keep, for losses that are not finite."""
    return ValueError(
        f"{found.describe(name, noun)}; expected finite ones: {ADVICE}; or leave them out, as a weight of zero does"
    )


def tell(objective: Objective | LossOnly, params: PyTree, batch: PyTree, values: PyTree, made: str) -> None:
    """Warn about losses of a batch behind what was made of them, leaves `(N, ...)`."""
    watch = Watch(objective, params, "batch", made=made)
    smallest = min(jax.tree.leaves(values), key=lambda x: x.size)  # what is NaN is so in all leaves
    watch.batch(look(smallest, 0)._replace(flat=False), batch)
    watch.warn()
