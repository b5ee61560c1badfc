"""A small classifier, its data, whole and cut into batches, and its influence in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import influence_jax as ij

N, Q, INPUTS, HIDDEN, CLASSES = 103, 7, 6, 5, 3


def predict(params, example):
    return jnp.tanh(example["x"] @ params["in"]) @ params["out"] + params["bias"]


def loss(output, example):
    return jax.nn.logsumexp(output) - output[example["y"]]


OBJECTIVE = ij.Objective(predict, loss)
KEY = jax.random.key(0)


@functools.cache
def problem():
    draw = np.random.default_rng(0)
    shapes = {"in": (INPUTS, HIDDEN), "out": (HIDDEN, CLASSES), "bias": (CLASSES,)}
    params = {name: 0.5 * draw.normal(size=shape) for name, shape in shapes.items()}
    data = {"x": draw.normal(size=(N, INPUTS)), "y": draw.integers(0, CLASSES, N)}
    return params, data, jax.tree.map(lambda x: x[:Q], data)


def cut(data, size):
    return [jax.tree.map(lambda x, i=i: x[i : i + size], data) for i in range(0, len(data["y"]), size)]


@functools.cache
def influence():
    params, data, _ = problem()
    return ij.Influence(OBJECTIVE, params, ij.invert(ij.GGN(OBJECTIVE, params, data), ij.Direct(0.1)))
