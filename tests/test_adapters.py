"""flax modules, linen and nnx, give the same objective as the plain function they compute."""

import dataclasses
import re
import typing

import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict
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


class Deep(nnx.Module):
    """Twelve equal blocks in containers of each kind: as text, "10" sorts before "2"."""

    def __init__(self):
        layer = lambda *sizes: nnx.Linear(*sizes, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
        self.blocks = nnx.List([nnx.Dict({"inner": nnx.List([layer(3, 3)])}) for _ in range(12)])
        self.value = layer(3, 2)
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0), param_dtype=jnp.float64, use_running_average=True)

    def __call__(self, x):
        for block in self.blocks:
            x = x + jnp.tanh(block["inner"][0](x))
        return self.value(self.norm(x))


def deep():
    """A model whose every number is another, so that each place counts."""
    graph, state = nnx.split(Deep())
    leaves, structure = jax.tree.flatten(state)
    rng = np.random.default_rng(0)
    return nnx.merge(graph, structure.unflatten([jnp.asarray(rng.uniform(0.1, 1, leaf.shape)) for leaf in leaves]))


def plain(pure, rest, x):
    """What the model computes, by name, in NumPy."""
    for number in range(12):
        layer = pure["blocks"][number]["inner"][0]
        x = x + np.tanh(x @ layer["kernel"] + layer["bias"])
    x = (x - rest["norm"]["mean"]) / np.sqrt(rest["norm"]["var"] + 1e-5) * pure["norm"]["scale"] + pure["norm"]["bias"]
    return x @ pure["value"]["kernel"] + pure["value"]["bias"]


def texts(node, leaf=lambda x: x):
    """A tree of dicts whose keys are strings."""
    return {str(key): texts(part, leaf) for key, part in node.items()} if isinstance(node, dict) else leaf(node)


def lists(node):
    """A tree whose dicts of numbers are lists."""
    if not isinstance(node, dict):
        return node
    return [lists(node[i]) for i in range(len(node))] if 0 in node else {k: lists(v) for k, v in node.items()}


CONTAINERS = {
    "pure dict": nnx.to_pure_dict,
    "strings": lambda state: texts(nnx.to_pure_dict(state)),
    "strings and value": lambda state: texts(nnx.to_pure_dict(state), lambda x: {"value": x}),
    "lists": lambda state: lists(nnx.to_pure_dict(state)),
    "frozen": lambda state: FrozenDict(texts(nnx.to_pure_dict(state))),
    "flat": lambda state: flatten_dict(texts(nnx.to_pure_dict(state)), sep="/"),
    "pairs": lambda state: flatten_dict(texts(nnx.to_pure_dict(state))),
    "module": lambda state: state,
}
X = np.random.default_rng(1).normal(size=(4, 3))
ROWS = ij.Batch(X, np.random.default_rng(2).normal(size=(4, 2)))
ONE = jax.tree.map(lambda x: x[0], ROWS)


@pytest.fixture(scope="module")
def made():
    model = deep()
    objective, params = ij.from_nnx(model, helpers.half_squared_loss)
    pure = jax.tree.map(np.asarray, (nnx.to_pure_dict(params), nnx.to_pure_dict(objective.constants)))
    return (
        objective,
        params,
        np.array([0.5 * np.sum((plain(*pure, x) - y) ** 2) for x, y in zip(X, ROWS.y, strict=True)]),
    )


