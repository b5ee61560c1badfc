r"""Losses of one example that check themselves: dtype and shape of labels when traced, their range by value.

| loss | output | labels |
|---|---|---|
| `cross_entropy` | logits `(..., C)` | integers `(...)` in [0, C) |
| `squared_error` | predictions `(...)` | numbers `(...)` |
| `binary_cross_entropy` | logits `(...)` | `(...)`, booleans, 0 and 1, or probabilities |

Each is a frozen dataclass, equal and hashed by its settings, with `loss(output, example) -> scalar`, and convex in the
output, which it says of itself: a `GGN` of it is positive semi-definite, whatever the data.  Nothing broadcasts.  A
label out of range that is not masked makes the loss of its example NaN, and so its scores.  The loss is computed in
float32 or wider.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from . import tree
from ._typing import Array, PyTree
from .objective import get_field

__all__ = ["binary_cross_entropy", "cross_entropy", "squared_error"]

REDUCTIONS = ("sum", "mean")


@dataclasses.dataclass(frozen=True, repr=False)
class Loss:
    """What the losses have in common: where labels are, which count, and how entries are reduced."""

    convex: ClassVar[bool] = True
    applies: ClassVar[str] = ""  # what it does to the output itself
    made_by: ClassVar[str] = "Loss"

    label: str | int
    mask: str | int | None = None
    reduction: str = "sum"

    def __post_init__(self) -> None:
        for name in ("label", "mask"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, str | int | (type(None) if name == "mask" else str)):
                raise TypeError(f"{name}: got {value!r}, expected the name of a part of the examples, e.g. 'y'")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction: got {self.reduction!r}, expected one of {list(REDUCTIONS)}")

    def __repr__(self) -> str:
        settings = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self)[1:] if getattr(self, f.name) != f.default
        }
        return f"{self.made_by}({', '.join([repr(self.label), *(f'{k}={v!r}' for k, v in settings.items())])})"

    def _labels(self, output: PyTree, example: PyTree, shape: tuple[int, ...]) -> Array:
        """The labels, checked to be one array of that shape."""
        labels = get_field(example, self.label, "label")
        if len(jax.tree.leaves(labels)) != 1 or not hasattr(labels, "dtype"):
            raise TypeError(f"label: part {self.label!r} of the example is no array, expected labels {shape}")
        if labels.shape != shape:
            raise ValueError(
                f"label: part {self.label!r} of one example has shape {labels.shape}, expected {shape} for an output "
                f"{output.shape}; labels do not broadcast"
            )
        return labels

    def _counted(self, example: PyTree, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """Which entries the mask leaves in, and which of its values are neither 0 nor 1."""
        if self.mask is None:
            return jnp.ones(shape, bool), jnp.zeros(shape, bool)
        mask = get_field(example, self.mask, "mask")
        if jnp.shape(mask) != shape:
            raise ValueError(
                f"mask: part {self.mask!r} of one example has shape {jnp.shape(mask)}, expected {shape}, that "
                "of the labels"
            )
        mask = jnp.asarray(mask)
        counted = mask.astype(bool)
        return counted, counted & (mask != jnp.ones((), mask.dtype))

    def _reduced(self, entries: Array, counted: Array, wrong: Array) -> Array:
        """The sum or mean over the entries that count; NaN, gradients included, if one of them is wrong."""
        factor = jnp.where(wrong & counted, jnp.nan, counted.astype(entries.dtype))
        total = jnp.sum(entries * factor)
        return total if self.reduction == "sum" else total / jnp.maximum(jnp.sum(counted), 1).astype(total.dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class CrossEntropy(Loss):
    """Made by `cross_entropy`."""

    applies: ClassVar[str] = "softmax"
    made_by: ClassVar[str] = "cross_entropy"
    ignore: int | None = None

    def __post_init__(self) -> None:
        Loss.__post_init__(self)
        if self.ignore is not None and (isinstance(self.ignore, bool) or not isinstance(self.ignore, int)):
            raise TypeError(f"ignore: got {self.ignore!r}, expected an integer label such as -100, or None")

    def __call__(self, output: PyTree, example: PyTree) -> Array:
        logits = _array(output, "logits (..., C)", axes=1)
        labels = get_field(example, self.label, "label")
        if hasattr(labels, "dtype") and not jnp.issubdtype(labels.dtype, jnp.integer):
            raise TypeError(
                f"label: part {self.label!r} of the example is {labels.dtype}{list(labels.shape)}, expected integer "
                "labels; of one-hot labels or class probabilities take jnp.argmax(..., axis=-1), or use "
                "optax.softmax_cross_entropy"
            )
        shape, classes = logits.shape[:-1], logits.shape[-1]
        labels = self._labels(logits, example, shape)
        # In a narrow dtype the number of classes, or the label to ignore, would be another number.
        labels = jnp.asarray(labels).astype(jnp.int32 if labels.dtype.itemsize < 4 else labels.dtype)
        counted, wrong = self._counted(example, shape)
        if self.ignore is not None:
            counted &= labels != self.ignore
        inside = (labels >= 0) & (labels < classes)
        # What does not count may be anything: neither its logits nor its label are looked at.
        logits = jnp.where(counted[..., None], logits, 0)
        # Clipped for whoever reads the program: no label is out of range there.
        labels = jnp.clip(jnp.where(counted & inside, labels, 0), 0, classes - 1)
        entries = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return self._reduced(entries, counted, wrong | ~inside)


class SquaredError(Loss):
    """Made by `squared_error`."""

    made_by: ClassVar[str] = "squared_error"

    def __call__(self, output: PyTree, example: PyTree) -> Array:
        predicted = _array(output, "an array of predictions")
        labels = self._labels(predicted, example, predicted.shape)
        if not (jnp.issubdtype(labels.dtype, jnp.integer) or jnp.issubdtype(labels.dtype, jnp.floating)):
            raise TypeError(f"label: part {self.label!r} of the example is {labels.dtype}, expected real numbers")
        counted, wrong = self._counted(example, predicted.shape)
        off = jnp.where(counted, predicted - labels.astype(predicted.dtype), 0)
        return self._reduced(0.5 * jnp.square(off), counted, wrong)


class BinaryCrossEntropy(Loss):
    """Made by `binary_cross_entropy`."""

    applies: ClassVar[str] = "sigmoid"
    made_by: ClassVar[str] = "binary_cross_entropy"

    def __call__(self, output: PyTree, example: PyTree) -> Array:
        logits = _array(output, "an array of logits")
        labels = self._labels(logits, example, logits.shape)
        counted, wrong = self._counted(example, logits.shape)
        labels = jnp.asarray(labels).astype(logits.dtype)
        inside = (labels >= 0) & (labels <= 1)
        logits = jnp.where(counted, logits, 0)
        labels = jnp.where(counted & inside, labels, 0)
        return self._reduced(optax.sigmoid_binary_cross_entropy(logits, labels), counted, wrong | ~inside)


def cross_entropy(
    label: str | int = "y", *, mask: str | int | None = None, ignore: int | None = None, reduction: str = "sum"
) -> CrossEntropy:
    r"""Softmax cross-entropy, $\sum_t \log\sum_c e^{o_{tc}} - o_{ty_t}$, over the positions that count.

    Args:
      label: The part of the example with the integer labels, `(...)` for logits `(..., C)`: key, attribute or index.
      mask: The part that says which positions count, shaped like the labels, of booleans or 0 and 1; all if None.
      ignore: A label that does not count, e.g. -100.
      reduction: `"sum"`, or `"mean"` over the positions that count.

    Returns:
      `loss(output, example) -> scalar`.

    Raises:
      TypeError, ValueError: If an argument is not of that form; when called, if labels are not integers, or labels,
        mask and logits are not of these shapes.

    Example:
      >>> import influence_jax as ij
      >>> loss = ij.losses.cross_entropy("y", ignore=-100, reduction="mean")
      >>> float(loss(jnp.zeros((3, 2)), {"y": jnp.array([0, 1, -100])}))
      0.693...
    """
    return CrossEntropy(label, mask, reduction, ignore)


def squared_error(label: str | int = "y", *, mask: str | int | None = None, reduction: str = "sum") -> SquaredError:
    r"""Half the squared error, $\frac12\sum_t (o_t - y_t)^2$, whose Hessian in the output is the identity.

    Args:
      label: The part of the example with the targets, shaped like the output.
      mask: The part that says which entries count, of that shape, of booleans or 0 and 1; all if None.
      reduction: `"sum"`, or `"mean"` over the entries that count.

    Returns:
      `loss(output, example) -> scalar`.

    Raises:
      TypeError, ValueError: If an argument is not of that form; when called, if shapes differ.

    Example:
      >>> import influence_jax as ij
      >>> float(ij.losses.squared_error("y")(jnp.array([1.0, 2.0]), {"y": jnp.array([0.0, 0.0])}))
      2.5
    """
    return SquaredError(label, mask, reduction)


def binary_cross_entropy(
    label: str | int = "y", *, mask: str | int | None = None, reduction: str = "sum"
) -> BinaryCrossEntropy:
    r"""Sigmoid cross-entropy, $-\sum_t y_t\log\sigma(o_t) + (1 - y_t)\log\sigma(-o_t)$, of logits.

    Labels of -1 and 1 make the loss NaN here, which is told.  `optax.sigmoid_binary_cross_entropy` takes them as
    numbers, and so in silence.

    Args:
      label: The part of the example with the labels, shaped like the logits: booleans, 0 and 1, or probabilities.
      mask: The part that says which entries count, of that shape, of booleans or 0 and 1; all if None.
      reduction: `"sum"`, or `"mean"` over the entries that count.

    Returns:
      `loss(output, example) -> scalar`.

    Raises:
      TypeError, ValueError: If an argument is not of that form; when called, if shapes differ.

    Example:
      >>> import influence_jax as ij
      >>> float(ij.losses.binary_cross_entropy("y")(jnp.array(0.0), {"y": jnp.array(True)}))
      0.693...
    """
    return BinaryCrossEntropy(label, mask, reduction)


def _array(output: PyTree, expected: str, axes: int = 0) -> Array:
    """The output, float32 or wider, if it is one floating array."""
    if not hasattr(output, "dtype") or not jnp.issubdtype(output.dtype, jnp.floating) or output.ndim < axes:
        got = f"{output.dtype}{list(output.shape)}" if hasattr(output, "dtype") else f"a {type(output).__name__}"
        raise TypeError(f"output: predict returned {got}, expected {expected}, floating")
    return tree.promote(output)
