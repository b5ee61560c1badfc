"""The model contract: what a model predicts for one example, and what that costs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _reprs, tree
from ._one_hot import check_bare, check_labels
from ._pytree import dataclass, set_field, static
from ._typing import Array, Key, PyTree
from ._words import ask, name_of
from .blocks import Block, Frozen, freeze_rest, whole

ONE_EXAMPLE = "it is given ONE example, without a batch axis, and the params in the containers they were passed in"


@dataclass
class Objective:
    r"""The loss of one example, split into prediction and loss.

    $\ell(\theta, z) = \mathrm{loss}(\mathrm{predict}(\theta, z), z)$ for ONE example $z$, without a batch axis.  The
    split is what Gauss-Newton and Fisher need.  Keep regularisers out of it: they belong to the damping.

    The library compiles what it is given, once per function: arrays that a function closes over, or that hang on the
    object whose method it is, are read at the first call and kept.  Put what changes into `params` or `constants`.

    Args:
      predict: `predict(params, example) -> output`, or `predict(params, example, constants)` when constants are given.
        Static: define it once, for a fresh lambda compiles again.
      loss: `loss(output, example) -> scalar`.  Static.
      constants: Pytree of arrays that are not differentiated, e.g. batch statistics.
      sample: How labels are drawn from the model, for `Fisher` and `labels="sampled"` on large outputs:
        `softmax_labels("y")`; or `sample(key, output) -> cotangent`, whose second moment has to be the loss Hessian in
        the output, which is checked on a few examples.  Static.
      frozen: Set by the library on the restriction to a block of parameters: the leaves outside the block.

    Raises:
      TypeError: If `predict` or `loss` is not callable; on a call, if the loss is not a real floating number.
      ValueError: On a call, if the loss is not a scalar, or broadcasts an integer label over the output as if it were
        one-hot.  Wherever losses of data are looked at, if class numbers or tokens are out of range of an array that is
        read at them, and the loss depends on what is read there.

    Example:
      >>> import influence_jax as ij
      >>> objective = ij.Objective(lambda p, z: p["w"] * z["x"], lambda out, z: 0.5 * (out - z["y"]) ** 2)
      >>> float(objective({"w": jnp.array(2.0)}, {"x": jnp.array(3.0), "y": jnp.array(5.0)}))
      0.5
    """

    predict: Callable[..., PyTree] = static()
    loss: Callable[[PyTree, PyTree], Array] = static()
    constants: PyTree = dataclasses.field(default=None, kw_only=True)
    sample: SoftmaxLabels | Callable[[Key, PyTree], PyTree] | None = static(default=None, kw_only=True)
    frozen: Frozen | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name, value in (("predict", self.predict), ("loss", self.loss)):
            if not callable(value):
                raise TypeError(f"{name}: got a {type(value).__name__}, expected a function of one example")
            check_hashable(value, name)
        if self.sample is not None and not isinstance(self.sample, SoftmaxLabels):
            if not callable(self.sample):
                raise TypeError(
                    f"sample: got {self.sample!r}, expected influence_jax.softmax_labels('y'), a function "
                    "(key, output) -> cotangent, or None"
                )
            check_hashable(self.sample, "sample")
        tree.named_leaves(self.constants)  # refuses keys that cannot be sorted
        set_field(self, "constants", jax.tree_util.tree_map_with_path(_as_constant, self.constants))

    def output(self, params: PyTree, example: PyTree) -> PyTree:
        """The model's output for one example at `params`."""
        given = {"params": whole(params, self.frozen), "example": example}
        if self.constants is not None:
            given["constants"] = self.constants
        return ask("predict", self.predict, given, ONE_EXAMPLE)

    def cost(self, output: PyTree, example: PyTree) -> Array:
        """The loss of one `output` on its `example`, checked to be a scalar."""
        check_labels(self.loss, output, example)
        hint = "it is given what predict returned, and ONE example without a batch axis"
        return _scalar(ask("loss", self.loss, {"output": output, "example": example}, hint), self.loss)

    def __call__(self, params: PyTree, example: PyTree) -> Array:
        """The loss of one example."""
        return self.cost(self.output(params, example), example)

    def __repr__(self) -> str:
        constants = "" if self.constants is None else f"constants with {_reprs.entries(self.constants)}"
        return _reprs.call(self, name_of(self.predict), name_of(self.loss), constants)


@dataclasses.dataclass(frozen=True)
class SoftmaxLabels:
    """Labels drawn from a softmax over the last axis of the output; made by `softmax_labels`."""

    label: str | int


