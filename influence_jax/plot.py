"""Pictures of scores and of how well they predict, by matplotlib.

Every function draws on the axes it is given, of any figure, or else on those of a new pyplot figure, and returns them
for further changes; none shows a figure or touches matplotlib's settings.  Arrays may be JAX's or numpy's.  Blue is
helpful, vermilion harmful.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from ._drawing import (
    BLUE,
    COLOURS,
    FONT,
    GREY,
    SKY,
    STYLES,
    TALL_BAR,
    VERMILION,
    bend,
    in_bins,
    make_room,
    new_or_given,
    numbers,
    positive,
    real,
)
from ._gallery import images, texts
from ._typing import Array
from .batching import check_positive
from .curvature import Spectrum
from .metrics import correlation, predicted_changes
from .metrics.checks import check_removal

__all__ = [
    "damping_sweep",
    "discovery_curve",
    "images",
    "lds_bars",
    "predicted_against_actual",
    "score_histogram",
    "spectrum",
    "texts",
]

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What `metrics.predicted_changes` computes, with m of the N examples left out.
FORMULAS = {
    "mean": r"$\sum_{\mathrm{left\ out}} (s_i - \bar{s})\;/\;(N - m)$",
    "sum": r"$\sum_{\mathrm{left\ out}} s_i\;/\;N$",
}


def score_histogram(scores: Any, *, bins: int = 60, ax: Axes | None = None) -> Axes:
    """How scores are distributed, tails included.

    Where the largest magnitude is more than 20 times the median one, the axis of the scores is linear up to about that
    median and logarithmic beyond, on either side of zero, and that of the bars is logarithmic.  No bar reaches over
    zero.

    Args:
      scores: Any shape, drawn in two colours by sign; or a mapping from names of groups to such arrays.
      bins: About how many.
      ax: Where to draw.

    Raises:
      TypeError, ValueError: If the scores are empty or not finite.

    Example:
      >>> from matplotlib.figure import Figure
      >>> ax = score_histogram(np.array([[0.5, -1.0, 2.0]]), ax=Figure().subplots())
      >>> [text.get_text() for text in ax.get_legend().get_texts()]
      ['helpful: 2', 'harmful: 1']
    """
    check_positive(bins, "bins")
    if isinstance(scores, Mapping):
        groups = {str(name): numbers(part, f"scores[{name!r}]").ravel() for name, part in scores.items()}
        colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(groups)}
    else:
        flat = numbers(scores, "scores").ravel()
        groups = {"helpful": flat[flat > 0], "harmful": flat[flat < 0], "zero": flat[flat == 0]}
        groups = {name: part for name, part in groups.items() if len(part)}
        colours = {"helpful": BLUE, "harmful": VERMILION, "zero": GREY}
    everything = np.concatenate([np.zeros(0), *groups.values()])
    if not len(everything):
        raise ValueError("scores: got none, expected at least one")
    edges, width = in_bins(everything, bins)
    ax = new_or_given(ax)
    for name, part in groups.items():
        counts = np.histogram(part, edges)[0]
        ax.stairs(counts, edges, fill=True, color=colours[name], alpha=0.75, label=f"{name}: {len(part):,}")
    if width:
        bend(ax, width, edges)
    counts = np.histogram(everything, edges)[0]
    if width or np.max(counts) > TALL_BAR * np.median(counts[counts > 0]):
        ax.set_yscale("log")
        ax.set_ylim(bottom=0.5)  # below one, so that a bar of a single score has a height
    ax.set(xlim=(edges[0], edges[-1]), xlabel="score (positive: helpful)", ylabel="number of scores")
    make_room(ax, len(groups))
    ax.legend(loc="upper right")
    return ax


def lds_bars(
    results: Mapping[str, Any], *, ceiling: float | None = None, sort: bool = False, ax: Axes | None = None
) -> Axes:
    """Linear datamodeling scores of several methods, with intervals; the first on top.

    Args:
      results: From each method's name to `(mean, low, high)`, the ends of its interval, NaN where there is none:
        of a `metrics.lds_summary`, `(summary.mean, *summary.over_queries)`.
      ceiling: The highest score that the noise of the seeds allows, the mean of `metrics.seed_ceiling`; a dashed line.
      sort: Whether the best comes first, instead of the order given.
      ax: Where to draw.

    Raises:
      TypeError, ValueError: If there is no result, a mean is not finite, or an interval ends before it begins.

    Example:
      >>> from matplotlib.figure import Figure
      >>> ax = lds_bars({"GGN": (0.9, 0.85, 0.94), "gradient dot": (0.3, 0.2, 0.4)}, ax=Figure().subplots())
      >>> [float(bar.get_width()) for bar in ax.patches]
      [0.9, 0.3]
    """
    if not isinstance(results, Mapping) or not results:
        raise TypeError(f"results: got {results!r:.80}, expected a mapping {{name: (mean, low, high)}}")
    rows = {str(name): _interval(result, f"results[{name!r}]") for name, result in results.items()}
    names = sorted(rows, key=lambda name: -rows[name][0]) if sort else list(rows)
    means, lows, highs = np.array([rows[name] for name in names]).T
    limit = None if ceiling is None else float(numbers(ceiling, "ceiling", ()))
    labels = [textwrap.fill(name, 40) for name in names]
    lines = max(label.count("\n") + 1 for label in labels)
    ax = new_or_given(ax, 6.4, 1.2 + (0.12 + 0.18 * lines) * len(names))
    places = np.arange(len(names))
    ax.barh(places, means, height=0.7, color=SKY)
    ax.errorbar((lows + highs) / 2, places, xerr=(highs - lows) / 2, fmt="none", ecolor="black", capsize=3)
    for place, mean in zip(places, means, strict=True):
        beside = ax.get_yaxis_transform()  # the right edge, at the height of the bar
        ax.annotate(f"{mean:.2f}", (1, place), (5, 0), beside, textcoords="offset points", va="center", fontsize=FONT)
    if limit is not None:
        ax.axvline(limit, color="black", linestyle="--", label=f"ceiling {limit:.2f}")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(places, labels)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlabel("linear datamodeling score\n(higher is better)")
    return ax


def predicted_against_actual(
    predicted: Any, actual: Any, *, masks: Any = None, removal: str = "mean", ax: Axes | None = None
) -> Axes:
    """Predicted changes against those that retraining brought, on equal scales, with the line where they agree.

    Args:
      predicted: Changes of the query's loss, any shape: what `metrics.predicted_changes` returns.  Or scores `(Q, N)`,
        with `masks`, of which it is then asked.
      actual: Losses after retraining without some examples, less those after training on all, of the same shape;
        `(S, Q)` with `masks`.
      masks: `(S, N)`, true where the example is kept.
      removal: With `masks`, which removal the scores predict, as for `metrics.predicted_changes`: `"mean"` for training
        on the mean over what is left, as `retrain.training` does; `"sum"` for the sum, divided by the N of before.
      ax: Where to draw.

    Raises:
      TypeError, ValueError: If the shapes differ, or a value is not finite; as `metrics.predicted_changes`, if asked.

    Example:
      >>> from matplotlib.figure import Figure
      >>> ax = predicted_against_actual([0.1, 0.2, 0.4], [0.1, 0.3, 0.5], ax=Figure().subplots())
      >>> ax.get_title()
      'Pearson 0.982, Spearman 1.000, n = 3'
    """
    check_removal(removal)
    label = "predicted change of the loss when left out"
    if masks is not None:
        predicted = predicted_changes(predicted, masks, removal=removal)
        label = f"{label}\n{FORMULAS[removal]}"
    elif removal != "mean":
        raise ValueError(
            f"removal: got {removal!r} without masks; pass scores (Q, N) and masks (S, N), or leave it out"
        )
    predicted = numbers(predicted, "predicted")
    actual = numbers(actual, "actual", predicted.shape).ravel()
    predicted = predicted.ravel()
    if not len(actual):
        raise ValueError("predicted: got no values, expected at least one")
    ax = new_or_given(ax, 4.8, 4.8)
    low, high = min(np.min(actual), np.min(predicted)), max(np.max(actual), np.max(predicted))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    limits = (low - margin, high + margin)
    ax.plot(limits, limits, color=GREY, linestyle="--", linewidth=1, label="predicted = actual")
    fade = float(np.clip(100 / len(actual) ** 0.75, 0.1, 0.7))
    ax.scatter(actual, predicted, s=20, color=BLUE, alpha=fade, linewidths=0, rasterized=len(actual) > 5000)
    ax.set_title(f"{_correlations(predicted, actual)}, n = {len(actual):,}", fontsize="medium")
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    ax.set(xlabel="actual change of the loss when left out", ylabel=f"{label}, positive: it rises")
    ax.locator_params(nbins=7)
    ax.ticklabel_format(style="sci", scilimits=(-3, 4))
    ax.legend(loc="upper left")
    return ax


def _correlations(predicted: np.ndarray, actual: np.ndarray) -> str:
    """Both kinds in words."""
    if len(actual) < 3 or np.ptp(predicted) == 0 or np.ptp(actual) == 0:
        return "correlation undefined"
    found = {name: float(correlation(predicted, actual, method=name.lower())) for name in ("Pearson", "Spearman")}
    return ", ".join(f"{name} {value:.3f}" for name, value in found.items())


def spectrum(
    ritz: Spectrum, *, damping: float | Array | None = None, width: float = 0.15, ax: Axes | None = None
) -> Axes:
    """Density of an operator's eigenvalues on logarithmic axes, with a mark at the damping.

    Args:
      ritz: From `influence_jax.spectrum(operator, ...)`. Eigenvalues that are zero to rounding are counted in the
        title; negative ones are drawn by their magnitude.
      damping: Where to draw the mark.
      width: Of the smoothing, in decades.
      ax: Where to draw.

    Raises:
      TypeError, ValueError: If `ritz` is no `Spectrum`, all eigenvalues are zero, or a number is not positive.

    Example:
      >>> import jax
      >>> import influence_jax as ij
      >>> from matplotlib.figure import Figure
      >>> op = ij.Diagonal({"w": jnp.full(3, 2.0)})
      >>> ax = spectrum(ij.spectrum(op, 3, key=jax.random.key(0)), damping=0.5, ax=Figure().subplots())
      >>> [text.get_text() for text in ax.get_legend().get_texts()]
      ['positive', 'damping 0.5: effective dimension 2.4']
    """
    if not isinstance(ritz, Spectrum):
        raise TypeError(f"ritz: got a {type(ritz).__name__}, expected what spectrum(operator, ...) returns")
    values = numbers(ritz.values, "ritz.values")
    smoothing = float(positive(width, "width", 0))
    mark = None if damping is None else float(positive(damping, "damping", 0))
    largest = float(np.max(np.abs(values)))
    if largest == 0:
        raise ValueError("ritz: every eigenvalue is zero, expected some that are not")
    floor = 10 * float(jnp.finfo(ritz.values.dtype).eps) * largest
    ax = new_or_given(ax)
    curves = []
    for sign, color in ((1, BLUE), (-1, VERMILION)):
        kept = sign * values > floor
        if np.any(kept):
            curves.append(_per_decade(ritz, sign, kept, smoothing))
            name = "positive" if sign > 0 else "negative, magnitude"
            ax.fill_between(*curves[-1], facecolor=(color, 0.3), edgecolor=color, linewidth=1.5, label=name)
    if mark is not None:
        ax.axvline(mark, color="black", linestyle="--", label=_damping_mark(ritz, mark))
    zero = float(np.mean(np.sum(np.asarray(ritz.weights) * (np.abs(values) <= floor), axis=1)))
    note = f", {zero:.0%} of them zero to rounding (below {floor:.0e})" if zero > 0.005 else ""
    ax.set_title(f"{ritz.size:,} eigenvalues{note}", fontsize="medium")
    middles, heights = (np.concatenate(parts) for parts in zip(*curves, strict=True))
    least = min(0.01, 0.1 * np.max(heights))
    shown = np.log10([*middles[heights >= least], *([] if mark is None else [0.7 * mark, 1.4 * mark])])
    middle, half = (np.max(shown) + np.min(shown)) / 2, max((np.max(shown) - np.min(shown)) / 2, 1)
    ax.set(xscale="log", yscale="log", xlabel="eigenvalue", ylabel="eigenvalues per decade")
    ax.set(xlim=(10 ** (middle - half), 10 ** (middle + half)), ylim=(least, np.max(heights)))
    make_room(ax, len(curves) + (mark is not None))
    ax.legend(loc="upper right", framealpha=1)
    return ax


def _per_decade(ritz: Spectrum, sign: int, kept: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues of that sign, and how many there are per decade about each."""
    exponents = np.log10(np.where(kept, sign * np.asarray(ritz.values, np.float64), 1.0))
    low, high = np.min(exponents[kept]) - 6 * width, np.max(exponents[kept]) + 6 * width
    dtype, points = ritz.values.dtype, np.linspace(low, high, 600)
    decades = dataclasses.replace(
        ritz, values=jnp.asarray(exponents, dtype), weights=jnp.where(jnp.asarray(kept), ritz.weights, 0)
    )
    return 10**points, ritz.size * np.asarray(decades.density(jnp.asarray(points, dtype), width), np.float64)


