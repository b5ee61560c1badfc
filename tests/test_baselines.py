"""Simple attributions against the same by numpy, from gradients and projections held whole."""

import functools
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.core import FrozenDict
from helpers import CLASSIFICATION, flat, normal, relative_error

import influence_jax as ij

N, Q, INPUTS, CLASSES, DIM = 40, 6, 5, 3, 12


@functools.cache
def problem():
    draw = np.random.default_rng(0)
    layer = lambda a, b: {"kernel": draw.normal(size=(a, b)) / 2, "bias": draw.normal(size=b) / 2}
    params = {"first": layer(INPUTS, 4), "second": layer(4, CLASSES)}
    make = lambda n: ij.Batch(draw.normal(size=(n, INPUTS)), draw.integers(0, CLASSES, n))
    return params, make(N), make(Q)


def grads(params, batch, loss=CLASSIFICATION):
    return flat(jax.vmap(jax.grad(loss), (None, 0))(params, batch), params)


def influence(inverse=None, measurement=None):
    params, *_ = problem()
    return ij.Influence(CLASSIFICATION, params, inverse or ij.Identity(params), measurement=measurement)


def margin(params, example):
    """Log of the odds of the right label."""
    p = jax.nn.softmax(CLASSIFICATION.output(params, example))[example.y]
    return jnp.log(p) - jnp.log1p(-p)


def asked(params, example):
    return ij.baselines.negative_margin(CLASSIFICATION.output(params, example), example.y)


class TestLengths:
    def test_cosine(self):
        params, train, query = problem()
        g, h = grads(params, query), grads(params, train)
        lengths = np.linalg.norm(g, axis=1)[:, None] * np.linalg.norm(h, axis=1)[None]
        assert relative_error(ij.baselines.cosine(influence(), query, train), g @ h.T / lengths) < 1e-12
        own = ij.baselines.cosine(influence(), train, train)
        assert relative_error(np.diagonal(own), np.ones(N)) < 1e-12
        asked = ij.baselines.cosine(influence(measurement=margin), query, train)
        g = grads(params, query, margin)
        lengths = np.linalg.norm(g, axis=1)[:, None] * np.linalg.norm(h, axis=1)[None]
        assert relative_error(asked, g @ h.T / lengths) < 1e-12

    def test_relative(self):
        params, train, query = problem()
        g, h = grads(params, query), grads(params, train)
        inverse = np.linalg.inv(ij.to_dense(ij.GGN(CLASSIFICATION, params, train)) + 0.1 * np.eye(g.shape[1]))
        expected = g @ inverse @ h.T / np.sqrt(np.einsum("ip,pq,iq->i", h, inverse, h))[None]
        direct = ij.invert(ij.GGN(CLASSIFICATION, params, train), ij.Direct(0.1))
        assert relative_error(ij.baselines.relative(influence(direct), query, train), expected) < 1e-10

    def test_what_has_no_length_is_nan(self):
        f, params = lambda params, z: params["w"] * z, {"w": jnp.array(1.0)}
        scores = ij.baselines.relative(ij.Influence(f, params, ij.Identity(params)), jnp.ones(1), jnp.array([0.0, 2.0]))
        np.testing.assert_array_equal(scores, [[np.nan, 1.0]])


