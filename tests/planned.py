"""What planning is tried on: an influence, queries, and training data that take most of the memory."""

import helpers
import jax
import pytest
from helpers import CLASSIFICATION

import influence_jax as ij

ROWS = 3000


@pytest.fixture(scope="module")
def problem():
    """Influence through no curvature, queries, and training data that take most of the memory."""
    params = helpers.random_mlp(jax.random.key(0), (12, 16, 4))
    train = helpers.random_batch(jax.random.key(1), ROWS, 12, 4, classes=True)
    query = helpers.random_batch(jax.random.key(2), 5, 12, 4, classes=True)
    return ij.Influence(CLASSIFICATION, params, 2.0 * ij.Identity(params)), query, train


def first(batch, rows):
    return jax.tree.map(lambda x: x[:rows], batch)
