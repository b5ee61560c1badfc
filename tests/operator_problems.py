"""Small models with parameters and data that operators are built from, and how many examples they have."""

import helpers
import jax
import jax.numpy as jnp

import influence_jax as ij

COUNT = 13


def dead_unit(params: dict, example: ij.Batch) -> jax.Array:
    """A network whose parameter `unused` never matters, without biases."""
    return jnp.tanh(example.x @ params["first"]) @ params["second"] + 0.0 * jnp.sum(params["unused"])


def dead_params(key: jax.Array) -> dict:
    return helpers.random_like(key, {"first": jnp.ones((5, 4)), "second": jnp.ones((4, 3)), "unused": jnp.ones(2)})


MODELS = {
    "regression": (helpers.REGRESSION, helpers.random_mlp, False),
    "classification": (helpers.CLASSIFICATION, helpers.random_mlp, True),
    "dead, bias-free": (ij.Objective(dead_unit, helpers.cross_entropy), dead_params, True),
}


def problem(model: str, count: int = COUNT, seed: int = 0):
    objective, init, classes = MODELS[model]
    key_params, key_data = jax.random.split(jax.random.key(seed))
    return objective, init(key_params), helpers.random_batch(key_data, count, 5, 3, classes=classes)