class TestCheckpoints:
    def test_tracin(self):
        params, train, query = problem()
        moved = jax.tree.map(lambda x: x + 0.1, params)
        expected = sum(
            rate * grads(p, query) @ grads(p, train).T for rate, p in zip([0.5, 0.1], [params, moved], strict=True)
        )
        stacked = jax.tree.map(lambda *x: np.stack(x), params, moved)
        for checkpoints in ([params, moved], stacked):
            scores = ij.baselines.tracin(CLASSIFICATION, checkpoints, [0.5, 0.1], query, train)
            assert relative_error(scores, expected) < 1e-12

    def test_one_step_of_gradient_descent_is_predicted(self):
        """What a training on an example lowers the query's loss by, to first order."""
        params, train, query = problem()
        rate = 1e-6
        scores = ij.baselines.tracin(CLASSIFICATION, [params], [rate], query, train)
        loss = jax.vmap(CLASSIFICATION, (None, 0))
        slope = jax.grad(CLASSIFICATION)(params, jax.tree.map(lambda x: x[0], train))
        after = jax.tree.map(lambda p, g: p - rate * g, params, slope)
        assert relative_error(loss(params, query) - loss(after, query), scores[:, 0]) < 1e-4

    def test_mistakes(self):
        params, train, query = problem()
        with pytest.raises(ValueError, match="checkpoints: got none"):
            ij.baselines.tracin(CLASSIFICATION, [], [], query, train)
        with pytest.raises(ValueError, match=r"learning_rates: got shape \(2,\), expected \(1,\)"):
            ij.baselines.tracin(CLASSIFICATION, [params], [0.1, 0.1], query, train)
        with pytest.raises(ValueError, match=r"learning_rates: got \[nan\], expected finite"):
            ij.baselines.tracin(CLASSIFICATION, [params], [np.nan], query, train)
        with pytest.raises(ValueError, match=r"checkpoints: got leaves of leading axes"):
            ij.baselines.over_checkpoints(lambda params: 0.0, {"w": jnp.ones((2, 3)), "b": jnp.ones(3)})
        with pytest.raises(TypeError, match="influence: got a int"):
            ij.baselines.cosine(3, query, train)

    def test_of_a_training_whose_parameters_are_a_tuple(self):
        """A tuple of their leaves is as good as a tuple of checkpoints: a list of trees says which."""
        f = lambda params, z: 0.5 * (params[0] * z + params[1] - 1) ** 2
        data = jnp.array([1.0, 2.0])
        train = ij.retrain.training(f, optax.sgd(0.1), (jnp.array(0.5), jnp.array(0.0)), data, epochs=2)
        stack = train.checkpoints(jnp.ones(2), jax.random.key(0), [1, 2])
        trees = [jax.tree.map(lambda x, t=t: x[t], stack) for t in (0, 1)]
        rows = [jax.vmap(jax.grad(f), (None, 0))(params, data) for params in trees]
        expected = 0.1 * sum(np.outer(a, a) + np.outer(b, b) for a, b in rows)
        assert relative_error(ij.baselines.tracin(f, trees, [0.1, 0.1], data, data), expected) < 1e-12
        with pytest.raises(ValueError, match="checkpoints: got a tuple that is read in two ways"):
            ij.baselines.tracin(f, stack, [0.1, 0.1], data, data)
        with pytest.raises(ValueError, match="checkpoints: got a tuple that is read in two ways"):
            ij.baselines.over_checkpoints(lambda params: params[0] + params[1], stack)


