r"""Labels drawn from the model: loss gradients whose second moment is the loss Hessian in the output.

For `softmax_labels` they follow from the loss itself; a `sample` function of the user's is checked against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .. import tree
from .._mesh import compiled
from .._typing import Array, Key, PyTree
from .._words import ask, name_of
from ..batching import take
from ..objective import Objective, SoftmaxLabels, floating_output, get_field
from .convexity import is_at_hand
from .masks import Mask, Named, kept_output
from .outputs import hessian_product

# How far the loss Hessian may be from b (diag(p) - p p^T), relative to its own product with a probe.
FORM_TOLERANCE = 3e-4
# Beside rounding, in units of the dtype's epsilon: what is left of a confident prediction's Hessian is rounding.
FORM_ROUNDING = 1000
# Examples of the data that a sample is checked on, and entries that its draws may have on each.
CHECKED, DRAWN_ENTRIES = 8, 2**21
# Random directions in which second moments are compared, and how far off they have to be: in standard errors, and
# relative to what they should be.
PROBES, STANDARD_ERRORS, OFF = 16, 7.0, 0.1


class Softmax(NamedTuple):
    r"""A loss Hessian of the form $b_t(\mathrm{diag}(p_t) - p_tp_t^\top)$ at each position.

    Attributes:
      p: `(..., C)`.
      scale: b, `(...)`.
      fits: Whether the Hessian is of that form, ().
    """

    p: Array
    scale: Array
    fits: Array


def softmax_cotangents(objective: Objective, sample: SoftmaxLabels, out: PyTree, example: PyTree, key: Key) -> Array:
    r"""$u = \sqrt b\,(p - e_{\hat y})$ at a label drawn for each position, `(S, outputs)`; `key` is `(S,)`.

    NaN where the loss has no Hessian of that form.
    """
    found = softmax_of(objective, sample, out, example)
    draw = lambda one: jax.random.categorical(one, lax.stop_gradient(jnp.log(found.p)))
    drawn = jax.nn.one_hot(jax.vmap(draw)(key), found.p.shape[-1], dtype=found.p.dtype)
    root = jnp.where(found.scale > 0, jnp.sqrt(jnp.where(found.scale > 0, found.scale, 1)), 0)
    cotangents = root[None, ..., None] * (found.p[None] - drawn)
    return jnp.where(found.fits, cotangents, jnp.nan).reshape(len(key), -1)


def softmax_of(objective: Objective, sample: SoftmaxLabels, out: PyTree, example: PyTree) -> Softmax:
    """What the loss Hessian is made of, from its products; see `softmax_labels` for the algebra."""
    logits = tree.promote(_logits(sample, out, example))
    structure = jax.tree.structure(out)
    product_at = lambda x: _leaf_product(hessian_product(objective, example, structure.unflatten([x])), structure)
    product = product_at(logits)
    # Far from zero on average, so that what is not zero on constants, as all Hessians of the form are, shows.
    probe = 10 + jax.random.normal(jax.random.key(0), logits.shape, logits.dtype)
    image = product(probe)
    column = lambda which: jax.nn.one_hot(which, logits.shape[-1], dtype=logits.dtype)
    off_diagonal = lambda at: jnp.where(at > 0, 0, jnp.maximum(-product(at), 0))
    at_j = column(jnp.argmax(jnp.abs(image), axis=-1))
    by_j = off_diagonal(at_j)  # b p_j p_i
    at_k = column(jnp.argmax(by_j, axis=-1))
    by_k = off_diagonal(at_k)  # b p_k p_i
    others = 1 - at_j - at_k
    jk = jnp.sum(by_j * at_k, axis=-1, keepdims=True)
    ratio = _quotient(jnp.sum(by_j * others, -1, keepdims=True), jnp.sum(by_k * others, -1, keepdims=True))
    # Of two classes alone only the product of their probabilities matters, so that they may as well be equal.
    relative = at_j * jnp.where(ratio > 0, ratio, 1) + jnp.where(jk > 0, _quotient(by_j, jk), at_k)
    p = relative / jnp.sum(relative, axis=-1, keepdims=True)
    scale = _quotient(jk, jnp.sum(p * at_j, -1, keepdims=True) * jnp.sum(p * at_k, -1, keepdims=True))
    centred = p * (probe - jnp.sum(p * probe, axis=-1, keepdims=True))
    fits = _fits(image, scale * centred, product_at(jnp.zeros_like(logits))(probe))
    return Softmax(p, scale[..., 0], fits)


def _fits(image: Array, model: Array, unsure: Array) -> Array:
    """Whether the Hessian's product with the probe is what the form says.

    Up to rounding of the terms that cancel in it, whose size shows where all classes are equally likely.
    """
    unsure = jnp.linalg.norm(jnp.where(jnp.isfinite(unsure), unsure, 0))
    rounding = FORM_ROUNDING * jnp.finfo(image.dtype).eps * image.shape[-1] ** 0.5 * unsure
    off = jnp.linalg.norm(image - model)
    return off <= FORM_TOLERANCE * jnp.linalg.norm(image) + rounding


def _quotient(above: Array, below: Array) -> Array:
    """Zero where there is nothing to divide by, in value and in derivative."""
    return jnp.where(below > 0, above / jnp.where(below > 0, below, 1), 0)


def _leaf_product(product: Callable[[PyTree], PyTree], structure: Any) -> Callable[[Array], Array]:
    """The product as a map of the output's only leaf."""
    return lambda v: jax.tree.leaves(product(structure.unflatten([v])))[0]


