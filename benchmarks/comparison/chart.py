"""The chart of a comparison: time, error and memory of every method, ours and the peers'."""

import textwrap

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from . import report
from .methods import KRONFLUENCE, OURS, PYDVL

COLORS = {OURS: "#0b62a4", PYDVL: "#d9630b", KRONFLUENCE: "#2a8f57"}
MARKS = {OURS: "o", PYDVL: "D", KRONFLUENCE: "s"}
INK, QUIET, BAND = "#222222", "#777777", "#f3f5f7"
LANE = 0.19  # how far the two sides of a method lie from its middle
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def dot(axis, x, y, side, hollow=False):
    face = "white" if hollow else COLORS[side]
    axis.plot(
        [x], [y], MARKS[side], markersize=6.5, markerfacecolor=face, markeredgecolor=COLORS[side], markeredgewidth=1.5
    )


def times(axis, row, y):
    """Warm and cold, a line between them."""
    warm, cold, side = row["warm_cpu_s"], row["cold_cpu_s"], row["side"]
    axis.plot([warm, cold], [y, y], color=COLORS[side], linewidth=1.6, alpha=0.45, solid_capstyle="round")
    dot(axis, cold, y, side, hollow=True)
    dot(axis, warm, y, side)


def beside(axis, x, y, text, **style):
    """Text at a method's height, `x` a fraction of the panel's width."""
    axis.text(x, y, text, transform=axis.get_yaxis_transform(), va="center", **style)


def method_row(axes, y, rows):
    """All of a method at one height, ours above."""
    time, error, memory = axes
    for i, row in enumerate(rows):
        side, lane = row["side"], y + (2 * i - 1) * LANE
        if "failed" in row:
            beside(time, 0.02, lane, f"{side} failed", color=COLORS[side], fontsize=8)
            continue
        times(time, row, lane)
        dot(error, row["error"], lane, side)
        dot(memory, max(row["peak_mb"], 1), lane, side)
        value = report.ratio(row, rows[0], "warm_cpu_s")
        if value is not None:
            faster = OURS if value >= 1 else side
            text = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
            beside(time, 1.015, y, text, color=COLORS[faster], fontsize=9, fontweight="bold")


def legend(figure, sides, top):
    handles = [
        Line2D([], [], marker=MARKS[side], color=COLORS[side], linestyle="", markersize=7, label=side) for side in sides
    ]
    for label, face in (("warm", QUIET), ("cold: first call, compiling included", "white")):
        style = {"markerfacecolor": face, "markeredgecolor": QUIET, "markeredgewidth": 1.5}
        handles.append(Line2D([], [], marker="o", linestyle="", markersize=7, label=label, **style))
    place = {"loc": "upper left", "bbox_to_anchor": (0.005, top), "ncols": len(handles)}
    figure.legend(handles=handles, frameon=False, fontsize=9.5, handletextpad=0.2, **place)


def bare(axis, title, count):
    """A logarithmic panel with nothing but faint lines, every other method on a band."""
    axis.set_xscale("log")
    axis.margins(x=0.07)
    axis.set_title(title, fontsize=10.5, color=INK, loc="left", pad=8)
    axis.grid(axis="x", color="#d9dde1", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.tick_params(axis="both", length=0, labelsize=8.5, labelcolor=INK)
    for spine in axis.spines.values():
        spine.set_visible(False)
    for y in range(0, count, 2):
        axis.axhspan(y - 0.5, y + 0.5, color=BAND, zorder=0, linewidth=0)


def panels(count, height):
    """Time, error, memory."""
    figure, axes = plt.subplots(1, 3, figsize=(13, height), sharey=True, width_ratios=(2.3, 1.1, 1), facecolor="white")
    time, error, memory = axes
    bare(time, "CPU seconds on one core, and the ratio of a peer's warm ones to ours", count)
    bare(error, "relative error", count)
    bare(memory, "peak MB above imports", count)
    for axis in (time, memory):
        axis.xaxis.set_major_formatter(PLAIN)
    memory.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    error.xaxis.set_major_locator(LogLocator(base=100))
    time.text(1.015, 1, "ratio", transform=time.transAxes, fontsize=8, color=QUIET, va="bottom")
    return figure, axes


def footer(figure, results):
    """What the figures depend on, in small print, and its number of lines."""
    about = [line.replace("*", "") for line in report.about(results) if not line.startswith("`")]
    lines = [part for line in about for part in textwrap.wrap(line, 190)]
    figure.text(0.012, 0.01, "\n".join(lines), fontsize=7.8, color=QUIET, va="bottom", linespacing=1.4)
    return len(lines)


def draw(results, path):
    """Save the chart."""
    methods = list(report.pairs(results))
    height = 2.4 + 0.44 * len(methods)
    figure, axes = panels(len(methods), height)
    for y, (_, rows) in enumerate(methods):
        method_row(axes, y, rows)
    axes[0].set_yticks(range(len(methods)), [method.title for method, _ in methods], fontsize=10)
    axes[0].set_ylim(len(methods) - 0.5, -0.5)
    title = "influence_jax beside pyDVL and kronfluence: same weights, same data"
    figure.text(0.012, 1 - 0.16 / height, title, fontsize=13, color=INK, fontweight="bold", va="top")
    legend(figure, [side for side in COLORS if any(row["side"] == side for row in results["rows"])], 1 - 0.4 / height)
    below = 0.17 * footer(figure, results) + 0.4
    figure.subplots_adjust(left=0.205, right=0.98, top=1 - 1.1 / height, bottom=below / height, wspace=0.24)
    figure.savefig(path, dpi=150)
    plt.close(figure)
