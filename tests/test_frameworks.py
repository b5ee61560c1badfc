"""Every method on every kind of model, against brute force on the flattened parameters."""

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import relative_error

import influence_jax as ij

DAMPING = 0.1


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax mixes dtypes itself."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Convolutions(nn.Module):
    """A convolution without bias, batch norm on running statistics, a dense head."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Conv(2, (2, 2), use_bias=False, param_dtype=jnp.float64)(x)
        x = nn.BatchNorm(use_running_average=not train, param_dtype=jnp.float64)(x)
        return nn.Dense(3, param_dtype=jnp.float64)(jnp.tanh(x).reshape(x.shape[0], -1))


def linen_convolutions(key):
    net = Convolutions()
    batch = ij.Batch(jax.random.normal(key, (8, 3, 3, 1)), jax.random.randint(key, (8,), 0, 3))
    variables = net.init(key, batch.x)
    stats = jax.tree.map(lambda x: x.astype(jnp.float64) + 0.5, variables["batch_stats"])
    return *ij.from_linen(net, {**variables, "batch_stats": stats}, helpers.cross_entropy), batch


def nnx_network(key):
    net = nnx.Sequential(
        nnx.Linear(5, 4, rngs=nnx.Rngs(0), param_dtype=jnp.float64),
        jnp.tanh,
        nnx.Linear(4, 3, rngs=nnx.Rngs(1), param_dtype=jnp.float64),
    )
    net.eval()
    return *ij.from_nnx(net, helpers.cross_entropy), helpers.random_batch(key, 8, 5, 3, classes=True)


def nested_tuples(key):
    params = ((jax.random.normal(key, (5, 4)), [jnp.zeros(4)]), (jax.random.normal(key, (4, 3)),))

    def predict(params, example):
        (first, [bias]), (second,) = params
        return jnp.tanh(example.x @ first + bias) @ second

    return ij.Objective(predict, helpers.cross_entropy), params, helpers.random_batch(key, 8, 5, 3, classes=True)


def one_array(key):
    objective = ij.Objective(lambda w, z: z.x @ w, helpers.cross_entropy)
    return objective, jax.random.normal(key, (5, 3)), helpers.random_batch(key, 8, 5, 3, classes=True)


@pytest.mark.parametrize("build", [linen_convolutions, nnx_network, nested_tuples, one_array])
def test_every_method(build):
    objective, params, data = build(jax.random.key(0))
    query = jax.tree.map(lambda x: x[:3], data)
    flat, loss = ij.flatten(params, params), helpers.flat_objective(objective, params)
    grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(flat, data)
    matrix = ij.to_dense(ij.GGN(objective, params, data)) + DAMPING * jnp.eye(len(flat))
    factors = jnp.linalg.solve(matrix, grads.T).T
    expected = factors @ grads.T

    model = ij.InfluenceFunctionModel(objective, params, solver=ij.Direct(DAMPING)).fit(data)
    assert model.n_parameters == len(flat)
    assert relative_error(ij.flatten(model.influence_factors(query), params), factors[:3]) < 1e-9
    assert relative_error(model.influences(query, data), expected[:3]) < 1e-9
    assert relative_error(model.self_influences(data), jnp.diag(expected)) < 1e-9
    assert model.top_k(query, data, 2).indices.tolist() == jnp.argsort(-expected[:3], axis=1)[:, :2].tolist()

    input_gradient = jax.grad(lambda x, f, z: loss(f, _with(z, x)))
    mixed = jax.jit(jax.vmap(jax.jacfwd(input_gradient, argnums=1), (0, None, 0)))
    perturbed = model.influences(query, data, "perturbation")
    jacobians = mixed(data.x, flat, data)
    assert relative_error(perturbed, jnp.tensordot(factors[:3], jacobians, axes=([1], [jacobians.ndim - 1]))) < 1e-9

    by_block = model.influences_by_block(query, data, blocks=ij.by_parameter)
    assert len(by_block) == len(jax.tree.leaves(params))
    assert relative_error(sum(by_block.values()), expected[:3]) < 1e-9


def _with(example: ij.Batch, x: jax.Array) -> ij.Batch:
    """The example with another input."""
    return jax.tree.unflatten(jax.tree.structure(example), [x, example.y])


def test_tokens_are_perturbed_through_their_embeddings():
    """Integers have no derivative; the way out is to make the embeddings a part of the example."""
    key = jax.random.key(0)
    params = {"table": jax.random.normal(key, (7, 4)), "head": jax.random.normal(key, (4, 3))}
    tokens, labels = jax.random.randint(key, (6, 2), 0, 7), jnp.arange(6) % 3

    def head(params, embeddings):
        return jnp.tanh(embeddings).mean(0) @ params["head"]

    whole = ij.Objective(lambda p, z: head(p, p["table"][z["tokens"]]), lambda out, z: -jax.nn.log_softmax(out)[z["y"]])
    data = {"tokens": tokens, "y": labels}
    influence = ij.Influence(whole, params, ij.Identity(params))
    with pytest.raises(TypeError, match=r"wrt: part 'tokens' is int.*embed them first"):
        influence.influences(data, data, "perturbation", wrt="tokens")

    embedded = {"embeddings": params["table"][tokens], "y": labels}
    split = ij.Objective(lambda p, z: head(p, z["embeddings"]), lambda out, z: -jax.nn.log_softmax(out)[z["y"]])
    rest = {"head": params["head"]}
    through = ij.Influence(split, rest, ij.Identity(rest))
    perturbed = through.influences(embedded, embedded, "perturbation", wrt="embeddings")
    assert perturbed.shape == (6, 6, 2, 4)
    step = 1e-6 * jax.random.normal(key, embedded["embeddings"].shape)
    moved = [dict(embedded, embeddings=embedded["embeddings"] + sign * step) for sign in (1, -1)]
    difference = (through.influences(embedded, moved[0]) - through.influences(embedded, moved[1])) / 2
    assert relative_error(jnp.einsum("qntd,ntd->qn", perturbed, step), difference) < 1e-6
