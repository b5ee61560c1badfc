"""A softmax regression that is trained on subsets: its data, masks, keys, and what numpy gives for each subset."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, random_batch

from influence_jax import _runs
from influence_jax._pytree import dataclass, static
from influence_jax.retrain import retrain, subsets

EXAMPLES, INPUTS, CLASSES, STEPS, RATE = 24, 4, 3, 12, 0.5
DATA = random_batch(jax.random.key(1), EXAMPLES, INPUTS, CLASSES, classes=True)
QUERY = random_batch(jax.random.key(2), 5, INPUTS, CLASSES, classes=True)
KEYS = jax.random.split(jax.random.key(3), 2)
MASKS = subsets(EXAMPLES, 0.5, 9, jax.random.key(4))
MANY = subsets(EXAMPLES, 0.5, 48, jax.random.key(5))
WAYS = ("each", "map", "vmap")


def descended(x, y, weights, key, steps=STEPS):
    """Softmax regression by gradient descent, from a start drawn with the key."""
    start = 0.1 * jax.random.normal(key, (INPUTS, CLASSES), weights.dtype)

    def loss(kernel):
        logits = x @ kernel
        losses = jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
        return weights @ losses / jnp.sum(weights)

    step = lambda kernel, _: (kernel - RATE * jax.grad(loss)(kernel), None)
    return {"kernel": jax.lax.scan(step, start, None, length=steps)[0]}


@dataclass
class Descent:
    """A training that is a tree, with its data as leaves."""

    x: jax.Array
    y: jax.Array
    steps: int = static(default=STEPS)

    def __call__(self, weights, key):
        return descended(self.x, self.y, weights, key, self.steps)


def losses(query, params):
    logits = query.x @ params["kernel"]
    return jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, query.y[:, None], axis=1)[:, 0]


TRAIN = Descent(jnp.asarray(DATA.x), jnp.asarray(DATA.y))
MEASURE = jax.tree_util.Partial(losses, jax.tree.map(jnp.asarray, QUERY))
quietly = functools.partial(retrain, progress=False)


def on_subset(mask, key):
    """The same training in numpy, on the examples of the subset alone."""
    x, y = DATA.x[mask], DATA.y[mask]
    kernel = 0.1 * normal(key, (INPUTS, CLASSES))
    for _ in range(STEPS):
        logits = x @ kernel
        odds = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        kernel = kernel - RATE * x.T @ (odds - np.eye(CLASSES)[y]) / len(x)
    return kernel


@functools.cache
def expected():
    kernels = np.asarray([[on_subset(mask, key) for key in KEYS] for mask in MASKS])
    logits = QUERY.x @ kernels
    own = np.take_along_axis(logits, np.broadcast_to(QUERY.y[:, None], (*logits.shape[:-1], 1)), axis=-1)
    return kernels, np.log(np.exp(logits).sum(axis=-1)) - own[..., 0]


@pytest.fixture
def computed(monkeypatch):
    """Groups that are computed, and by which way."""
    seen, compute = [], _runs.Runs.compute

    def spy(self, number, way):
        seen.append((number, way))
        return compute(self, number, way)

    monkeypatch.setattr(_runs.Runs, "compute", spy)
    return seen