def _damping_mark(ritz: Spectrum, damping: float) -> str:
    """The damping, and what dimension it leaves if the damped operator is positive definite."""
    label = f"damping {damping:.3g}"
    if float(ritz.smallest[0]) + damping <= 0:
        return f"{label}: indefinite"
    dimension, error = ritz.effective_dimension(damping)
    return f"{label}: effective dimension {float(dimension):,.1f}" + (
        "" if error is None else f" ± {float(error):,.1f}"
    )


def damping_sweep(
    dampings: Any,
    values: Any,
    *,
    low: Any = None,
    high: Any = None,
    best: str = "highest",
    name: str = "",
    ax: Axes | None = None,
) -> Axes:
    """A measure against the damping, the best marked; call again with the same axes for another method.

    Args:
      dampings: Positive, in any order, `(D,)`.
      values: What came of each, `(D,)`.
      low: Lower ends of intervals, `(D,)`; with `high`.
      high: Upper ends, `(D,)`.
      best: `"highest"`, or `"lowest"` for a loss or an error.
      name: Of the method, for the legend.
      ax: Where to draw.

    Raises:
      TypeError, ValueError: If an argument is not of that form or not finite.

    Example:
      >>> from matplotlib.figure import Figure
      >>> ax = damping_sweep([1e-3, 1e-2, 1e-1], [0.90, 0.97, 0.80], ax=Figure().subplots())
      >>> ax.get_legend().get_texts()[0].get_text()
      'best: 0.97 at 0.01'
    """
    places = positive(dampings, "dampings", 1)
    order, shape = np.argsort(places), places.shape
    places, heights = places[order], numbers(values, "values", shape)[order]
    if best not in ("highest", "lowest"):
        raise ValueError(f"best: got {best!r}, expected 'highest' or 'lowest'")
    if (low is None) != (high is None):
        raise ValueError(f"{'low' if low is None else 'high'}: got None, expected both ends of the intervals, or none")
    ends = [] if low is None else [numbers(low, "low", shape)[order], numbers(high, "high", shape)[order]]
    if ends and np.any(ends[0] > ends[1]):
        raise ValueError("low: some intervals end before they begin, expected low <= high")
    ax = new_or_given(ax)
    color = COLOURS[len(ax.lines) % len(COLOURS)]  # one line for each call
    if ends:
        ax.fill_between(places, ends[0], ends[1], color=color, alpha=0.2, linewidth=0)
    ax.plot(places, heights, color=color, marker="o", markersize=4)
    chosen = int(np.argmax(heights) if best == "highest" else np.argmin(heights))
    label = f"{name + ', ' if name else ''}best: {heights[chosen]:.3g} at {places[chosen]:.3g}"
    ax.scatter(places[chosen], heights[chosen], s=160, marker="*", color=color, zorder=3, label=label)
    ax.set(xscale="log", xlabel="damping", ylabel=f"measure ({best} is best)")
    ax.legend()
    return ax


