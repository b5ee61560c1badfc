"""What is trained on what: digits, a softmax regression and a small network, and their trainings."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import influence_jax as ij

TRAIN, QUERIES, TUNING = 1000, 100, 50
HIDDEN = 32


def data():
    """Training data, queries, and other queries by which dampings are chosen."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = np.float32(digits.data[order] / 16), digits.target[order].astype(np.int32)
    ends = np.cumsum([0, TRAIN, QUERIES, TUNING])
    return [{"x": jnp.asarray(x[a:b]), "y": jnp.asarray(y[a:b])} for a, b in itertools.pairwise(ends)]


def predict(params, example):
    """Dense layers in the order of their names, tanh between them."""
    hidden = example["x"]
    *inner, last = (params[name] for name in sorted(params))
    for layer in inner:
        hidden = jnp.tanh(hidden @ layer["kernel"] + layer["bias"])
    return hidden @ last["kernel"] + last["bias"]


def cross_entropy(logits, example):
    return jax.nn.logsumexp(logits) - logits[example["y"]]


OBJECTIVE = ij.Objective(predict, cross_entropy)


def losses(query, params):
    """Of every query, `(Q,)`."""
    return jax.vmap(OBJECTIVE, (None, 0))(params, query)


def start(sizes, key):
    """Random weights."""
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        f"layer{i}": {"kernel": jax.random.normal(k, (a, b)) / jnp.sqrt(a), "bias": jnp.zeros(b)}
        for i, (k, a, b) in enumerate(zip(keys, sizes, sizes[1:], strict=False))
    }


def network(key):
    return start((64, HIDDEN, 10), key)


class Recipe(NamedTuple):
    """A model, its L2 penalty, and how it is trained."""

    name: str
    penalty: float
    seeds: int
    epochs: int
    batch_size: int | None
    optimizer: optax.GradientTransformation
    params: object
    convex: bool

    def training(self, train, batches="own"):
        """As a function of weights and a key."""
        how = {"epochs": self.epochs, "batch_size": self.batch_size, "penalty": self.penalty, "batches": batches}
        return ij.retrain.training(OBJECTIVE, self.optimizer, self.params, train, **how)


def softmax(penalty):
    """Convex, trained to its optimum by full batches."""
    zeros = jax.tree.map(jnp.zeros_like, start((64, 10), jax.random.key(0)))
    optimizer = optax.sgd(1.0, momentum=0.97, nesterov=True)
    return Recipe(f"softmax, penalty {penalty:g}", penalty, 1, 1000, None, optimizer, zeros, True)


RATE = 0.1
MLP = Recipe("network", 1e-3, 10, 30, 50, optax.sgd(RATE, momentum=0.9), network, False)