class TestFormsOfCheckpoints:
    """However checkpoints are given, they are the same ones."""

    F = staticmethod(lambda params, z: 0.5 * jnp.sum((params["w"] @ z + params["b"]) ** 2))
    TREES = tuple({"b": jnp.array([t, 1.0]), "w": jnp.array([[t, 1.0, -t], [0.5, t, 2.0]])} for t in (0.5, -1.0, 2.0))
    DATA = np.random.default_rng(0).normal(size=(4, 3))

    @classmethod
    def expected(cls, rates):
        """The sum over checkpoints of inner products, in NumPy."""
        rows = []
        for params in cls.TREES:
            out = cls.DATA @ np.asarray(params["w"]).T + np.asarray(params["b"])
            slopes = out[:, :, None] * np.concatenate([cls.DATA, np.ones((4, 1))], 1)[:, None]
            rows.append(slopes.reshape(4, -1))
        return sum(rate * row @ row.T for rate, row in zip(rates, rows, strict=True))

    def test_containers(self):
        rates, stacked = [0.3, 0.2, 0.1], jax.tree.map(lambda *x: jnp.stack(x), *self.TREES)
        lazy = tuple(lambda params=params: params for params in self.TREES)
        mixed = [FrozenDict(self.TREES[0]), dict(reversed(self.TREES[1].items())), {"b/value": 0, **self.TREES[2]}]
        del mixed[2]["b/value"]
        for given in (self.TREES, list(self.TREES), lazy, iter(lazy), map(dict, self.TREES), stacked, mixed):
            scores = ij.baselines.tracin(self.F, given, rates, self.DATA, self.DATA)
            assert relative_error(scores, self.expected(rates)) < 1e-12
        squares = lambda params: params["b"] @ params["b"]
        mean = np.mean([1 + t * t for t in (0.5, -1.0, 2.0)])
        for given in (self.TREES, list(self.TREES), lazy, iter(self.TREES), stacked):
            assert relative_error(ij.baselines.over_checkpoints(squares, given), mean) < 1e-12

    @pytest.mark.parametrize(
        ("schedule", "rate"),
        [
            (optax.cosine_decay_schedule(0.3, 100), lambda step: 0.15 * (1 + np.cos(np.pi * min(step, 100) / 100))),
            (optax.linear_schedule(0.0, 0.3, 40), lambda step: 0.3 * min(step, 40) / 40),
            (optax.piecewise_constant_schedule(0.3, {50: 0.1}), lambda step: 0.3 if step <= 50 else 0.03),
        ],
        ids=["cosine", "warmup", "piecewise"],
    )
    def test_schedules(self, schedule, rate):
        steps = [0, 20, 80]
        for given in (steps, np.array(steps), tuple(steps)):
            scores = ij.baselines.tracin(self.F, self.TREES, schedule, self.DATA, self.DATA, steps=given)
            assert relative_error(scores, self.expected([rate(step) for step in steps])) < 1e-12

    def test_one_rate(self):
        scores = ij.baselines.tracin(self.F, iter(self.TREES), 0.25, self.DATA, self.DATA)
        assert relative_error(scores, self.expected([0.25] * 3)) < 1e-12

    def test_only_one_is_held(self):
        """Those that are read are let go before the next is."""
        alive = []

        class Params(dict):
            pass

        def read(t):
            assert not [params for params in alive if params() is not None]
            params = Params(self.TREES[t])
            alive.append(weakref.ref(params))
            return params

        jax.tree_util.register_pytree_with_keys(
            Params, lambda p: ([(jax.tree_util.DictKey(k), p[k]) for k in sorted(p)], None),
            lambda _, leaves: Params(zip("bw", leaves, strict=True)),
        )  # fmt: skip
        for given in ([lambda t=t: read(t) for t in range(3)], (read(t) for t in range(3)), map(read, range(3))):
            scores = ij.baselines.tracin(self.F, given, 0.5, self.DATA, self.DATA)
            assert relative_error(scores, self.expected([0.5] * 3)) < 1e-12
        assert len(alive) == 9

    def test_from_disk(self, tmp_path):
        with ocp.StandardCheckpointer() as checkpointer:
            for t, params in enumerate(self.TREES):
                checkpointer.save(tmp_path / str(t), params)
            checkpointer.wait_until_finished()
            checkpoints = [lambda t=t: checkpointer.restore(tmp_path / str(t)) for t in range(3)]
            scores = ij.baselines.tracin(self.F, checkpoints, [0.3, 0.2, 0.1], self.DATA, self.DATA)
        assert relative_error(scores, self.expected([0.3, 0.2, 0.1])) < 1e-12

    @pytest.mark.parametrize(
        ("checkpoints", "rates", "more", "words"),
        [
            ("trees", optax.constant_schedule(0.1), {}, "learning_rates: got a schedule, expected with it steps="),
            ("trees", optax.constant_schedule(0.1), {"steps": [0, 1]}, r"steps: got shape \(2,\), expected \(3,\)"),
            ("trees", optax.constant_schedule(0.1), {"steps": [0, 1, -1]}, "steps: got .* expected ints from 0 on"),
            ("trees", optax.constant_schedule(0.1), {"steps": [0, 1, 2.5]}, "steps: got .* expected ints from 0 on"),
            ("trees", lambda step: jnp.nan, {"steps": [0, 1, 2]}, "learning_rates: got .* expected finite"),
            ("trees", [0.1] * 3, {"steps": [0, 1, 2]}, "steps: given without a schedule"),
            ("lazy", [0.1] * 2, {}, "learning_rates: got 2 numbers, expected one for each checkpoint"),
            ("lazy", [0.1] * 4, {}, "learning_rates: got more numbers than checkpoints, of which there are 3"),
            ("dict", [0.1] * 3, {}, r"checkpoints: got leaves of leading axes .* list\(checkpoints.values\(\)\)"),
            ("other", [0.1] * 3, {}, r"checkpoints\[1\]: its leaves are not those of the first .*missing 'b'"),
            ("wide", [0.1] * 3, {}, r"checkpoints\[2\]: leaf 'b' has shape \(5,\), but the first checkpoint has"),
            ("trees", [0.1] * 3, {"constants": "shared"}, None),
            ("trees", [0.1] * 3, {"constants": [{}] * 3}, "constants: got list, expected none"),
        ],
    )
    def test_mistakes(self, checkpoints, rates, more, words):
        given = {
            "trees": self.TREES,
            "lazy": iter(self.TREES),
            "dict": {step: {"b": jnp.ones(2), "w": jnp.ones((3, 2))} for step in (100, 200)},
            "other": [self.TREES[0], {"w": self.TREES[1]["w"]}, self.TREES[2]],
            "wide": [*self.TREES[:2], {**self.TREES[2], "b": jnp.ones(5)}],
        }[checkpoints]
        call = lambda: ij.baselines.tracin(self.F, given, rates, self.DATA, self.DATA, **more)
        if words is None:
            assert call().shape == (4, 4)
        else:
            with pytest.raises((ValueError, TypeError), match=words):
                call()

    @pytest.mark.parametrize("given", ["folder", 3, lambda: None])
    def test_nothing_of_that_kind(self, given):
        with pytest.raises(TypeError, match=r"checkpoints: got a (str|int|function), expected trees, or functions"):
            ij.baselines.over_checkpoints(lambda params: 0.0, given)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, param_dtype=jnp.float64, name="norm")(x)
        return nn.Dense(2, param_dtype=jnp.float64, name="out")(x)


