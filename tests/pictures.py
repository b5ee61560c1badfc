"""Data to draw, axes to draw them on, and what is read off a drawn picture."""

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import influence_jax as ij

mpl.use("agg")
import matplotlib.pyplot as plt

RNG = np.random.default_rng(0)
IMAGES = RNG.random((6, 5, 4))
SCORES = np.array([0.5, -2.0, 0.0, 1.5, -0.25, 1e-3])
TEXTS = [f"passage number {i}" for i in range(6)]
RITZ = ij.spectrum(ij.Diagonal({"w": jnp.array([1e-3, 1e-2, 0.1, 1.0])}), 4, key=jax.random.key(0), probes=2)
SWEEP = (np.array([1e-3, 1.0, 1e-2]), np.array([0.7, 0.1, 0.9]))


def axes_of_a_figure():
    return Figure().subplots()


def row_of_axes(k):
    return Figure(figsize=(12, 2)).subplots(1, 1 + 2 * k)


def ritz_of(*values):
    """What Lanczos finds with a start that meets all eigenvectors alike."""
    values = jnp.asarray(values)[None]
    return ij.Spectrum(values, jnp.full_like(values, 1 / values.size), jnp.zeros_like(values), size=values.size)


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def written(ax):
    return [text.get_text() for text in ax.texts]


def drawn(ax):
    """Draw the whole figure; what measures the extents of its parts."""
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    return canvas.get_renderer()


def hex_of(color):
    return to_hex(color).upper()


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")