def discovery_curve(curves: Mapping[str, Any], *, wrong: float | None = None, ax: Axes | None = None) -> Axes:
    """What share of the wrong labels has been found when a share of the data has been inspected.

    Args:
      curves: From names to `(inspected, found)`, shares from 0 to 1 of equal length, `inspected` ascending: what
        `metrics.discovery_curve` returns.
      wrong: Share of the data that has a wrong label: adds the line of a search that makes no mistake.
      ax: Where to draw.

    Raises:
      TypeError, ValueError: If an argument is not of that form or not finite.

    Example:
      >>> from matplotlib.figure import Figure
      >>> ax = discovery_curve({"self-influence": ([0.1, 0.5, 1], [0.6, 0.9, 1])}, wrong=0.1, ax=Figure().subplots())
      >>> [line.get_label() for line in ax.lines]
      ['ideal', 'self-influence', 'at random']
    """
    if not isinstance(curves, Mapping) or not curves:
        raise TypeError(f"curves: got {curves!r:.60}, expected a mapping {{name: (inspected, found)}}")
    drawn = {str(name): _shares(curve, f"curves[{name!r}]") for name, curve in curves.items()}
    if wrong is not None and not 0 < numbers(wrong, "wrong", ()) <= 1:
        raise ValueError(f"wrong: got {wrong}, expected a share above 0 and at most 1")
    beside = len(drawn) > 6  # the legend, for want of room inside
    ax = new_or_given(ax, 9 if beside else 6.4, max(4, 0.2 * len(drawn) + 1) if beside else 4)
    if wrong is not None:
        ax.plot([0, float(wrong), 1], [0, 1, 1], color=GREY, linestyle=":", label="ideal")
    for index, (name, (inspected, found)) in enumerate(drawn.items()):
        style = STYLES[index // len(COLOURS) % len(STYLES)]
        ax.plot(inspected, found, color=COLOURS[index % len(COLOURS)], linestyle=style, label=name)
    ax.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="at random")
    ax.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="share of the data inspected", ylabel="share of the wrong labels found")
    outside = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "fontsize": "small"}
    ax.legend(**(outside if beside else {"loc": "lower right"}))
    return ax


