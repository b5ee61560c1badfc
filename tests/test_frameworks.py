"""Every method on every kind of model, against brute force on the flattened parameters."""

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from helpers import mainly, relative_error
from zoo import started

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
    batch = ij.Batch(helpers.normal(key, (8, 3, 3, 1)), jax.random.randint(key, (8,), 0, 3))
    shapes = jax.eval_shape(net.init, key, batch.x)
    statistics = {"mean": np.full(2, 0.5), "var": np.full(2, 1.5)}
    variables = {"params": started(shapes["params"]), "batch_stats": {"BatchNorm_0": statistics}}
    assert jax.tree.structure(variables) == jax.tree.structure(shapes)
    return *ij.from_linen(net, variables, helpers.cross_entropy), batch


def linen_dense(key):
    net = nn.Sequential([nn.Dense(4, param_dtype=jnp.float64), nn.tanh, nn.Dense(3, param_dtype=jnp.float64)])
    batch = helpers.random_batch(key, 8, 5, 3, classes=True)
    return *ij.from_linen(net, started(jax.eval_shape(net.init, key, batch.x)), helpers.cross_entropy), batch


def nnx_network(key):
    layer = lambda *sizes: nnx.Linear(*sizes, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    definition, shapes = nnx.split(nnx.eval_shape(lambda: nnx.Sequential(layer(5, 4), jnp.tanh, layer(4, 3))))
    net = nnx.merge(definition, started(shapes))
    net.eval()
    return *ij.from_nnx(net, helpers.cross_entropy), helpers.random_batch(key, 8, 5, 3, classes=True)


def nested_tuples(key):
    params = ((helpers.normal(key, (5, 4)), [jnp.zeros(4)]), (helpers.normal(key, (4, 3)),))

    def predict(params, example):
        (first, [bias]), (second,) = params
        return jnp.tanh(example.x @ first + bias) @ second

    return ij.Objective(predict, helpers.cross_entropy), params, helpers.random_batch(key, 8, 5, 3, classes=True)


def one_array(key):
    objective = ij.Objective(lambda w, z: z.x @ w, helpers.cross_entropy)
    return objective, helpers.normal(key, (5, 3)), helpers.random_batch(key, 8, 5, 3, classes=True)


class Problem:
    """A model with its dense reference: per-example gradients, curvature, and gradients' derivatives in the input."""

    def __init__(self, build):
        self.objective, self.params, self.data = build(jax.random.key(0))
        self.query = jax.tree.map(lambda x: x[:3], self.data)
        flat, loss = ij.flatten(self.params, self.params), helpers.flat_objective(self.objective, self.params)
        self.grads = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(flat, self.data)
        self.matrix = ij.to_dense(ij.GGN(self.objective, self.params, self.data))
        input_gradient = jax.grad(lambda x, f, z: loss(f, _with(z, x)))
        mixed = jax.jit(jax.vmap(jax.jacfwd(input_gradient, argnums=1), (0, None, 0)))
        self.mixed = mixed(self.data.x, flat, self.data)  # (N, *x.shape, P)

    def model(self, **kwargs):
        model = ij.InfluenceFunctionModel(self.objective, self.params, solver=ij.Direct(DAMPING), **kwargs)
        return model.fit(self.data)

    def flat(self, factors):
        return helpers.flat(factors, self.params)

    def factors(self, mask=1.0):
        """Gradients solved with the damped curvature, entries outside `mask` (P, P) zeroed."""
        return jnp.linalg.solve(self.matrix * mask + DAMPING * jnp.eye(len(self.matrix)), self.grads.T).T

    def perturbed(self, factors):
        return jnp.tensordot(factors[:3], self.mixed, axes=([1], [self.mixed.ndim - 1]))


CONVOLUTIONS = pytest.param(linen_convolutions, marks=[pytest.mark.as_users, pytest.mark.thorough])
BUILDS = mainly([linen_dense, nnx_network, nested_tuples, one_array], linen_dense, nnx_network, one_array)


@pytest.fixture(params=[*BUILDS, CONVOLUTIONS], scope="module")
def problem(request):
    with jax.numpy_dtype_promotion("standard"):
        return Problem(request.param)


def test_every_method(problem):
    data, query, factors = problem.data, problem.query, problem.factors()
    expected = factors @ problem.grads.T
    model = problem.model()
    assert model.n_parameters == len(problem.matrix)
    solved = model.influence_factors(query)
    assert relative_error(problem.flat(solved), factors[:3]) < 1e-9
    assert relative_error(model.influences(query, data), expected[:3]) < 1e-9
    assert relative_error(model.influences_from_factors(solved, data), expected[:3]) < 1e-9
    assert relative_error(model.self_influences(data), jnp.diag(expected)) < 1e-9
    assert model.top_k(query, data, 2).indices.tolist() == jnp.argsort(-expected[:3], axis=1)[:, :2].tolist()
    assert relative_error(model.influences(query, data, "perturbation"), problem.perturbed(factors)) < 1e-9


def test_every_method_by_block(problem):
    data, query = problem.data, problem.query
    model = problem.model(blocks=ij.by_parameter)
    sizes = [leaf.size for leaf in jax.tree.leaves(problem.params)]
    inside = np.repeat(np.eye(len(sizes)), sizes, axis=1)  # (blocks, P)
    factors = problem.factors(inside.T @ inside)
    up = jnp.einsum("qp,bp,np->bqn", factors[:3], inside, problem.grads)

    assert len(model.block_names) == len(sizes)
    solved = model.influence_factors_by_block(query)
    assert relative_error(problem.flat(model.influence_factors(query)), factors[:3]) < 1e-9
    by_block = model.influences_by_block(query, data)
    assert list(by_block) == list(solved) == list(model.block_names)
    assert relative_error(jnp.stack(list(by_block.values())), up) < 1e-9
    again = model.influences_from_factors_by_block(solved, data)
    assert relative_error(jnp.stack(list(again.values())), up) < 1e-9
    last = model.block_names[-1]
    block = model.influence.block(last).influences(query, data, "perturbation")
    assert relative_error(block, problem.perturbed(factors * inside[-1:])) < 1e-9
    split = problem.model().influences_by_block(query, data, blocks=ij.by_parameter)
    assert relative_error(sum(split.values()), (problem.factors() @ problem.grads.T)[:3]) < 1e-9


def _with(example: ij.Batch, x: jax.Array) -> ij.Batch:
    """The example with another input."""
    return jax.tree.unflatten(jax.tree.structure(example), [x, example.y])


def test_scores_in_a_jitted_function_of_a_train_state():
    """As `examples/training_loop.py` does it: the optax state goes in, scores come out, nothing is compiled twice."""
    objective, params, data = linen_dense(jax.random.key(0))
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(1e-2))
    traces = []

    @jax.jit
    def step_and_score(state, data):
        traces.append(1)
        loss = lambda p: jnp.mean(jax.vmap(objective, (None, 0))(p, data))
        state = state.apply_gradients(grads=jax.grad(loss)(state.params))
        inverse = ij.invert(ij.GGN(objective, state.params, data), ij.CG(DAMPING, rtol=1e-12))
        return state, ij.Influence(objective, state.params, inverse).influences(data, data)

    for _ in range(3):
        state, scores = step_and_score(state, data)
        exact = ij.InfluenceFunctionModel(objective, state.params, solver=ij.Direct(DAMPING)).fit(data)
        assert relative_error(scores, exact.influences(data)) < 1e-9
    assert int(state.step) == 3
    assert len(traces) == 1


def test_tokens_are_perturbed_through_their_embeddings():
    """Integers have no derivative; the way out is to make the embeddings a part of the example."""
    key = jax.random.key(0)
    params = {"table": helpers.normal(key, (7, 4)), "head": helpers.normal(key, (4, 3))}
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
    step = 1e-6 * helpers.normal(key, embedded["embeddings"].shape)
    moved = [dict(embedded, embeddings=embedded["embeddings"] + sign * step) for sign in (1, -1)]
    difference = (through.influences(embedded, moved[0]) - through.influences(embedded, moved[1])) / 2
    assert relative_error(jnp.einsum("qntd,ntd->qn", perturbed, step), difference) < 1e-6
