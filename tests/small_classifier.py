"""A small classifier with its data, its GGN, influences through it, and its Kronecker factors."""

import helpers
import jax

import influence_jax as ij

PARAMS = helpers.random_mlp(jax.random.key(0))
BATCH = helpers.random_batch(jax.random.key(1), 9, 5, 3, classes=True)
OBJECTIVE = helpers.CLASSIFICATION
GGN = ij.GGN(OBJECTIVE, PARAMS, BATCH)
INFLUENCE = ij.Influence(OBJECTIVE, PARAMS, ij.invert(GGN, ij.Direct(0.1)))
STACK = jax.tree.map(lambda x: x[None], PARAMS)


def kronecker(**options):
    return ij.kfac(OBJECTIVE, PARAMS, BATCH, **options)
