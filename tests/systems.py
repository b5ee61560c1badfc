"""Operators of every kind on one small network, and right-hand sides for solvers."""

import helpers
import jax
import jax.numpy as jnp

import influence_jax as ij

PARAMS = helpers.random_mlp(jax.random.key(0), biases=False)
SIZE = ij.tree.size(PARAMS)
DATA = helpers.random_batch(jax.random.key(1), 40, 5, 3, classes=True)
OBJECTIVE = helpers.CLASSIFICATION
OPERATORS = {
    "Hessian": ij.Hessian(OBJECTIVE, PARAMS, DATA),  # indefinite
    "GGN": ij.GGN(OBJECTIVE, PARAMS, DATA),
    "EmpiricalFisher": ij.EmpiricalFisher(OBJECTIVE, PARAMS, DATA),
    "Identity": ij.Identity(PARAMS),
    "Diagonal": ij.Diagonal(jax.tree.map(jnp.square, helpers.random_like(jax.random.key(2), PARAMS))),
    "LowRank": ij.LowRank(
        ij.unflatten(jnp.linalg.qr(helpers.normal(jax.random.key(3), (SIZE, 7)))[0].T, PARAMS), jnp.arange(1.0, 8.0)
    ),
    "Sum": ij.GGN(OBJECTIVE, PARAMS, DATA) + 0.2 * ij.Identity(PARAMS),
    "Scaled": 3.0 * ij.LowRank(ij.unflatten(jnp.eye(SIZE)[:2], PARAMS), jnp.array([1.0, 2.0])),
}
SOLVERS = {"Direct": ij.Direct, "Eigh": ij.Eigh, "CG": lambda damping: ij.CG(damping, rtol=1e-13, max_steps=400)}
EXACT = ["Direct", "Eigh"]


def right_hand_sides(rows: int = 4, seed: int = 5):
    return helpers.random_like(jax.random.key(seed), PARAMS, rows=rows)
