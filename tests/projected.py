"""A classifier and the projections of its gradients by layers, with the key that they are drawn from."""

import jax
import zoo
from helpers import random_batch, random_mlp

from influence_jax.projections import two_sided

KEY = jax.random.key(3)


def of_layers(case: zoo.Case, sides, key=KEY, **options):
    return two_sided(case.objective, case.params, jax.tree.map(lambda x: x[0], case.data), sides, key, **options)


def classifier(examples: int = 11):
    params = random_mlp(jax.random.key(0), (6, 5, 4))
    return params, random_batch(jax.random.key(1), examples, 6, 4, classes=True)
