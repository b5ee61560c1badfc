r"""Simple attributions, made of the same parts: gradient similarity, TracIn, RelatIF, TRAK.

The gradient dot product is `Influence(objective, params, Identity(params))`; the others are a few lines each.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from . import _reprs, tree
from ._mesh import compiled
from ._sound import Watch, look
from ._typing import Array, LossFunction, PyTree
from .batching import as_batch, check_finite
from .curvature import Identity
from .curvature.projected import Projected
from .influence import Influence
from .objective import Objective, as_objective
from .projections import Projection
from .projections.base import check_projection
from .solvers.damping import check_number

__all__ = ["cosine", "negative_margin", "over_checkpoints", "relative", "tracin", "trak"]

# Trees, or functions that read one, in an iterable; or one tree with leaves (T, *leaf).
Checkpoints: TypeAlias = Any


def cosine(influence: Influence, query: PyTree, train: PyTree) -> Array:
    r"""Scores of gradients of unit length, $s_{qi} / \sqrt{s_{qq}\,s_{ii}}$ with lengths measured by P.

    Of an influence with `Identity` the cosine of the two gradients.

    Args:
      influence: Objective, parameters and P.
      query: Leaves `(Q, ...)`.
      train: Leaves `(N, ...)`.

    Returns:
      `(Q, N)`, in [-1, 1]; NaN where a self-influence is not positive.

    Raises:
      TypeError, ValueError: As `Influence.influences`.

    Example:
      >>> import influence_jax as ij
      >>> f, params = lambda params, z: params["w"] @ z, {"w": jnp.ones(2)}
      >>> influence = ij.Influence(f, params, ij.Identity(params))
      >>> ij.baselines.cosine(influence, jnp.array([[2.0, 0.0]]), jnp.array([[5.0, 0.0], [-1.0, 0.0]])).tolist()
      [[1.0, -1.0]]

    Reference: Charpiat et al. 2019, "Input similarity from the neural network perspective".
    """
    _check_influence(influence)
    asked = dataclasses.replace(influence, objective=influence.asked, measurement=None)
    return relative(influence, query, train) / _lengths(asked, query)[:, None]


def relative(influence: Influence, query: PyTree, train: PyTree) -> Array:
    r"""l-RelatIF: scores relative to how much an example's own loss is affected, $s_{qi} / \sqrt{s_{ii}}$.

    Args:
      influence: Objective, parameters and P.
      query: Leaves `(Q, ...)`.
      train: Leaves `(N, ...)`.

    Returns:
      `(Q, N)`; NaN where a self-influence is not positive.

    Raises:
      TypeError, ValueError: As `Influence.influences`.

    Example:
      >>> import influence_jax as ij
      >>> f, params = lambda params, z: params["w"] * z, {"w": jnp.array(1.0)}
      >>> influence = ij.Influence(f, params, ij.Identity(params))
      >>> ij.baselines.relative(influence, jnp.array([2.0]), jnp.array([1.0, 10.0])).tolist()
      [[2.0, 2.0]]

    Reference: Barshan et al. 2020, arXiv:2003.11630, whose other, theta-RelatIF, divides by the length of P g_i.
    """
    _check_influence(influence)
    return influence.influences(query, train) / _lengths(influence, train)[None]


def _check_influence(influence: Any) -> None:
    if not isinstance(influence, Influence):
        raise TypeError(f"influence: got a {type(influence).__name__}, expected an Influence(objective, params, P)")


def _lengths(influence: Influence, batch: PyTree) -> Array:
    squares = influence.self_influences_untold(as_batch(batch, "batch"))
    return jnp.sqrt(jnp.where(squares > 0, squares, jnp.nan))


def over_checkpoints(
    scores: Callable[[PyTree], Array],
    checkpoints: Checkpoints,
    weights: Sequence[float] | Array | np.ndarray | None = None,
) -> Array:
    r"""Scores at several parameters put together, $\sum_t \eta_t\, s(\theta_t)$, or their mean.

    For ensembles of models trained from other seeds, and for checkpoints of one training.  They are read one at a time,
    and none is kept.  What else a checkpoint holds, such as batch statistics, the function has to take from it.

    Args:
      scores: Function of parameters, e.g. `lambda params: influence_at(params).influences(query, train)`.
      checkpoints: Trees of parameters, or functions without arguments that read one, in a list, a tuple or another
        iterable; or one tree with leaves `(T, *leaf)`, which is no list or tuple itself.
      weights: $\eta_t$, T numbers; the mean if None.

    Returns:
      What the function returns, put together.

    Raises:
      TypeError: If `checkpoints` is nothing of that kind.
      ValueError: If there are no checkpoints, or not as many weights, or a tuple can be read in both ways.

    Example:
      >>> import influence_jax as ij
      >>> ij.baselines.over_checkpoints(lambda params: params["w"] ** 2, {"w": jnp.array([1.0, 3.0])}).item()
      5.0
      >>> read = lambda step: {"w": jnp.array(float(step))}  # of a disk
      >>> checkpoints = (read(step) for step in (1, 3))
      >>> ij.baselines.over_checkpoints(lambda params: params["w"] ** 2, checkpoints).item()
      5.0
    """
    if not callable(scores):
        raise TypeError(f"scores: got a {type(scores).__name__}, expected a function of parameters")
    items = _as_items(checkpoints, "checkpoints")
    _check_one_reading(checkpoints, scores)
    shares = None if weights is None else _as_shares(weights, "weights", _length(items))
    total, count = _sum_over(scores, items, shares, "weights")
    return total / count if weights is None else total


def tracin(
    objective: Objective | LossFunction,
    checkpoints: Checkpoints,
    learning_rates: Sequence[float] | Array | float | Callable[[int], Any],
    query: PyTree,
    train: PyTree,
    *,
    steps: Sequence[int] | None = None,
    constants: Any = None,
) -> Array:
    r"""TracIn, $\sum_t \eta_t\,\nabla f_q(\theta_t)^\top\nabla\ell_i(\theta_t)$ over checkpoints of a training.

    Checkpoints are read one at a time, and none is kept: with orbax, `[lambda t=t: checkpointer.restore(folder / t) for
    t in names]`.  Their leaves are matched with those of the first by their paths.

    Args:
      objective: Loss of one example.
      checkpoints: Parameters of the training as it went: trees, or functions without arguments that read one, in a
        list, a tuple or another iterable; or one tree with leaves `(T, *leaf)`, which is no list or tuple itself.
      learning_rates: $\eta_t$, T numbers, or one for all, or a schedule of optax, with `steps`; one that a checkpoint
        stands for k steps of, times k.
      query: Leaves `(Q, ...)`.
      train: Leaves `(N, ...)`.
      steps: At which step of the schedule each checkpoint was taken.
      constants: Where the objective holds constants, such as the running statistics of batch norm, those of each
        checkpoint, in the same forms as the checkpoints; or one tree, or `"shared"` for the objective's own, for all.

    Returns:
      `(Q, N)`; positive is helpful.

    Raises:
      TypeError, ValueError: As `Influence`, and if there are not as many learning rates or constants as checkpoints, or
        a tuple can be read in both ways, or constants are not said to be shared.

    Example:
      >>> import influence_jax as ij
      >>> f = lambda params, z: 0.5 * (params["w"] - z) ** 2
      >>> checkpoints = {"w": jnp.array([0.0, 1.0])}
      >>> ij.baselines.tracin(f, checkpoints, [1.0, 0.5], jnp.array([2.0]), jnp.array([2.0, 0.0])).tolist()
      [[4.5, -0.5]]

    Reference: Pruthi et al. 2020, arXiv:2002.08484, eq. 1.
    """
    objective = as_objective(objective)
    items = _as_items(checkpoints, "checkpoints")
    count = _length(items)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), as_batch(train, "train"))
    loss = lambda params: jax.eval_shape(objective, params, one)
    _check_one_reading(checkpoints, loss)
    _check_stack(items, checkpoints, learning_rates, loss)
    rates = _as_rates(learning_rates, steps, count)
    given = _constants_of(objective, constants, count)
    held, numbers, first = iter(given), itertools.count(), None

    def at(params: PyTree) -> Array:
        nonlocal first
        first = tree.form(params) if first is None else first
        params = first.matched(params, f"checkpoints[{next(numbers)}]", "the first checkpoint")
        own = next(held, _END)
        if own is _END:
            raise ValueError("constants: got fewer trees than checkpoints, expected one for each")
        theirs = isinstance(objective, Objective) and own is not None
        here = dataclasses.replace(objective, constants=own) if theirs else objective
        return Influence(here, params, Identity(params)).influences(query, train)

    total, _ = _sum_over(at, items, rates, "learning_rates")
    if not isinstance(given, itertools.repeat) and next(held, _END) is not _END:
        raise ValueError("constants: got more trees than checkpoints, expected one for each")
    return total


_END = object()


def _sum_over(
    scores: Callable[[PyTree], Array], items: Iterable[Any], shares: Iterable[float] | None, name: str
) -> tuple[Array, int]:
    """Return the weighted sum of scores over the items, and how many these are; no item is held when one is read."""
    iterator, weights = iter(items), itertools.repeat(1.0) if shares is None else iter(shares)
    total, count = None, 0
    while (item := next(iterator, _END)) is not _END:
        share = next(weights, None)
        if share is None:
            raise ValueError(f"{name}: got {count} numbers, expected one for each checkpoint, of which there are more")
        item = _read(item)
        part = scores(item)
        del item
        part = part if shares is None else share * part
        total, count = part if total is None else total + part, count + 1
        jax.block_until_ready(total)  # the program that runs holds the parameters as well
    if total is None:
        raise ValueError("checkpoints: got none, expected at least one tree of parameters")
    if shares is not None and not isinstance(shares, itertools.repeat) and next(weights, None) is not None:
        raise ValueError(
            f"{name}: got more numbers than checkpoints, of which there are {count}; expected one for each"
        )
    return total, count


def _read(item: Any) -> PyTree:
    """Return a tree, or what a function returns that stands for one."""
    return item() if _is_function(item) else item


def _is_function(item: Any) -> bool:
    return callable(item) and jax.tree_util.all_leaves([item])


class _Rows(Sequence):
    """The trees whose leaves are the rows of those of a stack, made when they are asked for."""

    def __init__(self, stack: PyTree, count: int) -> None:
        self._stack, self._count = stack, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> PyTree:
        if not 0 <= number < self._count:
            raise IndexError(number)
        return jax.tree.map(lambda x: x[number], self._stack)


def _as_items(given: Any, name: str) -> Iterable[Any]:
    """Return the trees that were given, one after another or as the rows of a stack."""
    is_tree = hasattr(given, "dtype") or not jax.tree_util.all_leaves([given])
    if isinstance(given, list | tuple) and not hasattr(given, "_fields"):
        return given
    if not is_tree and isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping):
        return given
    if not is_tree:
        raise TypeError(
            f"{name}: got a {type(given).__name__}, expected trees, or functions that read one, in a list or another "
            "iterable, or one tree with leaves (T, *leaf)"
        )
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(given)}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            f"{name}: got leaves of leading axes {sorted(lengths)}, expected a list of trees, or one tree with leaves "
            "(T, *leaf), as Training.checkpoints returns; of a dict by step, give list(checkpoints.values())"
        )
    return _Rows(given, lengths.pop()[0])


def _length(items: Iterable[Any]) -> int | None:
    """Return how many there are, None if that is not known before all are read."""
    return len(items) if isinstance(items, Sized) else None


def _check_one_reading(checkpoints: Any, scores: Callable[[PyTree], Any]) -> None:
    """Raise if a sequence is one of checkpoints and the stacked leaves of parameters that are a sequence as well.

    Of lists those of bare arrays: a list of other trees is one of checkpoints.
    """
    bare = isinstance(checkpoints, list) and all(hasattr(item, "dtype") for item in checkpoints)
    if not (bare or isinstance(checkpoints, tuple)) or hasattr(checkpoints, "_fields"):
        return
    lengths = {jnp.shape(leaf)[:1] if hasattr(leaf, "dtype") else () for leaf in jax.tree.leaves(checkpoints)}
    if len(lengths) != 1 or () in lengths:
        return
    if not _is_taken(scores, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), checkpoints)):
        return
    kind, way = type(checkpoints).__name__, "functions, [lambda one=one: one for one in checkpoints]"
    raise ValueError(
        f"checkpoints: got a {kind} that is read in two ways, as {len(checkpoints)} checkpoints and as the leaves "
        f"(T, *leaf) of {lengths.pop()[0]}, whose parameters are a {kind}; give a list of "
        f"{way if bare else 'trees, list(checkpoints)'}, or "
        "[jax.tree.map(lambda x: x[t], checkpoints) for t in range(T)]"
    )


def _is_taken(scores: Callable[[PyTree], Any], params: PyTree) -> bool:
    """Tell whether a function takes parameters of these shapes."""
    try:
        jax.eval_shape(scores, params)
    except Exception:  # whatever a user's function makes of what it is not meant for
        return False
    return True


def _check_stack(items: Any, checkpoints: Any, rates: Any, loss: Callable[[PyTree], Any]) -> None:
    """Raise if one tree, with one learning rate for all, may be the parameters themselves and no stack of some."""
    if not isinstance(items, _Rows) or callable(rates) or np.ndim(rates) > 0:
        return
    if _is_taken(loss, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), checkpoints)):
        raise ValueError(
            "checkpoints: got one tree that the objective takes as parameters, expected a list of them or a stack, "
            f"leaves (T, *leaf); of one checkpoint give [params], of a stack of {len(items)} as many learning rates"
        )


def _as_shares(values: Any, name: str, count: int | None) -> list[float]:
    """Return the numbers, checked to be one for each checkpoint as far as it is known how many these are."""
    shares = np.asarray(values)
    expected = (len(shares) if count is None and shares.ndim == 1 else count,)
    if shares.shape != expected:
        raise ValueError(
            f"{name}: got shape {shares.shape}, expected {expected}, one for each checkpoint; checkpoints are a list "
            "of trees, or one tree with leaves (T, *leaf)"
        )
    if shares.dtype.kind not in "iuf" or not np.isfinite(shares).all():
        raise ValueError(f"{name}: got {values}, expected finite numbers")
    return shares.tolist()


def _as_rates(rates: Any, steps: Any, count: int | None) -> Iterable[float]:
    """Return the learning rate of each checkpoint."""
    if callable(rates):
        if steps is None:
            raise ValueError(
                "learning_rates: got a schedule, expected with it steps=, the step that each checkpoint was taken at, "
                "e.g. steps=[0, 100, 200]; or the numbers themselves"
            )
        return _as_shares([np.asarray(rates(step)) for step in _as_steps(steps, count)], "learning_rates", count)
    if steps is not None:
        raise ValueError("steps: given without a schedule; drop them, or pass a schedule as learning_rates")
    if np.ndim(rates) > 0:
        return _as_shares(rates, "learning_rates", count)
    return itertools.repeat(_as_shares([rates], "learning_rates", 1)[0])


def _as_steps(steps: Any, count: int | None) -> list[int]:
    """Return the steps of the checkpoints, checked to be counted from 0."""
    numbers = np.asarray(steps)
    if numbers.ndim != 1 or (count is not None and len(numbers) != count):
        raise ValueError(f"steps: got shape {numbers.shape}, expected ({count or 'T'},), one for each checkpoint")
    if numbers.dtype.kind not in "iu" or (numbers < 0).any():
        raise ValueError(f"steps: got {steps}, expected ints from 0 on")
    return numbers.tolist()


def _constants_of(objective: Any, given: Any, count: int | None) -> Iterable[Any]:
    """Yield the constants of each checkpoint; None where they are the objective's own."""
    own = getattr(objective, "constants", None)
    changing = [name for name, _ in tree.named_leaves(_without_random_state(own))]
    if isinstance(given, str) and given == "shared":
        return itertools.repeat(None)
    if given is None:
        if changing and count != 1:
            raise ValueError(
                f"constants: the objective holds {_reprs.some(changing)}, which training may change, as it does the "
                "running statistics of batch norm, so those of one checkpoint are wrong at the others; pass "
                "constants=[...], a tree for each checkpoint (for from_linen its variables without 'params', for "
                'from_nnx its state without nnx.Param), or constants="shared" if training does not change them'
            )
        return itertools.repeat(None)
    if own is None or isinstance(given, str):
        expected = (
            "none, for the objective holds none" if own is None else 'trees, one for each checkpoint, or "shared"'
        )
        raise TypeError(
            f"constants: got {given if isinstance(given, str) else type(given).__name__}, expected {expected}"
        )
    return _matched_constants(tree.form(own), given, count)