def softmax_labels(label: str | int) -> SoftmaxLabels:
    r"""Labels drawn from the model, for losses that are a cross-entropy with any scales.

    For `Objective(predict, loss, sample=softmax_labels("y"))`, which `Fisher` and `labels="sampled"` of `kfac` and
    `ekfac` then use.  At each position t the Hessian of such a loss in the logits is
    $H_t = b_t(\mathrm{diag}(p_t) - p_tp_t^\top)$: sums and means, masks, ignored labels, weights of examples, tokens or
    classes, temperatures, label smoothing, biases of logits and excluded classes all end in $b_t \ge 0$ and in the
    distribution $p_t$.  Both are read off three products of the Hessian of *your* loss, which act on all positions at
    once: from off-diagonal entries $-h_{ij} = b\,p_ip_j$ of its columns j and k, for which likely classes are taken,

    $\frac{p_i}{p_k} = \frac{h_{ij}}{h_{kj}},\quad
    \frac{p_j}{p_k} = \frac{\sum_{i\ne j,k} h_{ij}}{\sum_{i\ne j,k} h_{ik}},\quad b = -\frac{h_{kj}}{p_jp_k}.$

    What is drawn is $u_t = \sqrt{b_t}(p_t - e_{\hat y})$ with $\hat y \sim p_t$, so that $E\,uu^\top = H$: the `GGN`
    of the same loss in expectation.  (The gradient of the loss at a drawn label would have the square of every scale.)
    The first of the products also checks that the Hessian has this form.  Where it has not (squared loss, z-loss,
    positions that depend on each other), a loss is refused in words, and under tracing the result is NaN.

    Args:
      label: The part of the example that holds the integer labels: key, attribute or tuple index.  Logits are
        `(..., C)`, labels `(...)`.

    Returns:
      A frozen, hashable description of the draw.

    Raises:
      TypeError, ValueError: When labels are drawn, if there is no such part, or it does not fit the output.

    Example:
      >>> import influence_jax as ij
      >>> loss = ij.losses.cross_entropy("y", reduction="mean")
      >>> objective = ij.Objective(lambda p, z: p["table"][z["x"]], loss, sample=ij.softmax_labels("y"))
      >>> params, data = {"table": jnp.ones((5, 3))}, {"x": jnp.arange(4)[None], "y": jnp.zeros((1, 4), int)}
      >>> fisher = ij.Fisher(objective, params, data, key=jax.random.key(0), samples=100)
      >>> float(ij.trace(ij.GGN(objective, params, data))), round(float(ij.trace(fisher)), 3)
      (0.6666..., 0.667)

    Reference: Martens 2014, arXiv:1412.1193, section 9.
    """
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise TypeError(f"label: got {label!r}, expected the name of a part of the examples, e.g. 'y'")
    return SoftmaxLabels(label)


def softmax_sample(key: Key, logits: Array) -> Array:
    r"""The gradient of a summed cross-entropy in the logits at labels drawn from the model, $p - e_{\hat y}$.

    For `Objective(..., sample=softmax_sample)` where the loss is just that sum, a label per position: its second moment
    is then the loss Hessian, for which nothing else is computed.  Of another loss it is refused; use `softmax_labels`.

    Args:
      key: Random key.
      logits: `(..., C)`, a label per position.

    Returns:
      `(..., C)`.

    Example:
      >>> softmax_sample(jax.random.key(0), jnp.array([-jnp.inf, 0.0])).tolist()
      [0.0, 0.0]

    Reference: Martens 2014, arXiv:1412.1193, section 9.
    """
    labels = jax.random.categorical(key, logits)
    return jax.nn.softmax(logits) - jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)


@dataclass
class LossOnly:
    """A bare `f(params, example) -> scalar`: enough for gradients, Hessian and empirical Fisher."""

    fn: Callable[[PyTree, PyTree], Array] = static()
    frozen: Frozen | None = None

    def __call__(self, params: PyTree, example: PyTree) -> Array:
        """The loss of one example."""
        given = {"params": whole(params, self.frozen), "example": example}
        check_bare(self.fn, **given)
        return _scalar(ask("objective", self.fn, given, ONE_EXAMPLE), self.fn)

    def __repr__(self) -> str:
        return _reprs.call(self, name_of(self.fn))


def as_objective(objective: Any, name: str = "objective") -> Objective | LossOnly:
    """Wrap a bare loss function; pass an objective through.

    Raises:
      TypeError: If it is neither.
    """
    if isinstance(objective, Objective | LossOnly):
        return objective
    if not callable(objective):
        raise TypeError(
            f"{name}: got a {type(objective).__name__}, expected an Objective or f(params, example) -> scalar"
        )
    if any(base.__module__.startswith("flax.") for base in type(objective).__mro__):
        raise TypeError(
            f"{name}: got a flax module, {type(objective).__name__}, expected an Objective or f(params, example) -> "
            "scalar; influence_jax.from_linen(module, variables, loss) and from_nnx(module, loss) make one of it"
        )
    check_hashable(objective, name)
    return LossOnly(objective)


