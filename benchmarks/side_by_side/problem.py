"""The trained network, the data, and the exact answers in float64, by plain jax: nothing of the library is used."""

import os
import sys

os.environ["JAX_ENABLE_X64"] = "1"

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

DAMPING, QUERIES, TRAIN = 1e-2, 50, 1500


def predict(params, x):
    for kernel, bias in params[:-1]:
        x = jnp.tanh(x @ kernel + bias)
    return x @ params[-1][0] + params[-1][1]


def mean_loss(params, x, y):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(predict(params, x), y))


def train(sizes, x, y, steps=4000):
    """Adam on all data with weight decay in the loss, to where the Hessian is nearly positive definite."""
    rng = np.random.default_rng(0)
    params = [
        (jnp.asarray(rng.normal(size=(i, o)) / np.sqrt(i), jnp.float32), jnp.zeros(o, jnp.float32))
        for i, o in itertools.pairwise(sizes)
    ]
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def objective(p):
        return mean_loss(p, x, y) + 5e-4 * optax.tree.norm(p, squared=True)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(objective)(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, steps)[0][0])(params)


def solve(params, x, y, rhs):
    """(H + damping)^-1 of each row, by jax's own conjugate gradients on plain Hessian-vector products."""
    theta, unravel = ravel_pytree(params)

    @jax.jit
    def one(b):
        grad = jax.grad(lambda t: mean_loss(unravel(t), x, y))
        product = lambda v: jax.jvp(grad, (theta,), (v,))[1] + DAMPING * v
        solution, _ = jax.scipy.sparse.linalg.cg(product, b, tol=1e-11, maxiter=5000)
        return solution, jnp.linalg.norm(product(solution) - b) / jnp.linalg.norm(b)

    solutions, residuals = zip(*map(one, rhs), strict=True)
    assert max(residuals) < 1e-10, max(residuals)
    return jnp.stack(solutions)


def residuals(problem, factors):
    """Relative residual of each row of factors, in float64."""
    x, y, grads = (problem[name] for name in ("x", "y", "query_grads"))
    layers = [(problem[f"kernel{i}"], problem[f"bias{i}"]) for i in range(len(problem["sizes"]) - 1)]
    theta, unravel = ravel_pytree(jax.tree.map(partial(jnp.asarray, dtype=jnp.float64), layers))

    @jax.jit
    def product(v):
        return jax.jvp(jax.grad(lambda t: mean_loss(unravel(t), x, y)), (theta,), (v,))[1] + DAMPING * v

    factors = jnp.asarray(factors, jnp.float64)
    rows = [jnp.linalg.norm(product(f) - g) / jnp.linalg.norm(g) for f, g in zip(factors, grads, strict=True)]
    return float(max(rows))


def exact(params, x, y, qx, qy):
    """Per-example gradients, factors, scores and perturbation scores of the queries."""

    def grads(x, y):
        one = jax.grad(lambda p, x, y: mean_loss(p, x[None], y[None]))
        return jax.vmap(lambda x, y: ravel_pytree(one(params, x, y))[0])(x, y)

    train_grads, query_grads = grads(x, y), grads(qx, qy)
    factors = solve(params, x, y, query_grads)

    def how(x, y):
        gradient = lambda x: ravel_pytree(jax.grad(lambda p: mean_loss(p, x[None], y[None]))(params))[0]
        return jax.jacrev(lambda x: factors @ gradient(x))(x)

    weights = 1 / (DAMPING + jnp.sum(train_grads**2, axis=1))
    harmonic = (query_grads - (query_grads @ train_grads.T * weights) @ train_grads / len(x)) / DAMPING
    perturbation = jnp.moveaxis(jax.lax.map(lambda z: how(*z), (x, y)), 0, 1)
    return {
        "grads": train_grads,
        "query_grads": query_grads,
        "factors": factors,
        "scores": factors @ train_grads.T,
        "perturbation": perturbation,
        "harmonic": harmonic,
    }


def make(sizes, path):
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = np.float32(digits.data[order] / 16), digits.target[order].astype(np.int32)
    params = train(sizes, x[:TRAIN], y[:TRAIN])
    wide = jax.tree.map(partial(jnp.asarray, dtype=jnp.float64), params)
    data = [jnp.asarray(a) for a in (x[:TRAIN], y[:TRAIN], x[TRAIN:][:QUERIES], y[TRAIN:][:QUERIES])]
    answers = exact(wide, data[0].astype(jnp.float64), data[1], data[2].astype(jnp.float64), data[3])
    layers = {f"kernel{i}": kernel for i, (kernel, _) in enumerate(params)}
    layers |= {f"bias{i}": bias for i, (_, bias) in enumerate(params)}
    names = ("x", "y", "query_x", "query_y")
    np.savez(path, sizes=sizes, **layers, **dict(zip(names, data, strict=True)), **answers)


if __name__ == "__main__":
    make([int(size) for size in sys.argv[2].split("-")], sys.argv[1])
