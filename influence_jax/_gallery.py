"""Galleries: a query with the training examples that helped it and hurt it most."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ._drawing import BLUE, FONT, GREY, VERMILION, check_axes, inches, lay_out, module, new_or_given, numbers
from .batching import check_positive

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# In font sizes: a letter's width on average, the distance of lines of text, the room above a heading in lines.
LETTER, LINE, GAP = 0.56, 1.45, 0.4
# In inches: a new figure of texts, and in it the column of scores.
WIDTH, COLUMN = 8.0, 0.9
Part: TypeAlias = tuple[str, str, str | None]  # what stands on the left, its colour, what stands beside it


def images(
    query_image: Any,
    query_label: Any,
    train_images: Any,
    labels: Any,
    scores: Any,
    *,
    k: int = 5,
    cmap: str = "gray",
    axes: Any = None,
) -> np.ndarray:
    r"""A query beside the training images that helped it most, and those that hurt it most, with their scores.

    Helpful is a positive score, harmful a negative one: where fewer than k scores have that sign, fewer are shown. All
    images share one range of grey values or colours: from 0 to 1, or if a value shown lies outside, from the least to
    the largest.

    Args:
      query_image: `(height, width)`, or `(height, width, channels)` with one channel or three.
      query_label: A word or number above it, or None.
      train_images: N images, of any sizes.
      labels: N words or numbers, or None.
      scores: The query's row of scores, `(N,)`.
      k: At most so many of each.
      cmap: Colour map of images of one channel.
      axes: `1 + 2 k` axes in any arrangement: the query's, those of the helpful, those of the harmful.

    Returns:
      The axes in that order; of a new figure, as many as are needed.

    Raises:
      TypeError, ValueError: If an argument is not of that form or not finite.

    Example:
      >>> from matplotlib.figure import Figure
      >>> pictures, scores = np.ones((4, 8, 8)), np.array([0.3, -0.2, 0.0, 0.1])
      >>> axes = images(pictures[0], 7, pictures, [7, 1, 7, 9], scores, k=2, axes=Figure().subplots(1, 5))
      >>> [ax.get_title() for ax in axes[1:]]
      ['7\n+0.3', '9\n+0.1', '1\n-0.2', '']
    """
    row, helpful, harmful = most(scores, k)
    check_length(train_images, "train_images", len(row))
    check_length([None] * len(row) if labels is None else labels, "labels", len(row))
    query = picture(query_image, "query_image")
    shown = {i: picture(train_images[i], f"train_images[{i}]") for i in map(int, (*helpful, *harmful))}
    limits = shared_limits([query, *shown.values()])
    found = gallery(axes, k, max(1, len(helpful), len(harmful)))
    letters = inches(found[1])[0] * 72 / (LETTER * FONT)
    title = "query" if query_label is None else f"query: {words(query_label)}"
    show(found[0], query, wrapped(title, letters, 2), "black", limits, cmap)
    half = 1 + len(found) // 2
    for places, picks, what, color in (
        (found[1:half], helpful, "helpful (+)", BLUE),
        (found[half:], harmful, "harmful (-)", VERMILION),
    ):
        for ax, i in zip(places, map(int, picks), strict=False):
            label = [] if labels is None else wrapped(words(labels[i]), letters, 2)
            show(ax, shown[i], [*label, f"{row[i]:+.3g}"], color, limits, cmap)
        for ax in places[len(picks) :]:
            leave_empty(ax, "" if len(picks) or ax is not places[0] else "none")
        places[0].set_ylabel(what, color=color, fontsize=FONT)
    return found


def texts(
    query_text: str,
    query_label: Any,
    train_texts: Sequence[str],
    labels: Any,
    scores: Any,
    *,
    k: int = 5,
    lines: int = 2,
    ax: Axes | None = None,
) -> Axes:
    """A query above the training texts that helped it most, and those that hurt it most, with their scores.

    Helpful is a positive score, harmful a negative one: where fewer than k scores have that sign, fewer are shown.

    Args:
      query_text: The query.
      query_label: A word or number, or None.
      train_texts: N texts.
      labels: N words or numbers, or None.
      scores: The query's row of scores, `(N,)`.
      k: At most so many of each.
      lines: Lines of each text that are shown; what is cut off ends in "…".
      ax: Where to draw; the letters shrink to its height.

    Raises:
      TypeError, ValueError: If an argument is not of that form or not finite.

    Example:
      >>> from matplotlib.figure import Figure
      >>> ax = texts("1 + 1 = 2", None, ["2 + 2 = 4", "1 + 1 = 3"], None, np.array([0.8, -2.0]), ax=Figure().subplots())
      >>> [text.get_text() for text in ax.texts]
      ['query', '1 + 1 = 2', 'helpful (score > 0)', '+0.8', '2 + 2 = 4', 'harmful (score < 0)', '-2', '1 + 1 = 3']
    """
    row, helpful, harmful = most(scores, k)
    check_positive(lines, "lines")
    check_length(train_texts, "train_texts", len(row))
    check_length([None] * len(row) if labels is None else labels, "labels", len(row))
    parts: list[Part] = [("query", "black", _passage(query_text, query_label, "query_text"))]
    for picks, what, color in ((helpful, "helpful (score > 0)", BLUE), (harmful, "harmful (score < 0)", VERMILION)):
        parts.append((what, color, None))
        for i in map(int, picks):
            label = None if labels is None else labels[i]
            parts.append((f"{row[i]:+.3g}", color, _passage(train_texts[i], label, f"train_texts[{i}]")))
        if not len(picks):
            parts.append(("", color, "none"))
    return write(ax, parts, lines)


def _passage(text: Any, label: Any, name: str) -> str:
    """A text behind its label."""
    if not isinstance(text, str):
        raise TypeError(f"{name}: got a {type(text).__name__}, expected a str")
    return text if label is None else f"[{words(label)}] {text}"


def most(scores: Any, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A row of scores, the places of its k largest positive ones, and of its k lowest negative ones, extremes first."""
    check_positive(k, "k")
    row = numbers(scores, "scores")
    if row.ndim != 1 or not row.size:
        raise ValueError(f"scores: got shape {row.shape}, expected (N,): the row of one query, such as scores[0]")
    helpful, harmful = (np.argsort(sign * row, kind="stable")[:k] for sign in (-1, 1))
    return row, helpful[row[helpful] > 0], harmful[row[harmful] < 0]