def _matched_constants(form: tree.Form, given: Any, count: int | None) -> Iterable[Any]:
    """Return the constants of each checkpoint, in the form of the objective's."""
    if not isinstance(given, list | tuple) and not tree.is_loader(given):
        try:
            return itertools.repeat(form.matched(given, "constants", "the objective"))
        except (ValueError, TypeError):  # not one tree for all
            pass
    items = given if isinstance(given, list | tuple) else _as_items(given, "constants")
    length = _length(items)
    if None not in (length, count) and length != count:
        raise ValueError(f'constants: got {length} trees, expected {count}, one for each checkpoint; or "shared"')
    match = lambda number, item: form.matched(_read(item), f"constants[{number}]", "the objective")
    return itertools.starmap(match, enumerate(items))


def _without_random_state(constants: PyTree) -> PyTree:
    """Return the constants, without the keys and counters that flax.nnx keeps for dropout."""
    own = lambda node: any(kind.__name__ == "RngState" and "flax" in kind.__module__ for kind in type(node).__mro__)
    return jax.tree.map(lambda node: None if own(node) else node, constants, is_leaf=own)


def trak(
    objective: Objective | LossFunction,
    measurement: Objective | LossFunction,
    params: PyTree,
    train: PyTree,
    projection: Projection,
    damping: float = 0.0,
) -> Influence:
    r"""TRAK's kernel machine as an influence: $P = R\,(R^\top F R + \lambda I)^{-1} R^\top$, asked for the margin.

    F is the mean of $\nabla m_i \nabla m_i^\top$ over the training examples, with m what is asked: the negative margin
    $\log((1 - p) / p)$ of the right label, so that a positive score still helps.  With $\nabla\ell_i = (1 - p_i)\nabla
    m_i$ these are TRAK's scores times N.  An ensemble is a mean over models,
    `over_checkpoints(lambda params: trak(...).influences(query, train), models)`.

    Args:
      objective: Loss of one example, $-\log p$.
      measurement: `f(params, example)`, the negative margin: `negative_margin` of the logits and the label.
      params: Leaves `(*leaf)`.
      train: Leaves `(N, ...)`.
      projection: R, from `influence_jax.projections`; its `dim` is to be below N, or damping positive.
      damping: $\lambda$; 0 as in the paper, where the projection does its work, and a singular kernel is refused.

    Returns:
      An `Influence`.

    Raises:
      TypeError, ValueError: If an argument is not of that form, or the kernel is singular.

    Example:
      >>> import influence_jax as ij
      >>> logits = lambda params, z: jnp.stack([0.0, 1.0]) * (params["w"] @ z["x"])
      >>> f = lambda params, z: jax.nn.logsumexp(logits(params, z)) - logits(params, z)[z["y"]]
      >>> m = lambda params, z: ij.baselines.negative_margin(logits(params, z), z["y"])
      >>> data = {"x": jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), "y": jnp.array([1, 1, 0])}
      >>> params = {"w": jnp.zeros(2)}
      >>> projection = ij.projections.gaussian(params, 2, jax.random.key(0))
      >>> ij.baselines.trak(f, m, params, data, projection).influences(data, data)[0].round(2)
      Array([ 0.75,  0.  , -0.75], dtype=float...)

    Reference: Park et al. 2023, arXiv:2303.14186, eq. 13 and 15, with the mean over models of the whole.
    """
    objective, measurement = as_objective(objective), as_objective(measurement, "measurement")
    params = tree.check_params(params)
    check_number(damping, "damping")
    check_projection(projection)
    rows = projection.project_grads(measurement, params, train)
    watch = Watch(measurement, params, "train", noun="measurement")
    watch.refuses = True
    watch.batch(look(rows, 0)._replace(flat=False), as_batch(train, "train"))
    check_finite(rows, "train, whose gradients of the measurement")
    return Influence(objective, params, Projected(params, projection, _kernel(rows, damping)), measurement=measurement)


