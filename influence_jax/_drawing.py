"""What the pictures share: colours, axes, and checks in words."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito's colours, which colour-blind readers tell apart.
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "#767676"
SKY = "#56B4E9"
COLOURS = (BLUE, "#E69F00", "#009E73", "#CC79A7", SKY, VERMILION)
# Of lines, where there are more than colours.
STYLES = ("-", "-.", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
FONT = 9.5  # points
TICKS_APART = 0.35  # inches
# Largest magnitude over the median one beyond which a linear axis would show a single bar: normal scores reach 8, those
# of a Laplace distribution 17, influences often hundreds.
HEAVY_TAIL = 20
# Highest bar over the median one beyond which the others would be flat on a linear axis; normal scores reach 20.
TALL_BAR = 50


def module(name: str) -> Any:
    """A module of matplotlib's, or an ImportError that says how to get it."""
    try:
        return importlib.import_module(f"matplotlib.{name}")
    except ImportError as error:
        raise ImportError("pictures need matplotlib. Fix: pip install 'influence-jax[plot]'") from error


def new_or_given(ax: Axes | None, width: float = 6.4, height: float = 4.0) -> Axes:
    """The axes given, after a check, or those of a new figure of that size in inches."""
    if ax is None:
        return module("pyplot").subplots(figsize=(width, height), layout="constrained")[1]
    check_axes(ax, "ax")
    return ax


def check_axes(ax: Any, name: str) -> None:
    """Raise unless it is one matplotlib axes."""
    if not isinstance(ax, module("axes").Axes):
        raise TypeError(f"{name}: got a {type(ax).__name__}, expected matplotlib axes such as figure.subplots() makes")


def numbers(values: Any, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Finite float64 numbers, of that shape if one is given.

    Raises:
      TypeError: If they are no real numbers.
      ValueError: If the shape differs, or a number is not finite.
    """
    array = real(values, name)
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name}: got shape {array.shape}, expected {shape or 'one number'}")
    wrong = array.size - np.count_nonzero(np.isfinite(array))
    if wrong:
        raise ValueError(f"{name}: {wrong} of {array.size} values are not finite; leave them out, or find their cause")
    return array


def real(values: Any, name: str) -> np.ndarray:
    """Real numbers as float64, NaN and infinity among them.

    Raises:
      TypeError: If they are something else.
    """
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "cOSUmM":
            return array.astype(np.float64)
    except (TypeError, ValueError):
        pass  # rows of different lengths, or what holds no numbers
    raise TypeError(f"{name}: got {values!r:.60}, expected an array of real numbers")


def positive(values: Any, name: str, rank: int) -> np.ndarray:
    """Positive finite numbers, an array of that rank, not empty.

    Raises:
      TypeError, ValueError: If they are not.
    """
    array = numbers(values, name)
    if array.ndim != rank or not array.size:
        raise ValueError(f"{name}: got shape {array.shape}, expected {'(D,)' if rank else 'one number'}")
    if np.any(array <= 0):
        raise ValueError(f"{name}: got {np.min(array):g}, expected positive numbers: the axis is logarithmic")
    return array


def in_bins(values: np.ndarray, bins: int) -> tuple[np.ndarray, float]:
    r"""Edges of bins, zero among them, equally far apart on the axis where they are drawn.

    With heavy tails that is $\operatorname{arsinh}(s / w)$: linear up to about w, logarithmic beyond.

    Returns:
      The edges, and w, the median magnitude of what is not zero; or 0.0 for a linear axis.
    """
    sizes = np.abs(values[values != 0])
    typical = float(np.median(sizes)) if sizes.size else 0.0
    width = typical if sizes.size and np.max(sizes) > HEAVY_TAIL * typical else 0.0
    forth = lambda x: np.arcsinh(x / width) if width else x
    low, high = min(np.min(values), 0.0), max(np.max(values), 0.0)
    step = (forth(high) - forth(low)) / bins or 1.0
    first, last = np.floor(forth(low) / step), np.ceil(forth(high) / step)
    edges = step * np.arange(first, max(last, first + 1) + 1)
    edges = width * np.sinh(edges) if width else edges
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)  # rounding must not lose the extremes
    return edges, width


def bend(ax: Axes, width: float, edges: np.ndarray) -> None:
    """Make the horizontal axis linear up to that width and logarithmic beyond, with ticks at powers of ten."""
    ticker = module("ticker")
    low, high = np.arcsinh(np.array([edges[0], edges[-1]]) / width)
    kept, powers = [0.0], 10.0 ** np.arange(*np.floor(np.log10([width, 10 * np.max(np.abs(edges))])))
    for power in powers:
        apart = np.arcsinh(power / width) - np.arcsinh(kept[-1] / width)
        if apart * inches(ax)[0] / (high - low) >= TICKS_APART:
            kept.append(power)
    ax.set_xscale("asinh", linear_width=width)
    ax.xaxis.set_major_locator(ticker.FixedLocator(sorted({*kept, *(-power for power in kept)})))
    ax.xaxis.set_minor_locator(ticker.NullLocator())


def inches(ax: Axes) -> tuple[float, float]:
    """Width and height of axes."""
    extent, dpi = ax.get_window_extent(), ax.figure.dpi
    return extent.width / dpi, extent.height / dpi


def lay_out(ax: Axes) -> None:
    """Put axes where their figure's layout will, for what has to know its room."""
    figure = ax.figure.canvas.figure  # the whole, if these belong to a part of a figure
    layout = figure.get_layout_engine()
    if layout is not None:
        layout.execute(figure)


def make_room(ax: Axes, lines: int) -> None:
    """Raise the upper limit for a legend of so many lines."""
    share = min(0.5, (0.15 + 0.22 * lines) / inches(ax)[1])  # of the axes, in inches
    scale = ax.yaxis.get_transform()
    low, high = scale.transform(np.asarray(ax.get_ylim(), np.float64))
    ax.set_ylim(top=float(scale.inverted().transform(np.asarray([high + share / (1 - share) * (high - low)]))[0]))