def _logits(sample: SoftmaxLabels, out: PyTree, example: PyTree) -> Array:
    """The output's only leaf, checked against the labels."""
    leaves = tree.named_leaves(out)
    if len(leaves) != 1 or leaves[0][1].ndim == 0:
        got = ", ".join(f"{path or 'array'} {leaf.shape}" for path, leaf in leaves)
        raise ValueError(
            f"sample: softmax_labels({sample.label!r}) got an output of {got}, expected logits (..., C) alone; let "
            "predict return the logits, and what else the loss needs as a part of the example or in constants"
        )
    labels, logits = get_field(example, sample.label, "sample"), leaves[0][1]
    if len(jax.tree.leaves(labels)) != 1 or not hasattr(labels, "dtype"):
        raise TypeError(f"sample: part {sample.label!r} of the example is no array, expected integer labels")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"sample: part {sample.label!r} of the example is {labels.dtype}, expected integer labels, one per position"
        )
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"sample: part {sample.label!r} of one example has shape {labels.shape}, but the output {logits.shape}, "
            f"expected labels {logits.shape[:-1]}, one per position of the logits"
        )
    return logits


def checked_cotangent(sample: Callable[[Key, PyTree], PyTree], key: Key, out: PyTree) -> PyTree:
    """What a sample function draws, if it is shaped like the output.

    Raises:
      TypeError, ValueError: If it is not, or the function fails.
    """
    hint = "it returns the gradient of the loss in the output of ONE example at a drawn label"
    drawn = ask("sample", sample, {"key": key, "output": out}, hint)
    try:
        tree.check_vector(drawn, out, "sample")
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{error}; sample(key, output) has to return the gradient of the loss in the output at a drawn label, "
            "shaped like the output; for cross-entropy pass sample=influence_jax.softmax_labels('y')"
        ) from None
    return drawn


def check_sample(
    objective: Objective,
    params: PyTree,
    data: PyTree,
    weights: Array | np.ndarray | None = None,
    mask: Mask | Named | None = None,
) -> Array | None:
    """Raise, on the host, if what an objective draws does not have the loss Hessian for its second moment.

    Looks at a few examples of the data that weigh something.  Under tracing nothing can be raised: whether what a
    function draws is right there is returned, () bool, for what comes of it to be NaN if not; None where it is known.

    Raises:
      ValueError: If it has not.
    """
    if objective.sample is None:
        return None
    if not is_at_hand((objective, params, data, weights)):
        traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((objective, params, data, weights)))
        if isinstance(objective.sample, SoftmaxLabels) or not traced:  # softmax labels are NaN by themselves
            return None
        return _is_right(*lax.stop_gradient((objective, params, data, weights)), mask)
    counted = np.arange(tree.count(data)) if weights is None else np.flatnonzero(np.asarray(weights))
    if len(counted):
        places = counted[np.unique(np.linspace(0, len(counted) - 1, CHECKED).astype(int))]
        with jax.ensure_compile_time_eval():  # under jit, too, what is concrete is looked at now
            _check_on(objective, params, take(data, places.astype(np.int32)), places, mask)
    return None