def negative_margin(logits: Array, label: Array) -> Array:
    r"""The log-odds against a label, $\log\sum_{j \neq y} e^{o_j} - o_y = \log\frac{1 - p_y}{p_y}$, exact however sure.

    Args:
      logits: `(C,)`.
      label: y, an integer.

    Returns:
      A number; low where the label is likely.

    Example:
      >>> negative_margin(jnp.array([0.0, 40.0]), 1).item()
      -40.0

    Reference: Park et al. 2023, arXiv:2303.14186, section 3.
    """
    own = jnp.arange(logits.shape[-1]) == label
    return jax.nn.logsumexp(jnp.where(own, -jnp.inf, logits)) - logits[label]


def _kernel(rows: Array, damping: float) -> Array:
    kernel, singular = _inverse_of_mean(rows, damping)
    if not isinstance(singular, jax.core.Tracer) and singular:
        raise ValueError(
            f"projection: its kernel of {len(rows)} examples in {rows.shape[1]} dimensions is singular; use a smaller "
            "dim, or a positive damping"
        )
    return kernel


@compiled
def _inverse_of_mean(rows: Array, damping: Array | float) -> tuple[Array, Array]:
    """The damped inverse of the mean of outer products, and whether there is none to the precision of the numbers."""
    mean = jnp.matmul(rows.T, rows, precision=tree.HIGHEST) / len(rows)
    values, vectors = jnp.linalg.eigh(mean + jnp.asarray(damping, mean.dtype) * jnp.eye(len(mean), dtype=mean.dtype))
    singular = values[0] <= len(mean) * jnp.finfo(mean.dtype).eps * values[-1]
    return jnp.matmul(vectors / values[None], vectors.T, precision=tree.HIGHEST), singular