class NormalisedNnx(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0), param_dtype=jnp.float64, use_running_average=True)
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0), deterministic=True)
        self.out = nnx.Linear(3, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float64)

    def __call__(self, x):
        return self.out(self.drop(self.norm(x)))


class TestStatisticsOfCheckpoints:
    """Every checkpoint of a network with batch norm has its own running statistics."""

    DATA = np.random.default_rng(0).normal(size=(4, 3))
    SAVED = tuple(
        {
            "norm": {name: jnp.asarray(rng.uniform(0.5, 2, 3)) for name in ("mean", "var", "scale", "bias")},
            "out": {"kernel": jnp.asarray(rng.normal(size=(3, 2))), "bias": jnp.asarray(rng.normal(size=2))},
        }
        for rng in map(np.random.default_rng, (1, 2, 3))
    )
    PARAMS = tuple(
        {"norm": {name: saved["norm"][name] for name in ("bias", "scale")}, "out": saved["out"]} for saved in SAVED
    )
    STATISTICS = tuple({"norm": {name: saved["norm"][name] for name in ("mean", "var")}} for saved in SAVED)
    LOSS = staticmethod(lambda out, z: 0.5 * jnp.sum(out**2))
    RATES = (0.3, 0.2, 0.1)

    @pytest.fixture(autouse=True)
    def standard_promotion(self):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            yield

    def expected(self, statistics):
        """The sum over checkpoints of inner products of gradients in (scale, bias, kernel, bias), in NumPy."""
        total = 0.0
        for rate, params, own in zip(self.RATES, self.PARAMS, statistics, strict=True):
            p, s = jax.tree.map(np.asarray, (params, own["norm"]))
            unit = (self.DATA - s["mean"]) / np.sqrt(s["var"] + 1e-5)
            inner = unit * p["norm"]["scale"] + p["norm"]["bias"]
            out = inner @ p["out"]["kernel"] + p["out"]["bias"]
            back = out @ p["out"]["kernel"].T
            rows = [back * unit, back, (inner[:, :, None] * out[:, None]).reshape(4, -1), out]
            total = total + rate * sum(row @ row.T for row in rows)
        return total

    def made(self, framework):
        """The objective at the last checkpoint, and the constants of each."""
        if framework == "linen":
            constants = [{"batch_stats": own} for own in self.STATISTICS]
            return ij.from_linen(Normalised(), {"params": self.PARAMS[2], **constants[2]}, self.LOSS, input="x")[
                0
            ], constants
        model = NormalisedNnx()
        for name in ("mean", "var"):
            getattr(model.norm, name).set_value(self.STATISTICS[2]["norm"][name])
        objective, _ = ij.from_nnx(model, self.LOSS)
        random = nnx.to_pure_dict(objective.constants)["drop"]
        return objective, [{**own, "drop": random} for own in self.STATISTICS]

    @pytest.mark.parametrize("framework", ["linen", "nnx"])
    def test_of_each(self, framework):
        objective, constants = self.made(framework)
        data = {"x": self.DATA}
        tracin = lambda **more: ij.baselines.tracin(objective, self.PARAMS, self.RATES, data, data, **more)
        right = self.expected(self.STATISTICS)
        lazy = [lambda own=own: own for own in constants]
        for given in (constants, tuple(constants), lazy, iter(constants)):
            assert relative_error(tracin(constants=given), right) < 1e-11
        shared = self.expected([self.STATISTICS[2]] * 3)
        assert relative_error(shared, right) > 0.1
        for given in ("shared", constants[2], objective.constants):
            assert relative_error(tracin(constants=given), shared) < 1e-11
        with pytest.raises(
            ValueError, match=r'constants: the objective holds .*norm/mean.*constants=\[...\].*"shared"'
        ):
            tracin()
        with pytest.raises(ValueError, match="constants: got 2 trees, expected 3"):
            tracin(constants=constants[:2])
        with pytest.raises(ValueError, match="constants: got fewer trees than checkpoints"):
            tracin(constants=iter(constants[:2]))
        with pytest.raises(ValueError, match="constants: got more trees than checkpoints"):
            tracin(constants=iter(constants * 2))
        with pytest.raises(ValueError, match=r"constants\[0\]: its leaves are not those of the objective: missing"):
            tracin(constants=[{"other": jnp.ones(3)}] * 3)

    def test_of_one(self):
        """The objective's own are those of the only checkpoint; keys of dropout are no statistics."""
        objective, _ = self.made("nnx")
        data = {"x": self.DATA}
        one = ij.baselines.tracin(objective, [self.PARAMS[2]], [1.0], data, data)
        objective = ij.from_nnx(
            nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, deterministic=True, rngs=nnx.Rngs(0))),
            self.LOSS,
        )
        two = ij.baselines.tracin(objective[0], [objective[1]] * 2, 0.5, data, data)
        assert one.shape == two.shape == (4, 4)