def _is_right(
    objective: Objective,
    params: PyTree,
    data: PyTree,
    weights: Array | np.ndarray | None,
    mask: Mask | Named | None,
) -> Array:
    """Tell, inside of a program, whether a function draws the loss Hessian, at the examples that the host looks at."""
    count = tree.count(data)
    weighing, number = jnp.arange(count), jnp.asarray(count)
    if weights is not None:
        weighing, number = jnp.argsort(jnp.asarray(weights) == 0, stable=True), jnp.sum(jnp.asarray(weights) != 0)
    spread = jnp.linspace(0, number - 1, min(CHECKED, count)).astype(jnp.int32)
    few = take(data, weighing[jnp.maximum(spread, 0)])
    return ~_moments(objective, params, few, jax.random.key(0), mask)[0]


def _check_on(objective: Objective, params: PyTree, few: PyTree, places: np.ndarray, mask: Mask | Named | None) -> None:
    """Raise if what is drawn at these examples does not have the loss Hessian for its second moment."""
    if isinstance(objective.sample, SoftmaxLabels):
        why = why_no_softmax(objective, params, few, None, places)
        if why:
            raise ValueError(
                f"sample: softmax_labels is for losses whose Hessian in the logits is b (diag(p) - p p^T) at each "
                f"position, as of cross-entropy with masks, weights, temperatures or smoothing; {why}; leave terms of "
                "another form (squares, focal factors, z-loss) out of the objective, give a sample(key, output) of "
                "your own, or pass labels='empirical'"
            )
        return
    off, elsewhere, ratio = _moments(objective, params, few, jax.random.key(0), mask)
    if off:
        raise ValueError(_not_the_hessian(objective, bool(elsewhere), float(ratio)))


def why_no_softmax(
    objective: Objective,
    params: PyTree,
    data: PyTree,
    weights: Array | np.ndarray | None,
    places: np.ndarray | None = None,
) -> str:
    """Name the first example whose loss Hessian is not that of softmax labels; empty if there is none."""
    if not isinstance(objective.sample, SoftmaxLabels):
        return ""
    off = ~np.asarray(_forms(objective, params, data)) & (True if weights is None else np.asarray(weights) != 0)
    if not off.any():
        return ""
    first = int(np.argmax(off))
    place = first if places is None else places[first]
    return f"that of the loss {name_of(objective.loss)} at example {place} is not, or is negative or not finite"


def _not_the_hessian(objective: Objective, elsewhere: bool, ratio: float) -> str:
    found = (
        "it is not zero where the loss has no curvature, as at masked positions"
        if elsewhere
        else f"it is {ratio:.3g} times that"
    )
    return (
        f"sample: {name_of(objective.sample)} draws cotangents whose second moment is not the Hessian of the loss "
        f"{name_of(objective.loss)} in the output: {found}; for cross-entropy pass "
        "sample=influence_jax.softmax_labels('y'), which sees means, masks and weights in the loss, or scale what is "
        "drawn by the square roots of these; the mask= of a fit leaves out positions"
    )


@compiled
def _forms(objective: Objective, params: PyTree, data: PyTree) -> Array:
    """Of every example, whether its loss Hessian is that of softmax labels."""

    def one(example: PyTree) -> Array:
        sample = cast(SoftmaxLabels, objective.sample)
        return softmax_of(objective, sample, floating_output(objective, params, example), example).fits

    return lax.map(one, data)


class _Compared(NamedTuple):
    """Second moments beside the Hessian at one output."""

    elsewhere: Array  # whether they are not zero where the Hessian is
    ratio: Array  # the worst that is off, else that of all
    high: Array
    low: Array
    close: Array  # whether they are known to be alike