class TestParametersByName:
    @pytest.mark.parametrize("container", CONTAINERS)
    def test_in_any_containers(self, made, container):
        objective, params, losses = made
        given = CONTAINERS[container](params)
        assert relative_error(objective(given, ONE), losses[0]) < 1e-12
        slope = jax.jit(jax.grad(objective))(given, ONE)
        expected = CONTAINERS[container](jax.grad(objective)(params, ONE))
        assert tree_error(slope, expected) < 1e-12
        assert relative_error(jax.vmap(objective, (None, 0))(given, ROWS), losses) < 1e-12

    def test_constants_in_any_containers(self, made):
        objective, params, losses = made
        for container in CONTAINERS.values():
            restored = dataclasses.replace(objective, constants=container(objective.constants))
            assert relative_error(restored(params, ONE), losses[0]) < 1e-12
        lacking = dataclasses.replace(objective, constants={"norm": {"mean": jnp.ones(3)}})
        with pytest.raises(ValueError, match=r"constants: its leaves are not those of the model: missing 'norm/var'"):
            lacking(params, ONE)

    def test_restored_from_disk(self, made, tmp_path):
        """Whatever is computed from them: scores, blocks, and a training that goes on."""
        objective, params, _ = made
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "params", params)
            checkpointer.wait_until_finished()
            raw = checkpointer.restore(tmp_path / "params")
        assert list(raw["blocks"])[:3] == ["0", "1", "10"]
        for make in (self.scores, self.block, self.trained):
            assert relative_error(make(objective, raw), make(objective, params)) < 1e-9, make.__name__

    @staticmethod
    def scores(objective, params):
        return ij.baselines.tracin(objective, [params], [1.0], ROWS, ROWS)

    @staticmethod
    def block(objective, params):
        name = next(name for name, _ in ij.tree.named_leaves(params) if name.startswith("blocks/10/inner/0/kernel"))
        return ij.to_dense(ij.restrict(ij.GGN(objective, params, ROWS), (name,)))

    @staticmethod
    def trained(objective, params):
        train = ij.retrain.training(objective, optax.sgd(1e-3), params, ROWS, epochs=2)
        return jax.vmap(objective, (None, 0))(train(jnp.ones(4), jax.random.key(0)), ROWS)

    def test_leaves_that_are_not_the_models(self, made):
        objective, params, _ = made
        pure = lambda: texts(nnx.to_pure_dict(params))
        renamed, wide, twice = pure(), pure(), pure()
        renamed["blocks"]["12"] = renamed["blocks"].pop("7")
        wide["value"]["kernel"] = jnp.ones((3, 4))
        twice["value"]["bias"] = {"value": jnp.ones(2)}
        for given, words in (
            (renamed, r"params: its leaves are not those of the model: missing 'blocks/7/inner/0/bias', "
             r"'blocks/7/inner/0/kernel', unexpected 'blocks/12/inner/0/bias'"),
            ({"params": pure()}, r"missing 'blocks/0/.* and 24 more, unexpected 'params/blocks/0/"),
            (wide, r"params: leaf 'value/kernel' has shape \(3, 4\), but the model has \(3, 2\)"),
            ({"value/bias": jnp.ones(2), **twice}, r"params: two leaves are called 'value/bias'"),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=words):
                objective(given, ONE)

    def test_leaves_are_told_apart_by_type_of_key(self):
        with pytest.raises(ValueError, match="keys cannot be sorted"):
            ij.Identity({1: jnp.ones(1), "1": jnp.ones(1)})

    def test_equal_models_are_equal(self):
        first, second = (ij.from_nnx(deep(), helpers.half_squared_loss)[0].predict for _ in range(2))
        assert first == second
        assert hash(first) == hash(second)
        assert not any(isinstance(part, jax.Array | np.ndarray) for part in vars(first).values())

    def test_trees_of_other_containers_are_told_apart(self, made):
        objective, params, _ = made
        restored = texts(nnx.to_pure_dict(params), lambda x: {"value": x})
        with pytest.raises(
            ValueError,
            match=r"params, against the space of inverse: its leaves differ .* 'blocks/0/inner/0/bias/value'",
        ):
            ij.Influence(objective, restored, ij.Identity(params))
        with pytest.raises(ValueError, match=r"other containers: .*dict.*, expected State, dict, Param"):
            ij.Influence(objective, nnx.to_pure_dict(params), ij.Identity(params))


class TestWhatModelsWrite:
    """A model may write to its own variables on a call; the objective stays what it is."""

    def test_noise(self):
        class Noise(nnx.Module):
            def __init__(self, rngs):
                self.linear, self.rngs = nnx.Linear(3, 2, rngs=rngs), rngs
                self.calls = nnx.Variable(jnp.array(0.0))

            def __call__(self, x):
                self.calls[...] += 1
                return self.linear(x + self.calls[...] * jax.random.normal(self.rngs.noise(), x.shape))

        model = Noise(nnx.Rngs(0))
        objective, params = ij.from_nnx(model, helpers.half_squared_loss)
        losses = [objective(params, ONE) for _ in range(3)]
        assert losses[0] == losses[1] == losses[2] == jax.jit(objective)(params, ONE)
        assert model.calls[...] == 0
        assert ij.per_example_grads(objective, params, ROWS)["linear"]["bias"][...].shape == (4, 2)

    @pytest.mark.parametrize("cell", [nnx.LSTMCell, nnx.GRUCell])
    def test_recurrent(self, cell):
        model = nnx.RNN(cell(3, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float64, dtype=jnp.float64))
        objective, params = ij.from_nnx(model, lambda out, z: jnp.sum(jnp.sin(out)))
        data = {"x": np.random.default_rng(0).normal(size=(3, 4, 3))}
        graph, _, rest = nnx.split(model, nnx.Param, ...)
        of_all = lambda p, x: jnp.sum(jnp.sin(nnx.merge(graph, p, rest, copy=True)(x[None])))
        expected = [jax.grad(of_all)(params, x) for x in data["x"]]
        grads = ij.per_example_grads(objective, params, data)
        assert tree_error(jax.tree.map(lambda x: x[1], grads), expected[1]) < 1e-6