class TestTrak:
    @pytest.mark.parametrize("damping", [0.0, 0.05])
    def test_is_its_formula(self, damping):
        params, train, query = problem()
        projection = ij.projections.gaussian(params, DIM, jax.random.key(1))
        stacked = lambda rows: jax.vmap(lambda row: ij.unflatten(row, params))(jnp.asarray(rows))
        project = lambda rows: np.asarray(projection.project(stacked(rows)))
        phi, phi_query = project(grads(params, train, margin)), project(grads(params, query, margin))
        p = np.exp(-np.asarray(jax.vmap(CLASSIFICATION, (None, 0))(params, train)))
        kernel = phi.T @ phi / N + damping * np.eye(DIM)
        expected = phi_query @ np.linalg.solve(kernel, (phi * (1 - p)[:, None]).T)
        made = ij.baselines.trak(CLASSIFICATION, asked, params, train, projection, damping)
        assert relative_error(made.influences(query, train), expected) < 1e-9

    def test_margins_of_confident_predictions(self, float32):
        """Where the loss is zero to rounding, the margin and its gradient are not."""
        logits = jnp.array([40.0, 1.0, 0.0])
        slope = jax.grad(ij.baselines.negative_margin)(logits, 0)
        e = np.exp(1.0)
        assert relative_error(slope, [-1.0, e / (1 + e), 1 / (1 + e)]) < 1e-6
        assert relative_error(ij.baselines.negative_margin(logits, 0), np.log(1 + e) - 40) < 1e-6

    def test_mistakes(self):
        params, train, _ = problem()
        wide = ij.projections.gaussian(params, N + 5, jax.random.key(0))
        with pytest.raises(ValueError, match=r"projection: its kernel of 40 examples in 45 dimensions is singular"):
            ij.baselines.trak(CLASSIFICATION, asked, params, train, wide)
        with pytest.raises(TypeError, match="projection: got a int"):
            ij.baselines.trak(CLASSIFICATION, asked, params, train, 12)
        with pytest.raises(ValueError, match="damping"):
            ij.baselines.trak(CLASSIFICATION, asked, params, train, wide, -1.0)


