"""Models that compute over their own batch are refused: on a batch of one they give another number, in silence."""

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import relative_error

import influence_jax as ij
from influence_jax import _rows

X = np.random.default_rng(0).normal(size=(6, 5))
ROWS = {"x": X, "y": np.ones((6, 3))}
ONE = jax.tree.map(lambda x: x[0], ROWS)


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax mixes dtypes itself, and models ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def squares(output, z):
    return 0.5 * jnp.sum((output - z["y"]) ** 2)


def dense(x, width=3):
    return nn.Dense(width, param_dtype=jnp.float64)(x)


def centred(x):
    out = dense(x)
    return out - out.mean(0)


def standardised(x):
    hidden = dense(x)
    return dense((hidden - hidden.mean(0)) / jnp.sqrt(hidden.var(0) + 1e-3))


def contrasted(x):
    hidden = dense(x)
    return jax.nn.log_softmax(hidden @ hidden.T)


def attended_over_the_batch(x):
    hidden = dense(x)
    return jax.nn.softmax(hidden @ hidden.T) @ hidden


def routed(x):
    """A mixture of experts, each of which takes no more than a share of the batch."""
    gate = jax.nn.softmax(dense(x))
    taken = jax.nn.one_hot(jnp.argmax(gate, -1), 3)
    place = jnp.sum(jnp.cumsum(taken, 0) * taken, -1, keepdims=True)
    outputs = jnp.stack([dense(x) for _ in range(3)], 1)
    return jnp.where(place <= max(1, len(x) // 3), jnp.einsum("be,beh->bh", taken * gate, outputs), 0)


OVER_THE_BATCH = [centred, standardised, attended_over_the_batch, routed]


def shifted(x):
    """A shift by the largest entry of the batch, for range only: it cancels."""
    out = dense(x)
    out = out - jax.lax.stop_gradient(jnp.max(out))
    return out - jax.nn.logsumexp(out, -1, keepdims=True)


def written_for_one(x):
    return dense(x.reshape(1, 5))


APART = [shifted, written_for_one]


def linen(apply):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return apply(x)

    net = Net()
    return net, net.init(jax.random.key(0), X[:1])


@pytest.mark.parametrize("apply", OVER_THE_BATCH)
def test_linen(apply):
    net, variables = linen(apply)
    objective, params = ij.from_linen(net, variables, squares)
    words = r"module: Net computes over the batch .*one row changes by .*%.*use_running_average=True"
    with pytest.raises(ValueError, match=words):
        objective(params, ONE)
    with pytest.raises(ValueError, match=words):  # again, and where all is traced
        ij.per_example_grads(objective, params, ROWS)


def test_linen_of_another_shape():
    net, variables = linen(contrasted)
    objective, params = ij.from_linen(net, variables, lambda out, z: -out[0])
    with pytest.raises(ValueError, match=r"one row has shape \(8,\) in a batch of 8, but \(1,\) alone"):
        jax.jit(objective)(params, ONE)


def test_nnx():
    class Standard(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(5, 3, rngs=nnx.Rngs(0), param_dtype=jnp.float64)

        def __call__(self, x):
            out = self.linear(x)
            return out / jnp.linalg.norm(out, axis=0)

    objective, params = ij.from_nnx(Standard(), squares)
    with pytest.raises(ValueError, match="module: Standard computes over the batch"):
        ij.GGN(objective, params, ROWS).mv(params)


@pytest.mark.parametrize("apply", APART)
def test_what_treats_rows_apart_is_taken(apply):
    net, variables = linen(apply)
    objective, params = ij.from_linen(net, variables, squares)
    expected = [squares(net.apply(variables, x[None])[0], {"y": 1.0}) for x in X]
    assert relative_error(jax.vmap(objective, (None, 0))(params, ROWS), np.array(expected)) < 1e-12


class Model:
    def __init__(self, net):
        self.net = net

    def on_batch(self, variables, inputs):
        return self.net.apply(variables, inputs)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_rounding_is_no_dependence(dtype):
    """Attention over positions, a norm and tokens, in a narrow dtype."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(7, 8, dtype=dtype)(ids)
            return nn.Dense(3, dtype=dtype)(
                nn.LayerNorm(dtype=dtype)(x + nn.MultiHeadDotProductAttention(2, dtype=dtype)(x))
            )[:, 0]

    net, ids = Net(), np.arange(6)[None] % 7
    variables = net.init(jax.random.key(0), ids)
    assert _rows.mixed(Model(net), _rows.described(variables), _rows.described(ids[0])) is None


def test_it_is_looked_at_once(compilations):
    net, variables = linen(dense)
    objective, params = ij.from_linen(net, variables, squares)
    objective(params, ONE)
    again = ij.from_linen(net, variables, helpers.squared_loss)[0]
    with compilations() as names:
        again.output(params, ONE)
    assert names == []


class TestOnlyParameters:
    """What flax keeps beside the parameters is not differentiated by anybody: it is refused among them."""

    @staticmethod
    def norm():
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.BatchNorm(use_running_average=True)(dense(x))

        net = Net()
        return net, net.init(jax.random.key(0), X)

    def test_linen(self):
        net, variables = self.norm()
        adapted, params = ij.from_linen(net, variables, squares)
        own = ij.Objective(lambda p, z: net.apply(p, z["x"][None])[0], squares)
        inner = ij.Objective(lambda p, z: net.apply(p["net"], z["x"][None])[0], squares)
        words = r"params: got '{}' among the parameters.*variables\['params'\].*constants="
        for objective, given, name in (
            (adapted, variables, "batch_stats"),
            (own, variables, "batch_stats"),
            (inner, {"net": variables}, "net/batch_stats"),
            (own, {"params": params, "cache": {"index": jnp.ones(2)}}, "cache"),
        ):
            with pytest.raises(TypeError, match=words.format(name)):
                ij.GGN(objective, given, ROWS)
        with pytest.raises(TypeError, match=words.format("batch_stats")):
            adapted(variables, ONE)
        with pytest.raises(TypeError, match=r"variables\['params'\]: got 'batch_stats' among the parameters"):
            ij.from_linen(net, {"params": variables}, squares)
        assert ij.Identity({"cache": {"kernel": jnp.ones(2)}}).size == 2

    def test_nnx(self):
        model = nnx.Sequential(
            nnx.Linear(5, 3, rngs=nnx.Rngs(0)),
            nnx.BatchNorm(3, rngs=nnx.Rngs(0), use_running_average=True),
        )
        graph, state = nnx.split(model)
        own = ij.Objective(lambda p, z: nnx.merge(graph, p, copy=True)(z["x"][None])[0], squares)
        for objective in (own, ij.from_nnx(model, squares)[0]):
            with pytest.raises(TypeError, match=r"params: got 'BatchStat' among the parameters.*nnx.Param"):
                ij.per_example_grads(objective, state, ROWS)
        noisy = nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
        with pytest.raises(TypeError, match=r"params: got 'RngCount', 'RngKey' among the parameters"):
            ij.Identity(noisy)
        assert ij.Identity(nnx.state(model, nnx.Param)).size == 24
