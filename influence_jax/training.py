r"""Training as a pure function of the examples' weights, to be mapped over masks and differentiated.

Every step minimises $\sum_{i\in batch} w_i\,\ell_i / \sum_{i\in batch} w_i + \frac{\lambda}{2}\|\theta\|^2$, so that an
example of weight zero counts as one that is not there, whatever its loss is where the training starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from . import _reprs, _steps, tree
from ._class_numbers import check_class_numbers
from ._mesh import compiled
from ._pytree import dataclass, static
from ._sound import ADVICE, Unsound
from ._steps import State
from ._typing import Array, ArrayLike, Key, LossFunction, PyTree
from .batching import as_batch, check_key, check_positive, map_over, take
from .objective import LossOnly, Objective, as_objective, check_hashable
from .solvers.damping import check_number

BATCHES = ("own", "shared")
WHY_KEY = "a training draws the order of its examples, and its start where params is a function"


def training(
    objective: Objective | LossFunction,
    optimizer: optax.GradientTransformation | optax.MultiSteps,
    params: PyTree | Callable[[Key], PyTree],
    data: PyTree,
    *,
    epochs: int,
    batch_size: int | None = None,
    penalty: float | Array = 0.0,
    batches: str = "own",
) -> Training:
    r"""A training of a model by an optax optimizer, as a pure function `train(weights, key) -> params`.

    A step on a batch B changes the parameters as the optimizer says for the gradient of
    $\sum_{i\in B} w_i\,\ell_i / \sum_{i\in B} w_i + \frac{\lambda}{2}\|\theta\|^2$; a batch without weight makes no
    step.  The data are visited in an order of their own in every epoch: of the two keys that `jax.random.split(key)`
    gives, the first goes to `params`, and epoch e runs through the examples in the order
    `jax.random.permutation(jax.random.fold_in(second, e), N)`.

    Args:
      objective: Loss of a training example: an `Objective` or a bare `f(params, example) -> scalar`.
      optimizer: From optax, schedules, chains and `MultiSteps` included.  Static: make it once, for another one
        compiles again.
      params: The start, leaves `(*leaf)`, or a function `key -> params` that draws it.
      data: Leaves `(N, ...)`.
      epochs: How often to go through the data.
      batch_size: Examples in a batch, the last of an epoch may have fewer; all examples in every step if None.
      penalty: $\lambda$, what curvature calls damping.
      batches: `"own"`: the training that the examples of positive weight would have on their own, in the same order:
        what has no weight takes no place in a batch and no time.  `"shared"`: every example keeps its place in the same
        batches whatever the weights, so that the result can be differentiated in them.  The same thing, and both
        differentiable, when there are no batches.

    Returns:
      The training, which may be jitted, vmapped over masks and (threefry) keys, and called with `weights` `(N,)`.

    Raises:
      TypeError, ValueError: If an argument is not of that form, or class numbers of the data are out of range of what
        the loss reads at them.

    Example:
      >>> import influence_jax as ij
      >>> from influence_jax.training import training
      >>> f = lambda params, z: 0.5 * (params["mean"] - z) ** 2
      >>> train = training(f, optax.sgd(0.5), {"mean": jnp.array(0.0)}, jnp.array([1.0, 2.0, 6.0]), epochs=40)
      >>> masks = jnp.array([[True, True, True], [True, True, False]])
      >>> jax.vmap(train, (0, None))(masks, jax.random.key(0))["mean"].round(4).tolist()
      [3.0, 1.5]
    """
    check_positive(epochs, "epochs")
    if batch_size is not None:
        check_positive(batch_size, "batch_size")
    check_number(penalty, "penalty")
    if not isinstance(batches, str) or batches not in BATCHES:
        raise ValueError(f"batches: got {batches!r}, expected one of {list(BATCHES)}")
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"optimizer: got a {type(optimizer).__name__}, expected one from optax, such as optax.sgd(0.1)")
    for part in (optimizer.init, optimizer.update):
        check_hashable(part, "optimizer")
    start, draw = _as_start(params)
    losses, data = as_objective(objective), as_batch(data, "data")
    _check_numbers(losses, start, draw, data)
    lost = _lost(losses, start, draw, data)
    return Training(
        losses,
        start,
        data if lost is None else _without(data, lost),
        penalty,
        lost=lost,
        draw=draw,
        optimizer=optimizer,
        epochs=int(epochs),
        batch_size=None if batch_size is None else int(batch_size),
        batches=batches,
    )


@dataclass
class Training:
    r"""What `training` makes: `train(weights, key) -> params`.

    A pytree; its arrays are arguments of compiled programs.

    Attributes:
      objective: Loss of a training example.
      params: The start, leaves `(*leaf)`; None where it is drawn.
      data: Leaves `(N, ...)`; where examples are lost, another one stands in for them.
      penalty: $\lambda$.
      lost: Which examples have no finite loss, `(N,)`: they may have no weight; None if there are none.
      draw: `key -> params`; None where the start is given; static.
      optimizer: From optax; static.
      epochs: How often to go through the data; static.
      batch_size: Examples in a batch, all if None; static.
      batches: `"own"` or `"shared"`; static.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: 0.5 * (params["mean"] - z) ** 2
      >>> start, data = {"mean": jnp.array(0.0)}, jnp.array([1.0, 3.0])
      >>> train = ij.retrain.training(f, optax.sgd(0.5), start, data, epochs=2)
      >>> train
      Training(LossOnly(<lambda>), 2 examples, 2 epochs of full batches)
      >>> train.checkpoints(jnp.ones(2), jax.random.key(0), [0, 1, 2])["mean"].tolist()
      [0.0, 1.0, 1.5]
    """

    objective: Objective | LossOnly
    params: PyTree  # the start; None where it is drawn
    data: PyTree
    penalty: float | Array
    lost: Array | None = dataclasses.field(default=None, kw_only=True)
    draw: Callable[[Key], PyTree] | None = static(kw_only=True)
    optimizer: optax.GradientTransformation = static(kw_only=True)
    epochs: int = static(kw_only=True)
    batch_size: int | None = static(kw_only=True)
    batches: str = static(kw_only=True)

    def __call__(self, weights: ArrayLike, key: Key) -> PyTree:
        """The parameters after the last step.

        Args:
          weights: Of the examples, `(N,)`, not negative; a mask is fine.
          key: Random key of the start and of the order of the examples.

        Returns:
          Leaves `(*leaf)`, in the dtypes of the start.

        Raises:
          TypeError, ValueError: If an argument is not of that form.
        """
        return _trained(self, _steps.check_weights(weights, self.count), check_key(key, WHY_KEY))

    def checkpoints(self, weights: ArrayLike, key: Key, epochs: Sequence[int]) -> PyTree:
        """The parameters on the way, after each of the given numbers of epochs; for methods that sum over them.

        Args:
          weights: Of the examples, `(N,)`.
          key: Random key, as in a call.
          epochs: Increasing, from 0, the start, to `self.epochs`, the end.

        Returns:
          Leaves `(C, *leaf)`, a row for each of the epochs asked for.

        Raises:
          TypeError, ValueError: If an argument is not of that form.
        """
        chosen = _steps.check_epochs(epochs, self.epochs)
        weights = _steps.check_weights(weights, self.count)
        return _checkpoints(self, weights, check_key(key, WHY_KEY), chosen)

    @property
    def count(self) -> int:
        """Number of examples."""
        return tree.count(self.data)

    @property
    def is_differentiable(self) -> bool:
        """Whether the result is a differentiable function of the weights."""
        return self.batches == "shared" or self.batch_size is None

    def __repr__(self) -> str:
        batches = "full batches" if self.batch_size is None else f"{self.batches} batches of {self.batch_size}"
        return _reprs.call(self, repr(self.objective), _reprs.rows(self.data), f"{self.epochs} epochs of {batches}")


def _as_start(params: PyTree | Callable[[Key], PyTree]) -> tuple[PyTree, Callable[[Key], PyTree] | None]:
    """The parameters, or the function that draws them, whichever it is."""
    if not (callable(params) and jax.tree_util.all_leaves([params])):
        return tree.check_params(params), None
    check_hashable(params, "params")
    jax.eval_shape(lambda: tree.check_params(params(jax.random.key(0)), "params(key)"))
    return None, params


def _lost(
    objective: Objective | LossOnly, start: PyTree, draw: Callable[[Key], PyTree] | None, data: PyTree
) -> Array | None:
    """Return which examples have no finite loss, neither at the start nor near it; None if none, all or unknown.

    A weight of zero does not keep them out of a sum, for zero times what is not finite is not zero.  To put others into
    their places in every step would copy the data for every mask; to do so once asks which they are.
    """
    lost = _without_loss(objective, start, draw, data)
    return jnp.asarray(lost) if lost is not None and lost.any() and not lost.all() else None


def _without_loss(
    objective: Objective | LossOnly, start: PyTree, draw: Callable[[Key], PyTree] | None, data: PyTree
) -> np.ndarray | None:
    """Return which examples have no finite loss, neither at the start nor near it, `(N,)`; None if unknown."""
    if not _is_here((start, data)):
        return None
    lost = np.ones(tree.count(data), bool)
    for number in range(2):  # the second only if need be: what is undefined at one point may be at zero, say, alone
        try:
            lost &= ~np.asarray(_finite(objective, _point(start, draw, number), data))
        except Exception:  # told where the training runs
            return None
        if not lost.any():
            break
    return lost


def _is_here(arrays: PyTree) -> bool:
    """Return whether arrays can be looked at in this process."""
    return all(not isinstance(x, jax.core.Tracer) and x.is_fully_addressable for x in jax.tree.leaves(arrays))


def _point(start: PyTree, draw: Callable[[Key], PyTree] | None, number: int) -> PyTree:
    """Return the start, one near it, or one of those that are drawn."""
    return _near(start, number) if draw is None else tree.check_params(draw(jax.random.key(number)))


def _check_numbers(
    objective: Objective | LossOnly,
    start: PyTree,
    draw: Callable[[Key], PyTree] | None,
    batch: PyTree,
    name: str = "data",
) -> None:
    """Look at class numbers as `check_class_numbers`; losses near the start tell more than at zero."""
    if not _is_here((start, batch)):
        return
    at = lambda: _near(_point(start, draw, 0), 1)
    shapes = start if draw is None else jax.eval_shape(lambda: _point(start, draw, 0))
    check_class_numbers(objective, shapes, batch, name, point=at)


def check_query(train: Training, asked: Objective | LossOnly, query: PyTree) -> None:
    """Look at the class numbers of queries as of the data."""
    _check_numbers(asked, train.params, train.draw, query, "query")


def about_losses(train: Training, weights: np.ndarray | Array, asked: Any = None, query: PyTree = None) -> str:
    """Say how many examples of positive weight, or queries, have no finite loss; nothing if all do, or it is unknown.

    Args:
      train: The training; its data is looked at.
      weights: Of its examples, `(N,)`.
      asked: A measurement of queries, which are looked at instead.
      query: Leaves `(Q, ...)`.
    """
    lost = train.lost
    if asked is not None:
        lost, weights = _without_loss(asked, train.params, train.draw, query), jnp.ones(tree.count(query))
    elif lost is None:
        lost = _without_loss(train.objective, train.params, train.draw, train.data)
    if lost is None or isinstance(weights, jax.core.Tracer):
        return ""
    bad = np.asarray(lost) & (np.asarray(weights) != 0)
    if not bad.any():
        return ""
    examples = int(np.count_nonzero(np.asarray(weights)))
    found = Unsound(int(bad.sum()), first=(int(np.argmax(bad)), np.nan), examples=examples)
    name = "data" if asked is None else "query"
    return f"{found.describe(name, 'loss at the start')}: {ADVICE}"


@compiled
def _finite(objective: Objective | LossOnly, params: PyTree, data: PyTree) -> Array:
    return map_over(lambda example: jnp.isfinite(objective(params, example)), data)


def _near(params: PyTree, number: int) -> PyTree:
    """Return the parameters, or others near them."""
    shift = lambda x: (0.01 * number * np.cos(np.arange(x.size)).reshape(x.shape)).astype(x.dtype)
    return jax.tree.map(lambda x: x + shift(x), params)


def _without(data: PyTree, lost: Array) -> PyTree:
    """Return data with the first other example in the places of those that are lost."""
    return take(data, jnp.where(lost, jnp.argmin(lost), jnp.arange(lost.size)))


@jax.custom_jvp
def _of_lost(weights: Array, lost: Array) -> Array:
    """Make a weight of what is lost NaN, unless it is zero; its derivative, that of the training, is NaN anyway."""
    return jnp.where(lost & (weights != 0), jnp.nan, weights)


@_of_lost.defjvp
def _of_lost_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    weights, lost = primals
    return _of_lost(weights, lost), jnp.where(lost, jnp.full_like(weights, jnp.nan), 1) * tangents[0]


@compiled
def _trained(train: Training, weights: Array, key: Key) -> PyTree:
    state, weights, key = _begun(train, weights, key)
    if train.is_differentiable:
        return _all_steps(train, state, weights, key).params
    step = lambda state, epoch: (_epoch(train, state, weights, key, epoch), None)
    return lax.scan(step, state, jnp.arange(train.epochs))[0].params


@partial(compiled, static_argnames="epochs")
def _checkpoints(train: Training, weights: Array, key: Key, epochs: tuple[int, ...]) -> PyTree:
    state, weights, key = _begun(train, weights, key)
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(epochs), *x.shape)), state.params)

    def step(carry: tuple[State, PyTree], epoch: Array) -> tuple[tuple[State, PyTree], None]:
        state = _epoch(train, carry[0], weights, key, epoch)
        due = jnp.asarray(epochs, epoch.dtype) == epoch + 1
        return (state, tree.where_rows(due, tree.stack_of_one(state.params), carry[1])), None

    return lax.scan(step, (state, rows), jnp.arange(epochs[-1]))[0][1]


def _begun(train: Training, weights: Array, key: Key) -> tuple[State, Array, Key]:
    """The state before the first step, the weights in the dtype of sums, and the key of the order."""
    for_start, for_order = jax.random.split(key)
    params = train.params if train.draw is None else tree.check_params(train.draw(for_start))
    wide = tree.accumulation_dtype(*(leaf.dtype for leaf in jax.tree.leaves(params)))
    weights = weights.astype(wide)
    if train.lost is not None:
        weights = _of_lost(weights, train.lost)
    return State(params, train.optimizer.init(params)), weights, for_order


def _step(train: Training, state: State, batch: PyTree, weights: Array) -> State:
    loss = partial(_steps.mean_loss, train.objective, train.penalty)
    return _steps.step(loss, train.optimizer, state, batch, weights)


def _step_at(train: Training, state: State, part: tuple[Array, Array]) -> State:
    """A step on the examples at some places, with their weights."""
    batch = jax.tree.map(lambda x: jnp.take(x, part[0], axis=0, mode="clip"), train.data)
    return _step(train, state, batch, part[1])


def _epoch(train: Training, state: State, weights: Array, key: Key, epoch: Array) -> State:
    """One pass through the data, of as many steps as there are batches to fill."""
    if train.batch_size is None:
        return _step(train, state, train.data, weights)
    order, kept = _steps.order(key, epoch, train.count), jnp.ones_like(weights, bool)
    if train.batches == "own":
        kept = weights != 0  # NaN is kept: the training is then not defined
        order = _steps.kept_first(order, kept)
    batches = _steps.in_batches(order, train.batch_size)
    steps = -(-jnp.sum(kept) // batches.shape[1])
    step = lambda i, state: _step_at(train, state, _steps.weighted(batches[i], weights))
    return lax.fori_loop(0, steps, step, state)


def _all_steps(train: Training, state: State, weights: Array, key: Key) -> State:
    """All steps, of batches that do not depend on the weights, in groups.

    Going backward, a group is run again from its first state, and each of its steps from its own, so that memory grows
    with the square root of the number of steps, and what a model holds for its derivative is held for one step.
    """
    if train.batch_size is None:
        groups, length = _steps.groups(train.epochs)
        step = lambda state, on: _step(train, state, train.data, jnp.where(on, weights, 0))
        on = jnp.arange(groups * length) < train.epochs
        return _steps.scan_again(partial(_steps.scan_again, step), state, on.reshape(groups, length))

    def group(state: State, batches: Array) -> State:
        # The weights of the whole group at once: their derivatives are then added up once in a group, not in a step.
        return _steps.scan_again(partial(_step_at, train), state, _steps.weighted(batches, weights))

    # Mapped, not vectorised: generators other than threefry draw other numbers when vectorised.
    orders = lax.map(lambda epoch: _steps.order(key, epoch, train.count), jnp.arange(train.epochs))
    batches = jax.vmap(lambda order: _steps.in_batches(order, train.batch_size))(orders)
    batches = batches.reshape(-1, batches.shape[-1])
    groups, length = _steps.groups(len(batches))
    padding = ((0, groups * length - len(batches)), (0, 0))
    batches = jnp.pad(batches, padding, constant_values=train.count)
    return _steps.scan_again(group, state, batches.reshape(groups, length, -1))
