"""flax modules, linen and nnx, give the same objective as the plain function they compute."""

import typing

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import relative_error, tree_error

import influence_jax as ij

BATCH = helpers.random_batch(jax.random.key(1), 9, 5, 3, classes=True)
PLAIN = helpers.random_mlp(jax.random.key(0))


@pytest.fixture(autouse=True)
def standard_promotion():
    """Flax mixes dtypes itself."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Net(nn.Module):
    """The plain network, optionally unbatched, with batch norm and dropout that evaluation mode switches off."""

    norm: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = jnp.tanh(nn.Dense(4, name="layer0", param_dtype=jnp.float64)(x))
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, name="norm", param_dtype=jnp.float64)(x)
            x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3, name="layer1", param_dtype=jnp.float64)(x)

    def logits_twice(self, x):
        return 2.0 * self(x)


class Model(nnx.Module):
    def __init__(self, rngs, norm=False):
        self.layer0 = nnx.Linear(5, 4, rngs=rngs, param_dtype=jnp.float64)
        self.layer1 = nnx.Linear(4, 3, rngs=rngs, param_dtype=jnp.float64)
        self.norm = nnx.BatchNorm(4, rngs=rngs, param_dtype=jnp.float64) if norm else None
        self.dropout = nnx.Dropout(0.5, rngs=rngs) if norm else None

    def __call__(self, x):
        x = jnp.tanh(self.layer0(x))
        if self.norm is not None:
            x = self.dropout(self.norm(x))
        return self.layer1(x)


def nnx_model(norm=False, eval_mode=True):
    model = Model(nnx.Rngs(0), norm)
    for name in ("layer0", "layer1"):
        getattr(model, name).kernel.set_value(PLAIN[name]["kernel"])
        getattr(model, name).bias.set_value(PLAIN[name]["bias"])
    if eval_mode:
        model.eval()
    return model


def scores(objective, params):
    op = ij.GGN(objective, params, BATCH)
    influence = ij.Influence(objective, params, ij.invert(op, ij.Direct(0.1)))
    return influence.influences(BATCH, BATCH), influence.influences(BATCH, BATCH, "perturbation")


@pytest.fixture(scope="module")
def expected():
    return scores(helpers.CLASSIFICATION, PLAIN)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_same_scores_in_every_framework(framework, batched, expected):
    if framework == "linen":
        objective, params = ij.from_linen(Net(), {"params": PLAIN}, helpers.cross_entropy, batched=batched)
    else:
        objective, params = ij.from_nnx(nnx_model(), helpers.cross_entropy, batched=batched)
    for got, want in zip(scores(objective, params), expected, strict=True):
        assert relative_error(got, want) < 1e-11


def test_names_are_the_same_in_every_framework():
    _, linen = ij.from_linen(Net(), {"params": PLAIN}, helpers.cross_entropy)
    _, state = ij.from_nnx(nnx_model(), helpers.cross_entropy)
    names = [[name for name, _ in ij.tree.named_leaves(params)] for params in (linen, state, PLAIN)]
    assert names[0] == names[1] == names[2] == ["layer0/bias", "layer0/kernel", "layer1/bias", "layer1/kernel"]


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_batch_statistics_are_constants(framework):
    """Running statistics enter the loss, are not differentiated, and can be changed without compiling again."""
    mean, var = jnp.arange(4.0), jnp.arange(1.0, 5.0)
    if framework == "linen":
        net = Net(norm=True)
        variables = net.init(jax.random.key(0), BATCH.x)
        variables = {"params": variables["params"], "batch_stats": {"norm": {"mean": mean, "var": var}}}
        objective, params = ij.from_linen(net, variables, helpers.cross_entropy, train=False)
        logits = net.apply(variables, BATCH.x)
    else:
        model = nnx_model(norm=True)
        model.norm.mean.set_value(mean)
        model.norm.var.set_value(var)
        objective, params = ij.from_nnx(model, helpers.cross_entropy)
        logits = model(BATCH.x)
    expected = jax.vmap(helpers.cross_entropy)(logits, BATCH)
    assert relative_error(jax.vmap(objective, (None, 0))(params, BATCH), expected) < 1e-6
    assert not any("mean" in name or "var" in name for name, _ in ij.tree.named_leaves(params))
    assert len(jax.tree.leaves(objective)) >= 2
    hessian = ij.to_dense(ij.Hessian(objective, params, BATCH))
    assert relative_error(hessian, helpers.dense_reference(ij.Hessian, objective, params, BATCH)) < 1e-6


def test_equal_modules_compile_once(compilations):
    """Value-hashable: a second objective from an equal module is the same program, lists of layers included."""

    def build():
        net = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(3)])
        return ij.from_linen(net, net.init(jax.random.key(0), BATCH.x), helpers.cross_entropy)

    for make in (build, lambda: ij.from_nnx(nnx_model(), helpers.cross_entropy)):
        objective, params = make()
        ij.GGN(objective, params, BATCH).mv(params)
        objective, params = make()
        with compilations() as names:
            ij.GGN(objective, params, BATCH).mv(params)
        assert names == []


def test_methods_inputs_and_keywords():
    method = ij.from_linen(Net(), {"params": PLAIN}, helpers.cross_entropy, method="logits_twice")[0]
    z = jax.tree.map(lambda x: x[0], BATCH)
    assert relative_error(method.output(PLAIN, z), 2 * helpers.mlp(PLAIN, z)) < 1e-12
    pair = ij.from_linen(Net(), {"params": PLAIN}, lambda out, z: out[z[1]], input=0)[0]
    assert relative_error(pair(PLAIN, (z.x, z.y)), helpers.mlp(PLAIN, z)[z.y]) < 1e-12


def test_constants_are_the_third_argument():
    objective = ij.Objective(lambda p, z, c: c["scale"] * p["w"] * z, lambda out, z: out**2, constants={"scale": 3.0})
    assert float(objective({"w": jnp.array(2.0)}, jnp.array(1.0))) == 36.0
    assert len(jax.tree.leaves(objective)) == 1
    op = ij.Hessian(objective, {"w": jnp.array(2.0)}, jnp.ones(4))
    assert float(op.mv({"w": jnp.array(1.0)})["w"]) == 18.0
    slope = jax.grad(lambda op: op.mv({"w": jnp.array(1.0)})["w"], allow_int=True)(op)
    assert float(slope.objective.constants["scale"]) == 12.0


def test_modules_with_array_attributes():
    """They compare to something without a truth value; each is then a program of its own, not an error."""

    class Scaled(nn.Module):
        scale: typing.Any

        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, param_dtype=jnp.float64)(x) * self.scale[None]

    for _ in range(2):
        net = Scaled(np.array([1.0, 2.0, 3.0]))
        objective, params = ij.from_linen(net, net.init(jax.random.key(0), BATCH.x), helpers.cross_entropy)
        ij.GGN(objective, params, BATCH).mv(params)


class TestEvaluationMode:
    @pytest.mark.parametrize("which", ["dropout", "batch norm"])
    def test_linen(self, which):
        class Noisy(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.Dense(3)(x)
                if which == "dropout":
                    return nn.Dropout(0.5, deterministic=False)(x)
                return nn.BatchNorm(use_running_average=False)(x)

        net = Noisy()
        variables = net.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, BATCH.x)
        objective, params = ij.from_linen(net, variables, helpers.cross_entropy)
        with pytest.raises(ValueError, match=r"module: Noisy .*training mode.*train=False"):
            ij.GGN(objective, params, BATCH).mv(params)

    def test_nnx(self):
        with pytest.raises(ValueError, match=r"model: (dropout|norm).*call model.eval\(\)"):
            ij.from_nnx(nnx_model(norm=True, eval_mode=False), helpers.cross_entropy)
        half = nnx_model(norm=True)
        half.norm.use_running_average = False
        with pytest.raises(ValueError, match=r"model: norm \(BatchNorm\).*call model.eval\(\)"):
            ij.from_nnx(half, helpers.cross_entropy)
        ij.from_nnx(nnx_model(norm=True), helpers.cross_entropy)


def test_nnx_states_are_ordinary_parameters():
    objective, params = ij.from_nnx(nnx_model(), helpers.cross_entropy)
    op = ij.Hessian(objective, params, BATCH)
    assert jax.tree.structure(op.mv(params)) == jax.tree.structure(params)
    grads = ij.per_example_grads(objective, params, BATCH)
    assert isinstance(grads, nnx.State)
    flat = ij.flatten(grads, params)
    assert tree_error(ij.unflatten(flat, params), grads) == 0.0
    block = ij.restrict(op, ("layer0/kernel",))
    plain = ij.restrict(ij.Hessian(helpers.CLASSIFICATION, PLAIN, BATCH), ("layer0/kernel",))
    assert relative_error(ij.to_dense(block), ij.to_dense(plain)) < 1e-11


def test_parameters_of_an_nnx_model_are_a_snapshot():
    net = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    _, params = ij.from_nnx(net, helpers.squared_loss)
    before = jax.tree.map(np.asarray, jax.tree.leaves(params))
    net.kernel[...] = net.kernel[...] + 1.0
    assert all(np.array_equal(a, b) for a, b in zip(before, jax.tree.leaves(params), strict=True))
    assert jax.tree.leaves(ij.from_nnx(net, helpers.squared_loss)[1])[1].sum() != before[1].sum()
