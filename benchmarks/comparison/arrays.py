"""Arrays in an order that all sides share."""

import itertools

import numpy as np

LOGITS = 1e-4  # how far apart the sides' logits may lie


def flat(layers):
    """Rows of (stacked) parameters in one order for all sides: by layer, kernel (in, out), then bias."""
    return np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for layer in layers for leaf in layer], axis=1)


def unflat(rows, sizes):
    """The inverse of `flat`: for each layer a stack of kernels and one of biases."""
    layers, start = [], 0
    for fan_in, fan_out in itertools.pairwise(sizes):
        kernel = rows[:, start : start + fan_in * fan_out].reshape(-1, fan_in, fan_out)
        start += fan_in * fan_out
        layers.append((kernel, rows[:, start : start + fan_out]))
        start += fan_out
    return layers


def check(logits, problem):
    """The sides have the same network, or there is nothing to compare."""
    np.testing.assert_allclose(logits, problem["logits"], rtol=0, atol=LOGITS)


def distance(answer, exact):
    """Relative, in the Frobenius norm."""
    return float(np.linalg.norm(answer - exact) / np.linalg.norm(exact))
