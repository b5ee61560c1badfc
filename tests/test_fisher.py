"""The sampled Fisher: the GGN in expectation, one matrix in all its products, and no number where there is none."""

import dataclasses

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative_error, tree_error
from operator_problems import COUNT, problem

import influence_jax as ij


class TestFisher:
    """Labels drawn from the model: the GGN in expectation, the data's labels never."""

    def fisher(self, samples=1, seed=0, data=None, **options):
        objective, params, given = problem("classification")
        data = given if data is None else data
        return ij.Fisher(objective, params, data, key=jax.random.key(seed), samples=samples, **options)

    def test_is_the_ggn_within_its_standard_error(self):
        ggn = ij.to_dense(ij.GGN(*problem("classification")))
        draws = jnp.stack([ij.to_dense(self.fisher(8, seed)) for seed in range(40)])
        error = jnp.std(draws, axis=0) / 40**0.5
        assert jnp.max(jnp.abs(jnp.mean(draws, axis=0) - ggn) / (error + 1e-12)) < 5
        assert relative_error(jnp.mean(draws, axis=0), ggn) < 0.2
        assert relative_error(draws[0], ggn) > 0.05, "a single draw is random"

    def test_exact_for_one_output(self):
        """A Rademacher sign squared is one: with a scalar output a single draw is exact."""
        objective = ij.Objective(
            lambda p, z: jnp.tanh(z.x @ p["w"])[None], lambda out, z: 0.5 * jnp.sum((out - z.y[0]) ** 2)
        )
        params, data = {"w": jnp.linspace(-1.0, 1.0, 5)}, problem("regression")[2]
        fisher = ij.Fisher(objective, params, data, key=jax.random.key(0))
        assert relative_error(ij.to_dense(fisher), ij.to_dense(ij.GGN(objective, params, data))) < 1e-12

    def test_labels_of_the_data_do_not_matter(self):
        data = problem("classification")[2]
        other = ij.Batch(data.x, (data.y + 1) % 3)
        assert relative_error(ij.to_dense(self.fisher(2, data=other)), ij.to_dense(self.fisher(2))) < 1e-12

    def test_draws_belong_to_their_example(self):
        """Chunks, minibatches and blocks see the same labels."""
        v = helpers.random_like(jax.random.key(3), self.fisher().params)
        expected = self.fisher(3).mv(v)
        assert tree_error(self.fisher(3, chunk=4).mv(v), expected) < 1e-12
        singles = [ij.minibatch(self.fisher(3), jnp.array([i])).mv(v) for i in range(COUNT)]
        assert tree_error(jax.tree.map(lambda *parts: sum(parts) / COUNT, *singles), expected) < 1e-12
        block = ij.restrict(self.fisher(3), ("layer1/kernel",))
        assert isinstance(block, ij.Fisher)
        places = ij.unflatten(jnp.arange(39.0), v)["layer1"]["kernel"].astype(int).ravel()
        assert relative_error(ij.to_dense(block), ij.to_dense(self.fisher(3))[places][:, places]) < 1e-12

    def test_products_and_factors_are_one_matrix(self):
        samples = 3
        op = self.fisher(samples, weights=jnp.linspace(0.5, 2.0, COUNT))
        v = helpers.random_like(jax.random.key(3), op.params)
        dense = np.asarray(ij.to_dense(op))
        assert relative_error(helpers.flat(op.mv(v), op.params), dense @ helpers.flat(v, op.params)) < 1e-12
        assert relative_error(helpers.flat(ij.diagonal(op), op.params), np.diag(dense)) < 1e-12
        root = ij.root(op)
        assert root.apply(v).shape == (COUNT, samples)
        assert tree_error(root.transpose(root.weights[:, None] * root.apply(v)), op.mv(v)) < 1e-12

    @pytest.mark.parametrize("scale", [1.0, 3.0, 6.0, 12.0])
    def test_confident_predictions(self, float32, scale):
        """Their output Hessians are rounding all over, which is no reason to call the loss non-convex."""
        key = jax.random.key(1)
        objective = ij.Objective(lambda p, z: z.x @ p["w"], helpers.cross_entropy)
        params = {"w": scale * helpers.normal(key, (5, 3), jnp.float32)}
        data = ij.Batch(helpers.normal(key, (200, 5), jnp.float32), jnp.zeros(200, jnp.int32))
        ggn, root = ij.GGN(objective, params, data), ij.root(ij.GGN(objective, params, data))
        v = {"w": helpers.normal(key, (5, 3), jnp.float32)}
        rebuilt = root.transpose(root.weights[:, None] * root.apply(v))
        assert relative_error(rebuilt["w"], ggn.mv(v)["w"]) < 1e-4
        fisher = ij.Fisher(objective, params, data, key=key, samples=400)
        assert relative_error(ij.trace(fisher), ij.trace(ggn)) < 0.05

    def test_many_classes_keep_their_curvature(self, float32):
        """Rare classes have little curvature, not none."""
        classes, key = 400, jax.random.key(0)
        objective = ij.Objective(lambda p, z: p["b"], helpers.cross_entropy)
        params = {"b": 3.0 * helpers.normal(key, (classes,), jnp.float32)}
        data = ij.Batch(jnp.zeros((1, 1), jnp.float32), jnp.zeros(1, jnp.int32))
        fisher = ij.Fisher(objective, params, data, key=key, samples=2000)
        exact = ij.diagonal(ij.GGN(objective, params, data))["b"]
        ratio = np.asarray(ij.diagonal(fisher)["b"] / exact)[exact > 1e-5 * jnp.max(exact)]
        assert len(ratio) > 200
        assert np.max(np.abs(ratio - 1)) < 0.3

    def test_not_convex_is_not_a_number(self):
        objective = ij.Objective(lambda p, z: z.x @ p["w"], lambda out, z: -jnp.sum(out**2))
        data = ij.Batch(jnp.ones((2, 5)), jnp.ones(2))
        assert jnp.isnan(
            ij.Fisher(objective, {"w": jnp.ones((5, 3))}, data, key=jax.random.key(0)).mv({"w": jnp.ones((5, 3))})["w"]
        ).all()

    @pytest.mark.parametrize("sample", [None, ij.softmax_labels("y")])
    def test_derivative_in_the_parameters(self, sample):
        """Labels are drawn at the parameters, so they move with them; finite differences at the same key."""
        objective, params, data = problem("classification")
        objective = dataclasses.replace(objective, sample=sample)
        v, step = helpers.random_like(jax.random.key(5), params), helpers.random_like(jax.random.key(6), params)

        @jax.jit
        def quadratic(t):
            moved = jax.tree.map(lambda p, s: p + t * s, params, step)
            fisher = ij.Fisher(objective, moved, data, key=jax.random.key(0), samples=2)
            return sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(v), jax.tree.leaves(fisher.mv(v)), strict=True))

        difference = (quadratic(1e-5) - quadratic(-1e-5)) / 2e-5
        assert relative_error(jax.grad(quadratic)(0.0), difference) < 1e-7

    def test_replacing_the_key_draws_again(self):
        fisher = self.fisher(2)
        again = dataclasses.replace(fisher, key=jax.random.key(1))
        assert relative_error(ij.to_dense(again), ij.to_dense(self.fisher(2, seed=1))) < 1e-12
        assert relative_error(ij.to_dense(again), ij.to_dense(fisher)) > 1e-2

    def test_output_in_a_container(self):
        objective, params, data = problem("classification")
        inside = ij.Objective(
            lambda p, z: {"logits": objective.predict(p, z)}, lambda out, z: objective.loss(out["logits"], z)
        )
        fisher = ij.Fisher(inside, params, data, key=jax.random.key(0))
        assert relative_error(ij.to_dense(fisher), ij.to_dense(self.fisher())) < 1e-12

    def test_sequences_take_softmax_labels(self):
        """Outputs (T, V): a label per position, whose covariance is that of the softmax."""
        predict = lambda p, z: jnp.stack([z.x, 2.0 * z.x]) @ p["w"]
        loss = lambda out, z: jnp.sum(jax.nn.logsumexp(out, axis=-1) - out[:, 0])
        params, data = {"w": 0.3 * helpers.normal(jax.random.key(0), (5, 3))}, problem("classification")[2]
        data = ij.Batch(data.x, jnp.zeros((COUNT, 2), int))
        objective = ij.Objective(predict, loss, sample=ij.softmax_labels("y"))
        ggn = ij.to_dense(ij.GGN(objective, params, data))
        fishers = [ij.Fisher(objective, params, data, key=jax.random.key(s), samples=64) for s in range(8)]
        mean = sum(ij.to_dense(fisher) for fisher in fishers) / 8
        assert relative_error(mean, ggn) < 0.15
        plain = ij.to_dense(ij.Fisher(ij.Objective(predict, loss), params, data, key=jax.random.key(0), samples=400))
        assert relative_error(plain, ggn) < 0.15, "small outputs need none"

    def test_mistakes(self):
        objective, params, data = problem("classification")
        with pytest.raises(ValueError, match="key: Fisher draws labels"):
            ij.Fisher(objective, params, data)
        with pytest.raises(TypeError, match="objective: Fisher got the bare function"):
            ij.Fisher(lambda p, z: objective(p, z), params, data, key=jax.random.key(0))
        with pytest.raises(ValueError, match="samples: got 0"):
            self.fisher(0)
