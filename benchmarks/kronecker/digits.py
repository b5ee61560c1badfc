"""The digits network and its answers: `python digits.py OUTPUT`.

Exact are the scores with the Gauss-Newton matrix, by conjugate gradients on plain jax products in float64.  Beside them
stand those of K-FAC and EK-FAC for each kind of labels, in float64.
"""

import os
import sys
from functools import partial
from pathlib import Path

os.environ["JAX_ENABLE_X64"] = "1"
sys.path.append(str(Path(__file__).parent.parent / "side_by_side"))

import jax
import jax.numpy as jnp
import numpy as np
import problem
import reference
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

SIZES, DAMPING, QUERIES, TRAIN = [64, 128, 64, 10], problem.DAMPING, problem.QUERIES, problem.TRAIN


def forward(params, x):
    """Each layer's input, and the logits."""
    inputs = [x]
    for kernel, bias in params[:-1]:
        inputs.append(np.tanh(inputs[-1] @ kernel + bias))
    return inputs, inputs[-1] @ params[-1][0] + params[-1][1]


def layers(params, x, y, labels):
    """Inputs and output gradients of each layer, by hand: backpropagation through tanh."""
    inputs, logits = forward(params, x)
    outer, pairs = reference.label_gradients(logits, y, labels), []
    for i in reversed(range(len(params))):
        ones = np.ones((len(x), 1))
        pairs.append((np.concatenate([inputs[i], ones], axis=1)[:, None], outer[:, :, None]))
        outer = (outer @ params[i][0].T) * (1 - inputs[i] ** 2)[:, None]
    return pairs[::-1]


def gauss_newton_scores(params, x, y, query_x, query_y):
    """Scores through (GGN + damping)^-1, each query solved by jax's own conjugate gradients."""
    theta, unravel = ravel_pytree(params)
    output = lambda t: problem.predict(unravel(t), x)
    p = jax.nn.softmax(output(theta))

    def product(v):
        _, tangent = jax.jvp(output, (theta,), (v,))
        tangent = p * (tangent - jnp.sum(p * tangent, axis=1, keepdims=True)) / len(x)
        return jax.vjp(output, theta)[1](tangent)[0] + DAMPING * v

    @jax.jit
    def solve(b):
        solution, _ = jax.scipy.sparse.linalg.cg(product, b, tol=1e-11, maxiter=5000)
        return solution, jnp.linalg.norm(product(solution) - b) / jnp.linalg.norm(b)

    one = jax.grad(lambda t, x, y: problem.mean_loss(unravel(t), x[None], y[None]))
    grads = jax.jit(jax.vmap(one, (None, 0, 0)))
    factors, residuals = zip(*map(solve, grads(theta, query_x, query_y)), strict=True)
    assert max(residuals) < 1e-10, max(residuals)
    return jnp.stack(factors) @ grads(theta, x, y).T


def make(path):
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = np.float32(digits.data[order] / 16), digits.target[order].astype(np.int32)
    params = problem.train(SIZES, x[:TRAIN], y[:TRAIN])
    data = [x[:TRAIN], y[:TRAIN], x[TRAIN:][:QUERIES], y[TRAIN:][:QUERIES]]
    wide = jax.tree.map(partial(np.asarray, dtype=np.float64), params)
    answers = {"ggn": gauss_newton_scores(wide, *(jnp.asarray(a) for a in data))}
    train, query = (layers(wide, np.float64(x), y, "empirical") for x, y in (data[:2], data[2:]))
    for labels in ("exact", "empirical", "pseudo"):
        fit = layers(wide, np.float64(data[0]), data[1], labels)
        for kind in ("ekfac", "kfac"):
            answers[f"{kind}_{labels}"] = reference.scores(kind, fit, query, train, DAMPING)
    weights = {f"kernel{i}": kernel for i, (kernel, _) in enumerate(params)}
    weights |= {f"bias{i}": bias for i, (_, bias) in enumerate(params)}
    _, logits = forward(wide, data[2])
    named = dict(zip(("x", "y", "query_x", "query_y"), data, strict=True))
    np.savez(path, sizes=SIZES, damping=DAMPING, logits=logits, **weights, **named, **answers)


if __name__ == "__main__":
    make(sys.argv[1])