@partial(compiled, static_argnames="mask")
def _moments(
    objective: Objective, params: PyTree, data: PyTree, key: Key, mask: Mask | Named | None
) -> tuple[Array, Array, Array]:
    """Compare draws with the loss Hessian, at the outputs of the data and at the same outputs shrunk.

    Shrunk, because a confident model hardly ever draws another label, so that nothing can be told from its draws, and
    right samples are right at every output.  A sample that is known to be right at the outputs themselves is right: of
    other kinds of outputs, as probabilities, shrunk ones may make no sense.
    """

    def one(example: PyTree) -> _Compared:
        out = tree.promote(floating_output(objective, params, example))
        largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(out)]))
        shrunk = tree.scale(1 / jnp.maximum(largest, 1), out)
        both = jax.tree.map(lambda a, b: jnp.stack([a, b]), out, shrunk)
        return lax.map(partial(_compare, objective, mask, example, key), both)

    size = tree.size(jax.eval_shape(partial(floating_output, objective, params), _first(data)))
    found = lax.map(one, jax.tree.map(lambda x: x[: max(1, 8 * DRAWN_ENTRIES // size)], data))
    at, small = (jax.tree.map(lambda x, i=i: x[:, i], found) for i in (0, 1))
    off = at.high | ((small.high | small.low) & ~at.close)
    distance = jnp.where(off, jnp.abs(jnp.where(small.high | small.low, small.ratio, at.ratio) - 1), -1)
    worst = jnp.argmax(distance)
    ratio = jnp.where(small.high | small.low, small.ratio, at.ratio)[worst]
    return jnp.any(off | small.elsewhere), jnp.any(small.elsewhere), ratio


def _first(data: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), data)


def _compare(objective: Objective, mask: Mask | Named | None, example: PyTree, key: Key, out: PyTree) -> _Compared:
    """Compare the squares of draws along random directions with the Hessian's quadratic form."""
    sample = cast(Callable[[Key, PyTree], PyTree], objective.sample)
    size, flat = tree.size(out), lambda x: tree.flatten(tree.promote(x), out)
    product, probes = hessian_product(objective, example, out), _probes(out)
    images = lax.map(lambda v: flat(product(tree.unflatten(v, out))), probes)

    def drawn(one: Key) -> tuple[Array, Array]:
        vector = flat(kept_output(mask, checked_cotangent(sample, one, out), example))
        return jnp.square(jnp.matmul(probes, vector, precision=tree.HIGHEST)), jnp.square(vector)

    keys = jax.random.split(key, max(8, min(4096, DRAWN_ENTRIES // size)))
    along, squares = lax.map(drawn, keys, batch_size=max(1, min(64, DRAWN_ENTRIES // size)))
    squares = jnp.mean(squares, axis=0)
    nowhere = jnp.all(images[: len(probes) // 2] == 0, axis=0)
    elsewhere = jnp.sum(jnp.where(nowhere, squares, 0)) > 1e-4 * jnp.sum(squares)
    return _judged(along, jnp.sum(probes * images, axis=1), elsewhere)


def _judged(along: Array, expected: Array, elsewhere: Array) -> _Compared:
    """Judge squares `(draws, probes)` against what they should be on average, each direction and all global ones.

    By the standard error of the draws; a direction in which the Hessian is next to nothing tells nothing.
    """
    largest = jnp.max(jnp.abs(expected))
    known, expected = (jnp.abs(expected) > 1e-3 * largest)[None], expected[None]
    ratios = jnp.where(known, along / jnp.where(known, expected, 1), 1.0)
    whole = jnp.mean(ratios[:, : ratios.shape[1] // 2], axis=1, keepdims=True)
    ratios = jnp.concatenate([whole, ratios], axis=1)
    mean = jnp.mean(ratios, axis=0)
    error = jnp.std(ratios, axis=0) / ratios.shape[0] ** 0.5
    sure = jnp.abs(mean - 1) > jnp.maximum(OFF, STANDARD_ERRORS * error)
    worst = mean[jnp.argmax(jnp.where(sure, jnp.abs(mean - 1), -1))]
    close = (jnp.abs(mean[0] - 1) < OFF) & (STANDARD_ERRORS * error[0] < 1)
    high = jnp.any(sure & ((mean > 1) | (mean < 0)))
    return _Compared(elsewhere, jnp.where(jnp.any(sure), worst, mean[0]), high, jnp.any(sure & (mean < 1)), close)


def _probes(out: PyTree) -> Array:
    """Random signs: half of the rows everywhere, half of them at one place of the leading axes of one leaf."""
    leaves, count = jax.tree.leaves(out), PROBES if tree.size(out) <= DRAWN_ENTRIES else 4
    size = sum(leaf.size for leaf in leaves)
    places = np.concatenate([[0], np.cumsum([math.prod(leaf.shape[:-1]) for leaf in leaves])])
    place_of = [
        np.broadcast_to((start + np.arange(math.prod(leaf.shape[:-1])))[:, None], (math.prod(leaf.shape[:-1]), width))
        for start, leaf in zip(places, leaves, strict=False)
        for width in [leaf.shape[-1] if leaf.ndim else 1]
    ]
    key_signs, key_places = jax.random.split(jax.random.key(1))
    dtype = tree.accumulation_dtype(*(leaf.dtype for leaf in leaves))
    signs = jax.random.rademacher(key_signs, (count, size), dtype)
    chosen = jax.random.randint(key_places, (count, 1), 0, int(places[-1]))
    local = jnp.concatenate([jnp.asarray(x).ravel() for x in place_of])[None] == chosen
    return jnp.where((jnp.arange(count) < count // 2)[:, None] | local, signs, 0)