class TestProjected:
    def test_is_the_matrix_between_two_projections(self):
        params, *_ = problem()
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        projection = ij.projections.rademacher(params, DIM, jax.random.key(0))
        draw = np.asarray(normal(jax.random.key(3), (DIM, DIM)))
        op = ij.Projected(params, projection, draw @ draw.T)
        rows = projection.project(jax.vmap(lambda row: ij.unflatten(row, params))(jnp.eye(size)))
        assert relative_error(ij.to_dense(op), rows @ (draw @ draw.T) @ rows.T) < 1e-10

    def test_the_projection_is_never_held_whole(self):
        params = {"w": np.ones((64, 512))}
        op = ij.Projected(params, ij.projections.rademacher(params, 512, jax.random.key(0)), np.eye(512))
        program = jax.jit(lambda op, V: op.mm(V)).lower(op, {"w": np.ones((1, 64, 512))}).compile()
        assert program.memory_analysis().temp_size_in_bytes < 64 * 512 * 512 * 8 / 2

    def test_mistakes(self):
        params, *_ = problem()
        projection = ij.projections.rademacher(params, DIM, jax.random.key(0))
        with pytest.raises(ValueError, match=r"matrix: got shape \(3, 3\), expected \(12, 12\)"):
            ij.Projected(params, projection, jnp.eye(3))
        with pytest.raises(ValueError, match="matrix: differs from its transpose"):
            ij.Projected(params, projection, jnp.triu(jnp.ones((DIM, DIM))))
        with pytest.raises(TypeError, match="matrix: got complex128"):
            ij.Projected(params, projection, 1j * np.eye(DIM))
        with pytest.raises(TypeError, match="projection: got a str"):
            ij.Projected(params, "rademacher", jnp.eye(3))
        with pytest.raises(ValueError, match="params"):
            ij.Projected({"w": jnp.ones(2)}, projection, jnp.eye(DIM))


class TestCheckpointsThatAreReadInTwoWays:
    """One tree of parameters is no stack, and stacked parameters that are a list no list of checkpoints."""

    TRAIN = jnp.arange(1.0, 16.0).reshape(5, 3)

    def scores(self, objective, checkpoints, rates):
        return ij.baselines.tracin(objective, checkpoints, rates, self.TRAIN[:2], self.TRAIN)

    def test_one_tree(self):
        for objective, params in (
            (lambda p, z: jnp.sum((p["w"] * z) ** 2), {"w": jnp.ones(3)}),
            (lambda p, z: jnp.sum((p * z) ** 2), jnp.ones(3)),
            (lambda p, z: jnp.mean(jnp.tanh(p["w"] * z + p["b"])), {"w": jnp.ones(3), "b": jnp.zeros(3)}),
        ):
            with pytest.raises(
                ValueError, match=r"checkpoints: got one tree that the objective takes.*give \[params\]"
            ):
                self.scores(objective, params, 0.1)
            stack = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
            listed = [jax.tree.map(lambda x, t=t: x[t], stack) for t in (0, 1)]
            assert (
                relative_error(self.scores(objective, stack, [0.1, 0.1]), self.scores(objective, listed, 0.1)) < 1e-12
            )

    def test_a_stack_of_lists(self):
        objective = lambda p, z: jnp.sum((p[0] * z) ** 2) + jnp.sum(p[1])
        stack = [jnp.ones((2, 3)), jnp.ones((2, 4))]
        with pytest.raises(
            ValueError, match=r"got a list that is read in two ways, as 2 checkpoints and as the leaves"
        ):
            self.scores(objective, stack, 0.1)
        rows = [jax.tree.map(lambda x, t=t: x[t], stack) for t in (0, 1)]
        assert self.scores(objective, rows, 0.1).shape == (2, 5)
        arrays = [jnp.ones(3), jnp.ones(3)]  # parameters that are bare arrays
        assert self.scores(lambda p, z: jnp.sum((p * z) ** 2), arrays, 0.1).shape == (2, 5)