def constants_of(objective: Any) -> tuple[PyTree, ...]:
    """Return the constants of an objective, alone in a tuple; an empty one where it has none."""
    constants = getattr(objective, "constants", None)
    return () if constants is None else (constants,)


def floating_output(objective: Objective, params: PyTree, example: PyTree) -> PyTree:
    """The model's output for one example, checked to be floating."""
    out = objective.output(params, example)
    for path, leaf in tree.named_leaves(out):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"predict: leaf '{path}' of the output is {jnp.result_type(leaf)}, expected floating outputs only, for "
                "GGN and Fisher differentiate the loss in all of them"
            )
    return out


def on_block(
    objective: Objective | LossOnly, params: PyTree, block: Block
) -> tuple[Objective | LossOnly, dict[str, Array]]:
    """The same loss as a function of one block of the parameters, a flat dict, and that block."""
    chosen, frozen = freeze_rest(params, block, objective.frozen)
    return dataclasses.replace(objective, frozen=frozen), chosen


def _as_constant(path: tuple, leaf: Any) -> Array:
    """Return a leaf of the constants as a JAX array, or raise TypeError."""
    what = f"constants: leaf '{tree.path_name(path)}'"
    if isinstance(leaf, int | float | complex):
        return jnp.asarray(leaf)
    leaf = tree.read(leaf, what)
    if not hasattr(leaf, "dtype"):
        raise TypeError(f"{what} is {leaf!r}, expected an array; put what is none into the function")
    if isinstance(leaf, np.ndarray) and not tree.is_number(leaf.dtype):
        raise TypeError(f"{what} has dtype {leaf.dtype}, expected numbers or booleans; encode it first")
    if tree.is_float64_lost(leaf):
        raise TypeError(f"{what} is float64 but 64-bit mode is off; cast it to float32")
    return jnp.asarray(leaf)


def check_hashable(fn: Callable, name: str) -> None:
    """Raise unless a function can be a static part of a program."""
    try:
        hash(fn)
    except TypeError as error:
        raise TypeError(
            f"{name}: {name_of(fn)} cannot be hashed ({error}), but is a static part of the program; pass a function "
            "or a frozen dataclass with __call__, and put arrays into constants"
        ) from None


def _scalar(value: Any, fn: Callable) -> Array:
    if value is None or isinstance(value, str | dict | list | tuple):
        raise TypeError(f"loss: {name_of(fn)} returned a {type(value).__name__} for one example, expected a scalar")
    value = jnp.asarray(value)
    if value.shape != ():
        raise ValueError(
            f"loss: {name_of(fn)} returned shape {value.shape} for one example, expected a scalar; reduce it over "
            "outputs (mean or sum), and do not include a batch axis: examples are vmapped"
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"loss: {name_of(fn)} returned {value.dtype}, expected a real floating number")
    return value


def get_field(example: PyTree, name: str | int, argument: str) -> PyTree:
    """The part of an example called `name`: a key, an attribute or a tuple index.

    Raises:
      ValueError: If there is no such part; the message lists what there is.
    """
    parts = _parts(example)
    if not parts:
        raise ValueError(
            f"{argument}: got {name!r}, but an example is {type(example).__name__} without named parts; make the batch "
            f"a Batch(x, y), or a dict such as {{{name!r}: batch}}"
        )
    if not isinstance(name, str | int) or name not in parts:
        places = f"; the parts of a tuple are numbered, {argument}=0" if isinstance(example, tuple | list) else ""
        raise ValueError(f"{argument}: got {name!r}, expected one of {list(parts)}, the parts of an example{places}")
    return parts[name]


def replace_field(example: PyTree, name: str | int, value: PyTree) -> PyTree:
    """A copy of the example with one part replaced; no constructor runs."""
    if isinstance(example, MutableMapping):
        changed = copy.copy(example)
        changed[name] = value
        return changed
    if isinstance(example, Mapping):
        return type(example)({**example, name: value})  # type: ignore[call-arg]
    if dataclasses.is_dataclass(example):
        changed = copy.copy(example)
        object.__setattr__(changed, str(name), value)
        return changed
    index = example._fields.index(name) if isinstance(name, str) else name
    parts = [value if i == index else part for i, part in enumerate(example)]
    return type(example)(*parts) if hasattr(example, "_fields") else type(example)(parts)


def _parts(example: PyTree) -> dict[str | int, PyTree]:
    if isinstance(example, Mapping):
        return dict(example)
    if dataclasses.is_dataclass(example):
        return {field.name: getattr(example, field.name) for field in dataclasses.fields(example)}
    if isinstance(example, tuple | list):
        return {**dict(enumerate(example)), **dict(zip(getattr(example, "_fields", ()), example, strict=False))}
    return {}
