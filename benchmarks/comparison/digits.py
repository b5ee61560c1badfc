"""Networks trained on digits, and the exact answers in float64, by plain jax and NumPy: nothing of the library is used.

Imported after 64-bit mode is switched on.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

from . import reference

DAMPING = 1e-2


def predict(params, x):
    for kernel, bias in params[:-1]:
        x = jnp.tanh(x @ kernel + bias)
    return x @ params[-1][0] + params[-1][1]


def mean_loss(params, x, y):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(predict(params, x), y))


def train(sizes, x, y, steps):
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


def hessian_product(unravel, theta, x, y):
    gradient = jax.grad(lambda t: mean_loss(unravel(t), x, y))
    return lambda v: jax.jvp(gradient, (theta,), (v,))[1]


def gauss_newton_product(unravel, theta, x, y):
    """Of the mean cross entropy, whose second derivative in the logits is diag(p) - p pᵀ whatever the label."""
    output = lambda t: predict(unravel(t), x)
    p = jax.nn.softmax(output(theta))

    def product(v):
        _, tangent = jax.jvp(output, (theta,), (v,))
        tangent = p * (tangent - jnp.sum(p * tangent, axis=1, keepdims=True)) / len(x)
        return jax.vjp(output, theta)[1](tangent)[0]

    return product


def solve(product, rhs):
    """(A + damping)^-1 of each row, by jax's own conjugate gradients."""
    damped = lambda v: product(v) + DAMPING * v

    @jax.jit
    def one(b):
        solution, _ = jax.scipy.sparse.linalg.cg(damped, b, tol=1e-11, maxiter=5000)
        return solution, jnp.linalg.norm(damped(solution) - b) / jnp.linalg.norm(b)

    solutions, residuals = zip(*map(one, rhs), strict=True)
    assert max(residuals) < 1e-10, max(residuals)
    return jnp.stack(solutions)


def exact(params, x, y, query_x, query_y):
    """Per-example gradients, factors, scores and perturbation scores of the queries."""
    theta, unravel = ravel_pytree(params)

    def grads(x, y):
        one = jax.grad(lambda t, x, y: mean_loss(unravel(t), x[None], y[None]))
        return jax.jit(jax.vmap(one, (None, 0, 0)))(theta, x, y)

    train_grads, query_grads = grads(x, y), grads(query_x, query_y)
    factors = solve(hessian_product(unravel, theta, x, y), query_grads)

    def how(x, y):
        gradient = lambda x: jax.grad(lambda t: mean_loss(unravel(t), x[None], y[None]))(theta)
        return jax.jacrev(lambda x: factors @ gradient(x))(x)

    weights = 1 / (DAMPING + jnp.sum(train_grads**2, axis=1))
    harmonic = (query_grads - (query_grads @ train_grads.T * weights) @ train_grads / len(x)) / DAMPING
    through_gauss_newton = solve(gauss_newton_product(unravel, theta, x, y), query_grads)
    return {
        "grads": train_grads,
        "factors": factors,
        "scores": factors @ train_grads.T,
        "perturbation": jnp.moveaxis(jax.lax.map(lambda z: how(*z), (x, y)), 0, 1),
        "harmonic": harmonic,
        "gauss_newton": through_gauss_newton @ train_grads.T,
    }


def layers(params, x, y, labels):
    """Inputs and output gradients of each layer, by hand: backpropagation through tanh."""
    inputs = [x]
    for kernel, bias in params[:-1]:
        inputs.append(np.tanh(inputs[-1] @ kernel + bias))
    logits, pairs = inputs[-1] @ params[-1][0] + params[-1][1], []
    outer = reference.label_gradients(logits, y, labels)
    for i in reversed(range(len(params))):
        ones = np.ones((len(x), 1))
        pairs.append((np.concatenate([inputs[i], ones], axis=1)[:, None], outer[:, :, None]))
        outer = (outer @ params[i][0].T) * (1 - inputs[i] ** 2)[:, None]
    return pairs[::-1]


def structured(params, x, y, query_x, query_y):
    """Scores by structured curvatures, for each kind of labels."""
    of_data, query = (layers(params, *pair, "empirical") for pair in ((x, y), (query_x, query_y)))
    answers = {}
    for labels in ("exact", "empirical", "pseudo"):
        fit = layers(params, x, y, labels)
        kinds = ("ekfac", "kfac", *(("identity", "diagonal") if labels == "empirical" else ()))
        answers |= {f"{k}_{labels}": reference.scores(k, fit, query, of_data, DAMPING) for k in kinds}
    return answers | {"self_influence": reference.self_influence("ekfac", of_data, of_data, DAMPING)}


def make(sizes, count=1500, queries=50, steps=4000):
    """Arrays of a problem: weights, data, logits of the queries and answers."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = np.float32(digits.data[order] / 16), digits.target[order].astype(np.int32)
    params = train(sizes, x[:count], y[:count], steps)
    data = {"x": x[:count], "y": y[:count], "query_x": x[count:][:queries], "query_y": y[count:][:queries]}
    wide = {name: np.float64(value) if "x" in name else value for name, value in data.items()}
    params_wide = jax.tree.map(partial(np.asarray, dtype=np.float64), params)
    answers = exact(params_wide, *map(jnp.asarray, wide.values())) | structured(params_wide, *wide.values())
    weights = {f"kernel{i}": kernel for i, (kernel, _) in enumerate(params)}
    weights |= {f"bias{i}": bias for i, (_, bias) in enumerate(params)}
    logits = predict(params_wide, wide["query_x"])
    return {"sizes": sizes, "damping": DAMPING, "logits": logits, **weights, **data, **answers}
