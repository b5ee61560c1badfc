"""What type checkers know of a user's program: this file is checked with the package, and runs like any test."""

import pathlib
from typing import Any, assert_type

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import influence_jax as ij

TRAIN = ij.Batch(np.ones((6, 3), np.float32), np.arange(6, dtype=np.int32) % 2)
QUERY = ij.Batch(np.ones((2, 3), np.float32), np.zeros(2, np.int32))


def cross_entropy(logits: jax.Array, example: ij.Batch) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, example.y)


def predict(params: dict[str, jax.Array], example: ij.Batch) -> jax.Array:
    return example.x @ params["w"]


@pytest.mark.usefixtures("float32")
def test_a_users_program(tmp_path: pathlib.Path) -> None:
    """The README's, in the types that it names."""
    params = {"w": jnp.full((3, 2), 0.1, jnp.float32)}
    objective = assert_type(ij.Objective(predict, cross_entropy), ij.Objective)
    curvature = assert_type(ij.GGN(objective, params, TRAIN), ij.GGN)
    inverse = assert_type(ij.invert(curvature, ij.BlockCG(damping=1e-2)), ij.Inverse)
    influence = assert_type(ij.Influence(objective, params, inverse), ij.Influence)
    scores = assert_type(influence.influences(QUERY, TRAIN), jax.Array)
    assert scores.shape == (2, 6)
    best = assert_type(influence.top_k(QUERY, TRAIN, k=2), ij.TopK)
    assert assert_type(best.values, jax.Array).shape == assert_type(best.indices, jax.Array).shape
    assert_type(influence.self_influences(TRAIN), jax.Array)
    factors = assert_type(influence.influence_factors(QUERY), Any)
    assert_type(influence.influences_from_factors(factors, TRAIN), jax.Array)
    assert influence.influences(QUERY, TRAIN, "perturbation").shape == (2, 6, 3)
    x, info = inverse.solve(params)
    assert_type(info, ij.Info)
    assert bool(assert_type(info.converged, jax.Array))
    assert_type(x, Any)

    operator = assert_type(curvature + 0.1 * ij.Identity(params), ij.LinearOperator)
    assert_type(ij.invert(operator, ij.Eigh(ij.RelativeDamping(0.1))).with_damping(0.2), ij.Inverse)
    assert_type(ij.ekfac(objective, params, TRAIN), ij.Kronecker)
    assert_type(ij.spectrum(curvature, 3, key=jax.random.key(0)), ij.Spectrum)
    weighted = ij.EmpiricalFisher(objective, params, TRAIN, weights=np.ones(6, np.float32))
    assert_type(ij.to_dense(weighted), jax.Array)
    blockwise = ij.Blockwise({"head": ij.CG(0.1)}, blocks={"head": ["w"]})
    by_block = ij.Influence(objective, params, ij.invert(curvature, blockwise)).influences_by_block(QUERY, TRAIN)
    assert [assert_type(name, str) for name in by_block] == ["head"]

    model = ij.InfluenceFunctionModel(objective, params).fit(TRAIN)
    assert_type(model, ij.InfluenceFunctionModel)
    assert_type(model.influences(QUERY, TRAIN), jax.Array)
    bounded, bounds, _ = ij.score_bounds(influence, QUERY, TRAIN)
    assert_type((bounded, bounds), tuple[jax.Array, jax.Array])
    masks = assert_type(ij.retrain.subsets(6, 0.5, 4, jax.random.key(0)), np.ndarray)
    assert_type(ij.metrics.lds(scores, masks, jnp.ones((4, 2))), jax.Array)

    loader = [TRAIN]
    assert_type(ij.stream.invert(ij.GGN, objective, params, loader, ij.CG(0.1)), ij.Inverse)
    assert_type(ij.stream.top_k(influence, QUERY, loader, k=2), ij.TopK)
    assert_type(ij.stream.scores(influence, QUERY, loader), np.ndarray)
    store = assert_type(ij.store.ScoreStore.create(tmp_path / "scores"), ij.store.ScoreStore)
    assert_type(ij.stream.scores(influence, QUERY, loader, store), ij.store.ScoreStore)
    ij.store.save(tmp_path / "inverse", inverse)
    assert_type(ij.store.load(tmp_path / "inverse", inverse), Any)


@pytest.mark.usefixtures("float32")
def test_adapters() -> None:
    net = nn.Dense(2)
    objective, params = ij.from_linen(net, net.init(jax.random.key(0), jnp.ones((1, 3))), cross_entropy)
    assert_type((objective, params), tuple[ij.Objective, Any])
    objective, state = ij.from_nnx(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), cross_entropy)
    assert_type((objective, state), tuple[ij.Objective, Any])


def test_the_package_says_that_it_is_typed() -> None:
    assert (pathlib.Path(ij.__file__).parent / "py.typed").exists()