class TestOtherThings:
    """What is no module of that framework, or takes more than one part of an example."""

    def test_linen(self):
        variables, model = {"params": PLAIN}, nnx_model()
        state = TrainState.create(apply_fn=Net().apply, params=PLAIN, tx=optax.sgd(0.1))
        for module, words in (
            (model, "module: got a Model, expected a flax.linen module; influence_jax.from_nnx"),
            (Net, r"module: got the class Net, .* pass an instance, Net\(...\)"),
            (state, r'module: got a TrainState, .*from_linen\(module, {"params": state.params}, loss\)'),
            (Net().apply, "module: got a method, expected a flax.linen module"),
        ):
            with pytest.raises(TypeError, match=words):
                ij.from_linen(module, variables, helpers.cross_entropy)

    def test_nnx(self):
        optimizer = nnx.Optimizer(nnx_model(), optax.sgd(0.1), wrt=nnx.Param)
        state = TrainState.create(apply_fn=Net().apply, params=PLAIN, tx=optax.sgd(0.1))
        for model, words in (
            (Net(), "model: got a Net, expected a flax.nnx module; influence_jax.from_linen"),
            (optimizer, "model: got a Optimizer, .*pass the model that the optimizer updates"),
            (Model, r"model: got the class Model, .* pass an instance, Model\(...\)"),
            (state, "model: got a TrainState, .*pass the model, not the state of its training"),
        ):
            with pytest.raises(TypeError, match=words):
                ij.from_nnx(model, helpers.cross_entropy)

    @pytest.mark.parametrize("framework", ["linen", "nnx"])
    def test_several_inputs(self, framework):
        """The line that the message gives works."""

        class Pair(nn.Module):
            @nn.compact
            def __call__(self, ids, mask):
                return nn.Dense(2, param_dtype=jnp.float64)(ids * mask)

        class Both(nnx.Module):
            def __init__(self):
                self.dense = nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float64)

            def __call__(self, ids, mask):
                return self.dense(ids * mask)

        z = {"ids": X[0], "mask": X[1], "y": ROWS.y[0]}
        loss = lambda out, z: 0.5 * jnp.sum((out - z["y"]) ** 2)
        if framework == "linen":
            module = Pair()
            variables = module.init(jax.random.key(0), X[:1], X[:1])
            make = lambda **how: ij.from_linen(module, variables, loss, **how)
            kernel, bias = (variables["params"]["Dense_0"][name] for name in ("kernel", "bias"))
        else:
            model = Both()
            make = lambda **how: ij.from_nnx(model, loss, **how)
            kernel, bias = model.dense.kernel[...], model.dense.bias[...]
        for input in (("ids", "mask"), ["ids", "mask"]):
            with pytest.raises(TypeError, match=r"input: got .*ids.*several inputs go into an Objective of your own"):
                make(input=input)
        objective, params = make(input="ids")
        with pytest.raises(
            TypeError, match=r"module: (Pair|Both) needs 'mask' beside .*of your own: .*Objective"
        ) as told:
            objective(params, z)
        *_, line = re.findall(r"influence_jax\.(Objective\(.*\))$", str(told.value))
        names = {"loss": loss, "nnx": nnx, "ij": ij}
        if framework == "linen":
            names["module"] = module
        else:
            names["graph"], _, names["rest"] = nnx.split(model, nnx.Param, ...)
        own = eval(f"ij.{line}", names)
        assert relative_error(own(params, z), loss((X[0] * X[1]) @ kernel + bias, z)) < 1e-12