def check_length(items: Any, name: str, count: int) -> None:
    """Raise unless there is one item for every score."""
    if isinstance(items, str) or not hasattr(items, "__len__") or not hasattr(items, "__getitem__"):
        raise TypeError(f"{name}: got {items!r:.60}, expected a sequence or an array, one entry for every score")
    if len(items) != count:
        raise ValueError(f"{name}: got {len(items)}, expected {count}: one for every score")


def words(label: Any) -> str:
    """A label as one reads it."""
    value = np.asarray(label)
    return f"{float(value):.3g}" if value.ndim == 0 and value.dtype.kind == "f" else str(label)


def printable(text: str, count: int) -> str:
    """The first letters of a text, with spaces for what fonts cannot draw."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:count])


def wrapped(text: str, width: float, lines: int) -> list[str]:
    """At most so many lines of at most so many letters; what is cut off ends in an ellipsis."""
    width = max(4, int(width))
    found = textwrap.wrap(printable(text, 8 * width * lines), width) or [""]
    return found if len(found) <= lines else [*found[: lines - 1], found[lines - 1][: width - 1] + "…"]


def picture(image: Any, name: str) -> np.ndarray:
    """An image as float64, `(height, width)` or `(height, width, 3)`."""
    array = numbers(image, name)
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if not array.size or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 3)):
        raise ValueError(
            f"{name}: got shape {array.shape}, expected (height, width), (height, width, 1) or (height, width, 3); "
            "reshape flat images, and move channels last with numpy.moveaxis"
        )
    return array


def shared_limits(pictures: Sequence[np.ndarray]) -> tuple[float, float]:
    """What is black and what is white in all of them: 0 and 1 if no value lies outside, else the extremes."""
    low, high = min(float(np.min(x)) for x in pictures), max(float(np.max(x)) for x in pictures)
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def gallery(axes: Any, k: int, columns: int) -> np.ndarray:
    """Axes of a query, of the helpful and of the harmful: those given, or of a new figure with so many columns."""
    if axes is not None:
        given = np.asarray(axes, object).ravel()
        for ax in given:
            check_axes(ax, "axes")
        if len(given) != 1 + 2 * k:
            raise ValueError(f"axes: got {len(given)}, expected 1 + 2 k = {1 + 2 * k}: query, helpful, harmful")
        return given
    figure = module("pyplot").figure(figsize=(1.25 * (columns + 1.7), 3.4), layout="constrained")
    grid = figure.add_gridspec(2, columns + 1, width_ratios=[1.5] + [1] * columns)
    places = [grid[:, 0], *(grid[row, 1 + column] for row in (0, 1) for column in range(columns))]
    return np.array([figure.add_subplot(place) for place in places], object)


def show(ax: Axes, image: np.ndarray, title: Sequence[str], color: str, limits: tuple[float, float], cmap: str) -> None:
    """An image in a frame of that colour, below lines of a title."""
    low, high = limits
    if image.ndim == 3:
        image = np.clip((image - low) / (high - low or 1), 0, 1)
    ax.imshow(image, cmap=cmap, vmin=low, vmax=high, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.set_title("\n".join(title), fontsize=FONT, color=color, parse_math=False)
    for spine in ax.spines.values():
        spine.set(color=color, linewidth=1.5)


def write(ax: Axes | None, parts: Sequence[Part], lines: int) -> Axes:
    """Rows of `(note, colour, text)`: the notes on the left, the texts beside them on at most so many lines.

    A heading has a note and None.  A new figure is as tall as it takes; on given axes the letters shrink to fit.
    """
    if ax is not None:
        new_or_given(ax).set_axis_off()
        lay_out(ax)
    width = WIDTH if ax is None else inches(ax)[0]
    rows = [
        (note, color, fitted(text, width - COLUMN, lines) if text is not None else []) for note, color, text in parts
    ]
    tall = sum(max(1, len(found)) + (0 if found else GAP) for _, _, found in rows) * LINE * FONT / 72
    ax = new_or_given(ax, WIDTH, tall + 0.1)
    ax.set_axis_off()
    lay_out(ax)
    width, height = inches(ax)
    size = FONT * min(1.0, height / tall)
    step, y = LINE * size / 72 / height, 1.0 - 0.8 * size / 72 / height
    style = {"va": "baseline", "fontsize": size, "parse_math": False, "clip_on": True, "transform": ax.transAxes}
    for note, color, found in rows:
        y -= 0 if found else GAP * step  # room above a heading
        at, side = (COLUMN - 0.1, "right") if found else (0, "left")
        ax.text(at / width, y, note, color=color, ha=side, weight="bold", **style)
        for number, line in enumerate(found):
            ax.text(COLUMN / width, y - number * step, line, color="black", **style)
        y -= max(1, len(found)) * step
    return ax


def fitted(text: str, width: float, lines: int) -> list[str]:
    """At most so many lines that are as wide as that, in inches, if the text's letters are spread evenly."""
    sample, font = printable(text, 500), module("font_manager").FontProperties(size=FONT)
    wide = module("textpath").text_to_path.get_text_width_height_descent(sample, font, ismath=False)[0]
    return wrapped(text, 0.93 * width * 72 * len(sample) / max(wide, 1.0), lines)


def leave_empty(ax: Axes, note: str) -> None:
    """No image here, a word of why perhaps."""
    ax.set(xticks=[], yticks=[], frame_on=False)
    ax.text(0.5, 0.5, note, ha="center", va="center", color=GREY, fontsize=FONT, transform=ax.transAxes)