def _shares(curve: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A curve that begins where nothing has been inspected and nothing found."""
    inspected, found = _parts(curve, name, "inspected, found")
    inspected = numbers(inspected, f"{name}, inspected")
    found = numbers(found, f"{name}, found", inspected.shape)
    if inspected.ndim != 1 or not inspected.size:
        raise ValueError(f"{name}: got shape {inspected.shape}, expected one axis, not empty")
    if np.any(np.diff(inspected) < 0):
        raise ValueError(f"{name}: inspected goes down somewhere, expected it ascending")
    if min(inspected[0], np.min(found)) < 0 or max(inspected[-1], np.max(found)) > 1 + 1e-6:
        raise ValueError(f"{name}: some values lie outside 0 to 1, expected shares; divide counts by their totals")
    start = [0.0] if inspected[0] > 0 else []
    return np.concatenate([start, inspected]), np.concatenate([start, found])


def _interval(result: Any, name: str) -> tuple[float, float, float]:
    """Mean, low and high of one method."""
    mean, low, high = _parts(result, name, "mean, low, high")
    mean, low, high = float(numbers(mean, f"{name}, mean", ())), real(low, name), real(high, name)
    if low.ndim or high.ndim or low > high or np.isinf(low) or np.isinf(high):
        raise ValueError(
            f"{name}: got the interval from {low} to {high}, expected two finite numbers, low <= high, or NaN; of a "
            "metrics.lds_summary, take (summary.mean, *summary.over_queries)"
        )
    return mean, float(low), float(high)


def _parts(value: Any, name: str, expected: str) -> tuple:
    """The parts of a tuple."""
    if isinstance(value, str) or not hasattr(value, "__len__") or len(value) != expected.count(",") + 1:
        raise TypeError(f"{name}: got {value!r:.60}, expected ({expected})")
    return tuple(value)
