"""Simple attributions against the same by numpy, from gradients and projections held whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
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
        f = lambda params, z: 0.5 * (params[0] * z + params[1] - 1) ** 2
        data = jnp.array([1.0, 2.0])
        train = ij.retrain.training(f, optax.sgd(0.1), (jnp.array(0.5), jnp.array(0.0)), data, epochs=2)
        stack = train.checkpoints(jnp.ones(2), jax.random.key(0), [1, 2])
        rows = [jax.vmap(jax.grad(f), (None, 0))(jax.tree.map(lambda x, t=t: x[t], stack), data) for t in (0, 1)]
        expected = 0.1 * sum(np.outer(a, a) + np.outer(b, b) for a, b in rows)
        assert relative_error(ij.baselines.tracin(f, stack, [0.1, 0.1], data, data), expected) < 1e-12


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
